"""`nacd store convert`: a trajectory to safetensors files, one a snapshot, and back.

What is made lies in TARGET.part, a folder, until it is whole and on the disk; then it is renamed. Nothing that is there
is overwritten, and what has the name TARGET is complete.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import InputError
from ..progress import byte_bar
from .files import check_room, sync_folder
from .reader import TrajectoryStore
from .table import number, weight_bytes
from .writer import TrajectoryWriter, part_name

TRAJECTORY, TENSORS = ".nacd", ".safetensors"
HEAD_BYTES = 2**20  # of a safetensors file besides the weights, at most


def convert(source: Path, target: Path, *, step: int | None, layout: str | None, eps: float | None) -> str:
    """Make `target` of `source`; returns what was made. A folder is read as snapshots, a file as a trajectory."""
    options = {name: value for name, value in (("layout", layout), ("eps", eps)) if value is not None}
    if source.is_dir():
        check_name(target, TRAJECTORY, "a trajectory is made of a folder")
        if step is not None:
            raise InputError(f"--step={step}: for a trajectory as SOURCE, but {source} is a folder")
        return from_tensors(source, target, options)
    for name, value in options.items():
        raise InputError(f"--{name}={value}: for a folder as SOURCE, but {source} is not one")
    if step is not None:
        check_name(target, TENSORS, "--step makes one file")
    elif target.suffix in (TRAJECTORY, TENSORS):
        raise InputError(f"{target}: must be a folder's name, a file is made by --step")
    return to_tensors(source, target, step)


def check_name(target: Path, suffix: str, why: str) -> None:
    if target.suffix != suffix:
        raise InputError(f"{target}: must end in {suffix}: {why}")


def to_tensors(source: Path, target: Path, step: int | None) -> str:
    with TrajectoryStore(source) as store:
        chosen = store.steps if step is None else [step]
        size = weight_bytes(store.schema)
        with made_beside(target) as part, byte_bar("convert", len(chosen)) as advance:
            for at in chosen:
                path = part / (f"step{at:08d}{TENSORS}" if step is None else target.name)
                check_room(path, size + HEAD_BYTES)
                metadata = {"format": "pt", "step": str(at), "source": source.name}
                if store.schema.eps:
                    metadata["eps"] = str(store.schema.eps)
                write_tensors(path, store.read(at), metadata)
                advance(size)
            finish(part if step is None else path, target)
    return f"{target}: {number(len(chosen), 'snapshot')} of {number(store.schema.count, 'weight')}"


def from_tensors(source: Path, target: Path, options: dict[str, Any]) -> str:
    snapshots = find_snapshots(source)
    with made_beside(target) as part, byte_bar("convert", len(snapshots)) as advance:
        path = part / target.name
        with TrajectoryWriter(path, **options) as writer:
            for step, file in snapshots.items():
                tensors = read_tensors(file)
                try:
                    writer.append(step, tensors)
                except InputError as error:
                    told = str(error).removeprefix(f"{path}: ")
                    raise InputError(f"{file}: cannot be appended to {target} ({told})") from None
                advance(sum(t.nbytes for t in tensors.values()))
        finish(path, target)
    return f"{target}: {number(len(snapshots), 'snapshot')}, {target.stat().st_size:,} bytes"


def find_snapshots(folder: Path) -> dict[int, Path]:
    """Step -> file; the steps are the digits that the names end in, and rise."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob(f"*{TENSORS}")):
        digits = re.search("[0-9]+$", path.stem)
        if digits is None:
            raise InputError(f"{path}: its name must end in its step, as step00000010{TENSORS} does")
        step = int(digits[0])
        if step in found:
            raise InputError(f"{path}: has the step {step} of {found[step].name}")
        found[step] = path
    if not found:
        raise InputError(f"{folder}: holds no {TENSORS} files")
    return dict(sorted(found.items()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise InputError(f"{path}: not a safetensors file ({error})") from None


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:
        raise InputError(f"{path}: cannot be written ({error})") from None
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def made_beside(target: Path) -> Iterator[Path]:
    """A new folder TARGET.part, gone in the end; no other process can have it meanwhile."""
    check_free(target)
    part = part_name(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        part.mkdir()
    except FileExistsError:
        raise InputError(f"{part}: another convert is at work, or was killed: then remove it") from None
    try:
        yield part
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_free(target: Path) -> None:
    if os.path.lexists(target):
        raise InputError(f"{target}: is there already and is not overwritten")


def finish(made: Path, target: Path) -> None:
    """Give what was made its name, to last."""
    if made.is_dir():
        sync_folder(made)
    check_free(target)
    os.rename(made, target)
    sync_folder(target.parent)
