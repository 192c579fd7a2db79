"""Appends snapshots to a trajectory.

What a writer has put on the disk when `append` returns stays there: the frame is written to the open file and synced.
A full group is sealed at the next append, the last one by `close`: its frames, coded anew, go to the main file and are
synced, then the seal is, and only then is the open file removed. Taking back works the other way round. At every moment
the two files hold each snapshot at least once, and a closed trajectory's bytes follow from its snapshots and the codec
alone, however often the writing was interrupted.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

import numpy as np
from torch import Tensor

from .. import codec
from ..codec import BLOCK, TILE, CodecError
from ..errors import InputError
from .bounds import bounds_of, runs_of, to_table
from .decoder import Decoder, FrameCache
from .files import check_room, close_locked, create, cut, open_locked, sync_folder, write_at
from .index import Index, Place, open_name, read_index
from .layout import DEPTH, GROUP, MAX_GROUP, open_references, sealed
from .records import FRAME, MAX_STEP, SCHEMA, SEAL, Bytes, Record, pack
from .schema import Schema, Words, check_tensors, flatten, is_count, schema_of

SEAL_CACHE_BYTES = 2**28  # of decoded snapshots while a group is coded anew, but at least SEAL_CACHE of them
SEAL_CACHE = 4


class TrajectoryWriter:
    """Appends snapshots; each is durable when `append` returns. Opening a file takes up the trajectory in it.

        with TrajectoryWriter(path) as writer:
            writer.append(0, tensors)

    One writer at a time: a second one gets an InputError. layout: "hierarchical", or "fast" (at most 3 frames to decode
    for a snapshot instead of 5). eps: 0 is lossless; else every weight is at most eps x RMS of its tensor's change
    since the snapshot before off. After an exception in the `with` block the group stays open for the next writer.
    """

    def __init__(
        self, path: Path, *, layout: str = "hierarchical", group: int = GROUP, eps: float = 0.0, threads: int = 1
    ):
        if layout not in DEPTH:
            raise InputError(f"layout={layout!r}, must be one of {', '.join(DEPTH)}")
        if not is_count(group, MAX_GROUP) or group < 1:
            raise InputError(f"group={group!r}, must be from 1 to {MAX_GROUP}")
        if not 0 <= eps < 1e9:
            raise InputError(f"eps={eps!r}, must be 0 (lossless) or a positive number")
        self.path, self.open_path = path, open_name(path)
        self.layout, self.group, self.eps, self.threads = layout, group, float(eps), threads
        self.recent: dict[int, Words] = {}  # decoded: what the next append is coded against
        self.open_file: FileIO | None = None
        self.index = Index()
        self.main = open_locked(path)
        try:
            self._take_up()
        except BaseException:
            self._release()
            raise

    def __enter__(self) -> "TrajectoryWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self._release()

    @property
    def steps(self) -> list[int]:
        return list(self.index.frames)

    def append(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Add the snapshot of `step`, beyond all before it. tensors: names, shapes and type as in the others.

        After an InputError the trajectory is what it was, and the snapshot can be appended again: by this writer, or,
        if the disk failed so that this one cannot go on and says so, by another.
        """
        where = f"{self.path}: the snapshot of step {step}"
        self._check_open(where)
        last = self.steps[-1] if self.index.frames else -1
        if not is_count(step, MAX_STEP) or step <= last:
            raise InputError(f"{where}: must be above the last step {last} and at most {MAX_STEP}")
        schema = self.index.schema if self.index.frames else None
        schema = schema or schema_of(where, tensors, self.layout, self.group, self.eps)
        check_tensors(where, tensors, schema)
        words = flatten(tensors, schema)
        with self._told(where):
            check_room(self.path, 2 * frame_bound(schema.count) + self.index.open_end)
            if not self.index.frames:
                self._begin(schema)
            elif self.index.left_key is None and self.index.groups and not self.index.open_steps:
                self._reopen(len(self.index.groups) - 1, self.index.groups[-1].steps)
            elif len(self._members()) > self.group:
                self._seal()
            self._add(step, words, schema)

    def truncate(self, after_step: int) -> None:
        """Drop the snapshots beyond `after_step`, to write them anew after a resume; -1 drops all."""
        where = f"{self.path}: the cut after step {after_step}"
        self._check_open(where)
        kept = [step for step in self.steps if step <= after_step]
        if len(kept) == len(self.steps):
            return
        with self._told(where):
            if after_step < self.index.sealed_to:
                number = next(i for i, group in enumerate(self.index.groups) if group.steps[-1] > after_step)
                self._reopen(number, [step for step in self.index.groups[number].steps if step <= after_step])
            else:
                with self._settled():
                    self.index.shorten(kept[-1] if kept else -1)
                    if self.open_file is not None and self.index.open_steps:
                        cut(self.open_file, self.index.open_end)
                    else:
                        self._remove_open()
            self._forget()

    def close(self) -> None:
        """Seal the open group and let others write. A second call does nothing."""
        try:
            if not self.main.closed and self.index.open_steps:
                with self._told(f"{self.path}: the seal of step {self.steps[-1]}"):
                    self._seal()
        finally:
            self._release()

    # What is there

    def _take_up(self) -> None:
        """Read the files, and drop what a killed writer left unfinished."""
        part_name(self.open_path).unlink(missing_ok=True)
        with suppress(FileNotFoundError):
            self.open_file = FileIO(os.open(self.open_path, os.O_RDWR | os.O_CLOEXEC), "r+")
        self.index = read_index(self.main, self.open_file, self.path)
        schema = self.index.schema
        if self.index.frames and schema is not None:
            wanted, found = (self.layout, self.group, self.eps), (schema.layout, schema.group, schema.eps)
            if wanted != found:
                raise InputError(
                    f"{self.path}: made with layout={found[0]}, group={found[1]}, eps={found[2]:g}, "
                    f"not with layout={wanted[0]}, group={wanted[1]}, eps={wanted[2]:g}"
                )
        cut(self.main, self.index.main_end)
        if self.open_file is not None and self.index.open_steps:
            cut(self.open_file, self.index.open_end)
        else:  # the seal was written, or nothing was
            self._remove_open()

    def _check_open(self, where: str) -> None:
        if self.main.closed:
            raise InputError(f"{where}: its writer is closed, open the trajectory anew")

    def _forget(self) -> None:
        """Let go of snapshots that were cut off."""
        self.recent = {step: words for step, words in self.recent.items() if step in self.index.frames}

    def _release(self) -> None:
        close_locked(self.main)
        if self.open_file is not None:
            self.open_file.close()

    def _remove_open(self) -> None:
        """For good: were it there again after a power cut, its frames' references might be gone."""
        if self.open_file is not None:
            os.unlink(self.open_path)
            sync_folder(self.path.parent)
            self.open_file.close()
            self.open_file = None
        self.index.open_end = 0

    def _members(self) -> list[int]:
        """The open group's steps, its left key first."""
        left = [] if self.index.left_key is None else [self.index.left_key]
        return left + self.index.open_steps

    def _decoder(self, schema: Schema) -> Decoder:
        limit = max(SEAL_CACHE_BYTES, SEAL_CACHE * 4 * schema.count)
        return Decoder(self.index, schema, FrameCache(limit), self.threads)

    @contextmanager
    def _told(self, where: str) -> Iterator[None]:
        """An OSError becomes an InputError, and what was half written is dropped again.

        Any other interruption closes the writer: what it knows of the files may be wrong from then on.
        """
        try:
            yield
        except InputError:
            self._undo()
            raise
        except OSError as error:
            self._undo()
            anew = "; open the trajectory anew" if self.main.closed else ""
            raise InputError(f"{where}: cannot be written ({error.strerror}){anew}") from None
        except BaseException:
            self._release()
            raise

    def _undo(self) -> None:
        """Drop what the index does not know of. A writer that cannot is closed: the next one does it."""
        if self.main.closed:
            return
        try:
            part_name(self.open_path).unlink(missing_ok=True)
            cut(self.main, self.index.main_end)
            if self.open_file is not None and self.index.open_end:
                cut(self.open_file, self.index.open_end)
            else:
                self._remove_open()
        except OSError:
            self._release()

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """What is done here follows from what is on the disk: a failure must not undo that, and closes the writer."""
        try:
            yield
        except BaseException:
            self._release()
            raise

    # Writing

    def _begin(self, schema: Schema) -> None:
        """Start the main file with its schema."""
        cut(self.main, 0)
        self.index.main_end = 0
        record, pieces = pack(SCHEMA, 0, [as_bytes(schema.to_json())])
        write_at(self.main, 0, pieces)
        os.fdatasync(self.main.fileno())
        sync_folder(self.path.parent)
        self.index = Index(schema, main_end=record.end)

    def _add(self, step: int, words: Words, schema: Schema) -> None:
        """Append one frame to the open file."""
        members = self._members()
        decoder = self._decoder(schema)
        plan = open_references(len(members), self.layout) if len(members) < self.group else ()
        references = [self._known(members[i], decoder) for i in plan]
        table, runs = as_bytes(b""), []
        if self.eps and self.index.frames:
            bounds = bounds_of(words, self._known(self.steps[-1], decoder), schema)
            table, runs = to_table(bounds), runs_of(bounds, schema, exact=False)
        frame = codec.encode(words, references, zero_bits=schema.zero_bits, runs=runs, threads=self.threads).data
        try:  # read back before it is promised: what a reader would see
            kept = codec.decode(frame, references, threads=self.threads, verify=True)
        except CodecError as error:
            raise InputError(f"{self.path}: step {step}: its frame cannot be read back ({error})") from None

        new = self.open_file is None
        file = self.open_file = self.open_file or create(self.open_path)
        cut(file, self.index.open_end)
        record = write_frame(file, self.index.open_end, step, [members[i] for i in plan], [frame, table])
        os.fdatasync(file.fileno())
        if new:
            sync_folder(self.path.parent)
        self.index.frames[step] = Place(file, self.open_path, record)
        self.index.open_end = record.end
        self._remember(step, kept)

    def _known(self, step: int, decoder: Decoder) -> Words:
        return self.recent[step] if step in self.recent else decoder.words(step)

    def _remember(self, step: int, words: Words) -> None:
        """Keep what the next snapshot is coded against, and measured by; let go of the rest."""
        members = self._members()
        if len(members) > self.group:  # to be sealed first
            members = [step]
        needed = (
            {members[i] for i in open_references(len(members), self.layout)} if len(members) < self.group else set()
        )
        if self.eps:
            needed.add(step)
        self.recent = {at: kept for at, kept in [*self.recent.items(), (step, words)] if at in needed}

    def _seal(self) -> None:
        """Code the open group anew, against both sides, into the main file; then remove the open file."""
        schema = self.index.schema
        assert schema is not None
        members, left, decoder = self._members(), self.index.left_key, self._decoder(schema)
        last = len(members) - 1
        end, places = self.index.main_end, {}
        cut(self.main, end)
        for member, plan in sealed(last, self.layout, right_key=last == self.group):
            if (step := members[member]) != left:
                record = self._recode(self.main, end, step, [members[i] for i in plan], decoder)
                places[step], end = Place(self.main, self.path, record), record.end
        os.fdatasync(self.main.fileno())  # a seal must not be on the disk before its frames
        record, pieces = pack(SEAL, end, [], step=members[-1])
        write_at(self.main, end, pieces)
        os.fdatasync(self.main.fileno())
        with self._settled():
            self.index.seal(record.end, places)
            self._remove_open()

    def _reopen(self, number: int, kept: list[int]) -> None:
        """Take sealed groups from `number` on back, but keep those steps of the first of them, as an open group."""
        schema, groups = self.index.schema, self.index.groups
        assert schema is not None
        decoder, end, places = self._decoder(schema), 0, {}
        members = [*(groups[number - 1].steps[-1:] if number else []), *kept]
        file = create(part_name(self.open_path)) if kept else None
        if file is not None:
            for member, step in enumerate(members):
                if step in kept:
                    plan = open_references(member, self.layout)
                    record = self._recode(file, end, step, [members[i] for i in plan], decoder)
                    places[step], end = Place(file, self.open_path, record), record.end
            os.fdatasync(file.fileno())
        with self._settled():
            if file is not None:
                os.replace(part_name(self.open_path), self.open_path)
                sync_folder(self.path.parent)
                if self.open_file is not None:
                    self.open_file.close()
                self.open_file = file
            else:
                self._remove_open()
            self.index.reopen(number, end, places)
            cut(self.main, self.index.main_end)

    def _recode(self, file: FileIO, offset: int, step: int, references: list[int], decoder: Decoder) -> Record:
        """Write a snapshot's frame anew, against other references; its values and bounds stay what they are."""
        schema, place = decoder.schema, self.index.frames[step]
        runs, table = runs_of(decoder.bounds(step), schema, exact=True), decoder.read_table(place)
        words, known = decoder.words(step), [decoder.words(at) for at in references]
        frame = codec.encode(words, known, zero_bits=schema.zero_bits, runs=runs, threads=self.threads).data
        self._check_frame(step, frame, known, words)
        return write_frame(file, offset, step, references, [frame, table])

    def _check_frame(self, step: int, frame: Bytes, references: list[Words], words: Words) -> None:
        """Raise InputError unless a frame decodes to `words`: the good one that it replaces is thrown away."""
        try:
            same = np.array_equal(codec.decode(frame, references, threads=self.threads, verify=True), words)
        except CodecError:
            same = False
        if not same:
            raise InputError(f"{self.path}: step {step}: coded anew, it decodes to other values; it stays as it was")


def write_frame(file: FileIO, offset: int, step: int, references: list[int], payload: list[Bytes]) -> Record:
    record, pieces = pack(FRAME, offset, payload, step=step, references=references)
    write_at(file, offset, pieces)
    return record


def part_name(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def frame_bound(count: int) -> int:
    """Bytes that a snapshot of `count` weights may take on the disk: somewhat more than the weights themselves."""
    return 4 * count + count // TILE * 12 + (count // BLOCK + 1) * 512 + 4096


def as_bytes(data: bytes) -> Bytes:
    return np.frombuffer(data, np.uint8)
