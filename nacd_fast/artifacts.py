"""Stage folders: what a finished stage left, and where an unfinished one goes on.

A stage is a function from files to files. Its folder holds

    config.json     what makes the result: the stage's settings, its seed, the digests of its inputs
    work/           the state to resume from; gone once the stage is finished
    <outputs>       written to a sibling name, then renamed
    timing.json     seconds and peak memory, over all attempts but killed ones, and the versions (no part of the result)
    manifest.json   written last: SHA-256 of every output. A folder with a manifest is finished.

A finished folder with the same config.json is reused, if its files still have those digests. One made with other
settings is an error that names the first difference: nothing is overwritten.
"""

import hashlib
import json
import os
import platform
import resource
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .errors import InputError

NOT_RESULTS = {"timing.json", "manifest.json"}


def write_atomic(path: Path, data: bytes) -> None:
    """Write, flush to disk, rename: `path` holds the old bytes or all of the new ones, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def file_digest(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and digests of a finished stage's outputs."""
    outputs = read_json(folder / "manifest.json")["outputs"]
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def first_difference(old: Any, new: Any, name: str = "") -> str | None:
    """`name=new, was old` for the first leaf that differs, or None."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            found = first_difference(old.get(key), new.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if old == new else f"{name}={new!r}, was {old!r}"


def reset_peak() -> None:
    """Start the peak-memory counters anew (`peak_bytes` then counts from here)."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)


def peak_bytes() -> int:
    """Peak memory of the process: allocated on the GPU where one is in use, else resident."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines() if Path("/proc/self/status").exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Stage:
    """One stage's folder, open for work."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.work = folder / "work"

    @property
    def finished(self) -> bool:
        return (self.folder / "manifest.json").exists()

    def check_outputs(self) -> None:
        """Raise InputError if a file of a finished stage is not the one that was written."""
        for name, digest in read_json(self.folder / "manifest.json")["outputs"].items():
            path = self.folder / name
            if not path.is_file() or file_digest(path) != digest:
                state = "changed" if path.is_file() else "gone"
                raise InputError(f"{path}: {state} since its stage was finished; delete {self.folder} to make it anew")

    def outputs(self) -> list[Path]:
        files = (p for p in self.folder.rglob("*") if p.is_file() and not p.is_relative_to(self.work))
        return sorted(p for p in files if p.name not in NOT_RESULTS and p.suffix != ".part")


@contextmanager
def open_stage(folder: Path, config: Mapping[str, Any], inputs: Mapping[str, str] | None = None) -> Iterator[Stage]:
    """The stage in `folder`. On a clean exit it is finished; on an exception its `work/` stays for the next attempt.

    config: JSON-able settings that determine the result; inputs: name -> digest. Use as

        with open_stage(folder, config, inputs) as stage:
            if not stage.finished:
                ...                       # write to stage.folder; resume from stage.work

    Raises InputError if the folder was made with other settings.
    """
    stage = Stage(folder)
    key = json.loads(json.dumps({"config": dict(config), "inputs": dict(inputs or {})}))
    if (folder / "config.json").exists():
        difference = first_difference(read_json(folder / "config.json"), key)
        if difference:
            raise InputError(
                f"{folder}: made with other settings ({difference}); take another --out or delete the folder"
            )
    else:
        write_json(folder / "config.json", key)
    if stage.finished:
        shutil.rmtree(stage.work, ignore_errors=True)  # a kill can come between the manifest and this
        stage.check_outputs()
        yield stage
        return
    stage.work.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    reset_peak()
    try:
        yield stage
    finally:
        write_timing(folder / "timing.json", time.monotonic() - start)
    digests = {str(p.relative_to(folder)): file_digest(p) for p in stage.outputs()}
    write_json(folder / "manifest.json", {"outputs": digests})
    shutil.rmtree(stage.work)


def write_timing(path: Path, seconds: float) -> None:
    """Add an attempt's time and peak memory to those before, and say what made the stage."""
    before = read_json(path) if path.exists() else {"seconds": 0.0, "peak_bytes": 0}
    total, peak = before["seconds"] + seconds, max(before["peak_bytes"], peak_bytes())
    made_with: dict[str, Any] = {
        name: version(name) for name in ("nacd_fast", "torch", "transformers", "peft") if installed(name)
    }
    made_with |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
    write_json(path, {"seconds": round(total, 3), "peak_bytes": peak, "made_with": made_with})


def installed(name: str) -> bool:
    """False for nacd_fast where it runs from a checkout that is not installed."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True
