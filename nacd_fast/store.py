"""Expert trajectories on disk: snapshots of the adapters by optimiser step, appended while training, read in any order.

    index.json               {"version": 1, "tensors": {name: shape}, "snapshots": [{"step", "bytes", "sha256"}]}
    step00000024.safetensors the adapters after 24 steps, float32

One safetensors file a snapshot. A file's name follows from its step, so the index names no path. A snapshot exists once
the index lists it, and the index is written after the file has reached the disk: a killed writer leaves at most a file
that no index lists, which the next writer removes. Values are stored as they are, NaN and its payload included.

Bytes read are not trusted: size and SHA-256 are checked, then names, shapes and types against the index.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .artifacts import read_json, write_atomic, write_json
from .errors import InputError

VERSION = 1
INDEX = "index.json"
MAX_STEP = 10**8 - 1  # eight digits in a file name

Shapes = dict[str, list[int]]


def file_name(step: int) -> str:
    return f"step{step:08d}.safetensors"


def sync_folder(folder: Path) -> None:
    """Make the renames in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def check_index(path: Path, index: Any) -> None:
    """Raise InputError unless `index` has the form in the module's docstring, with strictly increasing steps."""

    def require(ok: bool, what: str) -> None:
        if not ok:
            raise InputError(f"{path}: {what}, not the index of a trajectory")

    require(
        isinstance(index, dict) and index.keys() == {"version", "tensors", "snapshots"},
        "must have the keys version, tensors and snapshots",
    )
    require(index["version"] == VERSION, f"version {index['version']!r}, must be {VERSION}")
    require(isinstance(index["tensors"], dict), "tensors must be an object")
    for name, shape in index["tensors"].items():
        require(isinstance(shape, list) and all(is_count(n, 2**40) for n in shape), f"tensor {name!r}, shape {shape!r}")
    require(isinstance(index["snapshots"], list), "snapshots must be a list")
    last = -1
    for entry in index["snapshots"]:
        require(isinstance(entry, dict) and entry.keys() == {"step", "bytes", "sha256"}, f"snapshot {entry!r}")
        require(is_count(entry["step"], MAX_STEP), f"step {entry['step']!r}, must be from 0 to {MAX_STEP}")
        require(entry["step"] > last, f"step {entry['step']} after step {last}")
        require(is_count(entry["bytes"], 2**62) and isinstance(entry["sha256"], str), f"snapshot {entry!r}")
        last = entry["step"]


class TrajectoryStore:
    """A trajectory for reading. Every malformed byte is an InputError that names the file and the step."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            index = read_json(folder / INDEX)
        except (OSError, RecursionError, ValueError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder / INDEX}: not JSON ({error})") from None
        check_index(folder / INDEX, index)
        self.shapes: Shapes = index["tensors"]
        self.entries: dict[int, dict[str, Any]] = {entry["step"]: entry for entry in index["snapshots"]}

    @property
    def steps(self) -> list[int]:
        return list(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def check_step(self, step: int) -> None:
        """Raise InputError, with the nearest steps, unless there is a snapshot at `step`."""
        if step in self.entries:
            return
        below = [str(s) for s in self.entries if s < step][-1:]
        above = [str(s) for s in self.entries if s > step][:1]
        raise InputError(f"{self.folder}: no snapshot at step {step}; nearest: {' and '.join(below + above) or 'none'}")

    def read(self, step: int) -> dict[str, Tensor]:
        """The adapters after `step` optimiser steps: name -> float32 on the CPU, names sorted."""
        self.check_step(step)
        path, entry = self.folder / file_name(step), self.entries[step]
        where = f"{path}: the snapshot of step {step}"
        try:
            size = path.stat().st_size
            if size != entry["bytes"]:
                raise InputError(f"{where} has {size} bytes, must have {entry['bytes']}")
            data = path.read_bytes()
        except FileNotFoundError:
            raise InputError(f"{where} is missing") from None
        except OSError as error:
            raise InputError(f"{where} cannot be read ({error.strerror})") from None
        digest = hashlib.sha256(data).hexdigest()
        if digest != entry["sha256"]:
            raise InputError(f"{where} has SHA-256 {digest[:12]}..., must have {entry['sha256'][:12]}...")
        try:
            tensors = load(data)
        except (SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{where} is not a safetensors file ({error})") from None
        check_tensors(where, tensors, self.shapes)
        return dict(sorted(tensors.items()))

    def read_pair(self, t: int, t_end: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The snapshots of a matching segment: its start and its target."""
        self.check_step(t)
        self.check_step(t_end)
        return self.read(t), self.read(t_end)


def check_tensors(where: str, tensors: Mapping[str, Tensor], shapes: Shapes) -> None:
    """Raise InputError unless `tensors` are float32 and have the names and shapes of `shapes`."""
    for name in sorted(tensors.keys() | shapes.keys()):
        mine, other = (list(tensors[name].shape) if name in tensors else None), shapes.get(name)
        if mine != other:
            raise InputError(f"{where}: tensor {name} has shape {mine}, in this trajectory it has {other}")
        if tensors[name].dtype != torch.float32:
            raise InputError(f"{where}: tensor {name} is {tensors[name].dtype}, must be torch.float32")


class TrajectoryWriter:
    """Appends snapshots; each is durable when `append` returns. Opening a folder takes up the trajectory in it.

        with TrajectoryWriter(folder) as writer:
            writer.append(0, tensors)

    One writer at a time.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.shapes: Shapes | None = None
        self.entries: list[dict[str, Any]] = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / INDEX).exists():
            store = TrajectoryStore(folder)
            self.entries = list(store.entries.values())
            self.shapes = store.shapes if self.entries else None
        self.remove_orphans()

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass  # nothing is held open: append leaves the trajectory whole

    @property
    def steps(self) -> list[int]:
        return [entry["step"] for entry in self.entries]

    def append(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Add the snapshot of `step`, beyond all before it. tensors: float32, names and shapes as in the others."""
        where = f"{self.folder / file_name(step)}: the snapshot of step {step}"
        if not is_count(step, MAX_STEP) or (self.entries and step <= self.entries[-1]["step"]):
            last = self.entries[-1]["step"] if self.entries else -1
            raise InputError(f"{where}: must be above the last step {last} and at most {MAX_STEP}")
        shapes = self.shapes or {name: list(t.shape) for name, t in sorted(tensors.items())}
        check_tensors(where, tensors, shapes)
        # safetensors refuses strided and shared storage, and adapters may be views of one flat vector
        data = save({name: t.detach().to("cpu", copy=True).contiguous() for name, t in sorted(tensors.items())})
        write_atomic(self.folder / file_name(step), data)
        sync_folder(self.folder)
        self.shapes = shapes
        self.entries.append({"step": step, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        self.write_index()

    def truncate(self, after_step: int) -> None:
        """Drop the snapshots beyond `after_step`, to write them anew after a resume; -1 drops all."""
        kept = [entry for entry in self.entries if entry["step"] <= after_step]
        if len(kept) < len(self.entries):
            self.entries = kept
            self.write_index()
            self.remove_orphans()

    def write_index(self) -> None:
        write_json(self.folder / INDEX, {"version": VERSION, "tensors": self.shapes or {}, "snapshots": self.entries})
        sync_folder(self.folder)

    def remove_orphans(self) -> None:
        """Delete what a killed writer left: snapshots that the index does not list, and halves of files."""
        listed = {file_name(step) for step in self.steps}
        for path in (*self.folder.glob("step*.safetensors"), *self.folder.glob("*.part")):
            if path.name not in listed:
                path.unlink()
