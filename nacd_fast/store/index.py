"""What a trajectory holds, found by scanning its files: which snapshots there are, and where each one's frame lies.

    <name>        a schema, then sealed groups: the frames of each, then its seal. Frames without a seal do not count.
    <name>.open   the open group's frames, in the order in which they were appended; gone when there is none

A step in both is the main file's: a seal was written, but the open file not yet removed.
"""

import os
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

import numpy as np

from ..codec import crc32c
from ..errors import InputError
from .layout import DEPTH, References, frames_to
from .records import FRAME, SCHEMA, SEAL, Record, scan
from .schema import Schema, parse

MAX_SCHEMA_BYTES = 2**26


@dataclass(frozen=True)
class Group:
    """A sealed group in the main file; steps beyond the last one of the group before."""

    begin: int  # bytes: where its records begin
    end: int
    steps: list[int]


@dataclass(frozen=True)
class Place:
    """A snapshot's frame."""

    file: FileIO
    path: Path
    record: Record


@dataclass
class Index:
    """`frames` and `references` by step, steps rising; `main_end`, `open_end` are the bytes that count."""

    schema: Schema | None = None
    groups: list[Group] = field(default_factory=list)
    frames: dict[int, Place] = field(default_factory=dict)
    main_end: int = 0
    open_end: int = 0

    @property
    def references(self) -> dict[int, References]:
        return {step: place.record.references for step, place in self.frames.items()}

    @property
    def sealed_to(self) -> int:
        """The last step of the main file; -1 without one."""
        return self.groups[-1].steps[-1] if self.groups else -1

    @property
    def open_steps(self) -> list[int]:
        return [step for step in self.frames if step > self.sealed_to]

    @property
    def left_key(self) -> int | None:
        """The main file's last snapshot, where it is a group's right key: the open group's left key."""
        if not self.groups or self.schema is None:
            return None
        members = len(self.groups[-1].steps) - (len(self.groups) == 1)
        return self.sealed_to if members == self.schema.group else None

    def seal(self, end: int, places: Mapping[int, Place]) -> None:
        """Frames of the main file that are sealed up to byte `end` of it take the place of the open file's."""
        self.groups.append(Group(self.main_end, end, sorted(places)))
        self.frames |= dict(sorted(places.items()))
        self.main_end, self.open_end = end, 0

    def reopen(self, number: int, end: int, places: Mapping[int, Place]) -> None:
        """Groups from `number` on are gone; the open file has these frames, up to byte `end` of it."""
        self.main_end = self.groups[number].begin
        del self.groups[number:]
        self.frames = {step: place for step, place in self.frames.items() if step <= self.sealed_to} | dict(places)
        self.open_end = end

    def shorten(self, last: int) -> None:
        """Open frames beyond step `last` are gone."""
        self.frames = {step: place for step, place in self.frames.items() if step <= last}
        self.open_end = self.frames[last].record.end if self.open_steps else 0


def open_name(path: Path) -> Path:
    if not path.name:
        raise InputError(f"{path}: a folder, must be a trajectory file")
    return path.with_name(path.name + ".open")


def read_index(main: FileIO, open_file: FileIO | None, path: Path) -> Index:
    """The index of two open files. Raises InputError where they are damaged or not a trajectory's."""
    index = Index()
    add_main(index, main, path)
    if open_file is not None:
        add_open(index, open_file, open_name(path))
    if index.schema is not None:
        check_depth(index, index.schema, path)
    elif index.frames:
        raise InputError(f"{path}: no schema, but {open_name(path).name} has snapshots")
    return index


def add_main(index: Index, file: FileIO, path: Path) -> None:
    pending: dict[int, Place] = {}
    for record in scan(file.fileno(), path, SEAL):
        where = f"{path}: the record at byte {record.offset}"
        if (record.kind == SCHEMA) != (index.schema is None):
            raise InputError(f"{where}: a trajectory has one schema, at its begin")
        if record.kind == SCHEMA:
            index.schema = parse(str(path), read_payload(file, record, where))
            index.main_end = record.end
        elif record.kind == FRAME:
            check_frame(where, record, index.sealed_to, ChainMap(pending, index.frames))
            pending[record.step] = Place(file, path, record)
        elif record.kind == SEAL:
            if not pending or record.step != max(pending):
                raise InputError(f"{where}: a seal of step {record.step}, must be the last one of its group")
            index.seal(record.end, pending)
            pending = {}


def add_open(index: Index, file: FileIO, path: Path) -> None:
    last = index.sealed_to
    for record in scan(file.fileno(), path, FRAME):
        where = f"{path}: the record at byte {record.offset}"
        if record.kind != FRAME:
            raise InputError(f"{where}: an open group has frames alone")
        if record.step > last:
            check_frame(where, record, max([last, *index.frames]), index.frames)
            index.frames[record.step] = Place(file, path, record)
        index.open_end = record.end


def read_payload(file: FileIO, record: Record, where: str) -> bytes:
    """A short payload. The scan has not verified it: frames have checksums of their own, other kinds have not."""
    if record.payload_bytes > MAX_SCHEMA_BYTES:
        raise InputError(f"{where}: a schema of {record.payload_bytes} bytes, must be at most {MAX_SCHEMA_BYTES}")
    data = os.pread(file.fileno(), record.payload_bytes, record.payload)
    if crc32c(np.frombuffer(data, np.uint8)) != record.payload_crc:
        raise InputError(f"{where}: a schema that changed since it was written")
    return data


def check_frame(where: str, record: Record, above: int, frames: Mapping[int, Place]) -> None:
    if record.step <= above or record.step in frames:
        raise InputError(f"{where}: step {record.step} after step {max(above, *frames)}")
    for step in record.references:
        if step not in frames:
            raise InputError(f"{where}: step {record.step} is coded against step {step}, which is not there")


def check_depth(index: Index, schema: Schema, path: Path) -> None:
    """Raise InputError where a reader would need more frames than the layout promises."""
    references, limit = index.references, DEPTH[schema.layout]
    for step in references:
        deep = len(frames_to(step, references))
        if deep > limit:
            raise InputError(f"{path}: step {step} is {deep} frames deep, must be at most {limit}")
