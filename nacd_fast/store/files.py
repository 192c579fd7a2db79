"""Writing so that it lasts: whole writes, synced files and folders, locks, room on the disk."""

import fcntl
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path

from ..errors import InputError
from .records import Bytes


def write_at(file: FileIO, offset: int, pieces: Iterable[bytes | Bytes]) -> int:
    """Write the pieces one behind the other; returns the end."""
    for piece in pieces:
        view = memoryview(piece)  # type: ignore[arg-type]  # arrays are buffers
        while len(view):
            written = os.pwrite(file.fileno(), view, offset)
            view, offset = view[written:], offset + written
    return offset


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path) -> None:
    """The folder and those above it, where they are missing; their names survive a power cut."""
    missing = [above for above in (folder, *folder.parents) if not above.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        sync_folder(made.parent)


def create(path: Path) -> FileIO:
    """An empty file, for reading and writing. Raises FileExistsError: what is there is not thrown away."""
    return FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644), "r+")


def cut(file: FileIO, end: int) -> None:
    """Drop what lies beyond `end`."""
    if os.fstat(file.fileno()).st_size > end:
        os.ftruncate(file.fileno(), end)
        os.fdatasync(file.fileno())


def open_locked(path: Path) -> FileIO:
    """The file, made if it is not there, for one writer at a time: others get an InputError."""
    make_folder(path.parent)
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+")
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"{path}: another writer has it open") from None
    return file


def close_locked(file: FileIO) -> None:
    """Let others write. Closing alone does not, while a forked child has the file open too."""
    if not file.closed:
        fcntl.flock(file.fileno(), fcntl.LOCK_UN)
        file.close()


def free_bytes(folder: Path) -> int:
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def check_room(path: Path, needed: int) -> None:
    """Raise InputError unless the disk has room for `needed` bytes more."""
    free = free_bytes(path.parent)
    if free < needed:
        raise InputError(f"{path}: the disk has {free:,} bytes left, the next snapshot may take {needed:,}")
