"""Snapshots from frames: reads a frame's bytes, decodes its references first, and keeps those for the next one.

Every decoded block is compared with its words' checksum, but with base_only, whose words have none, and on a GPU
(device.py): a reference that is not the one that was encoded against is an error like any damaged byte.
"""

import os
import threading
from collections import OrderedDict
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from .. import codec
from ..codec import BLOCK, SLACK, TILE, CodecError
from ..codec_format import BLOCK_HEADER, ENTRY
from ..errors import InputError
from .bounds import Bounds, from_table
from .index import Index, Place
from .records import HEADER, Bytes
from .schema import Schema, Words

Kept = TypeVar("Kept", Words, Tensor)

LEAST_BLOCK_BYTES = ENTRY.itemsize + BLOCK_HEADER.itemsize  # in its frame, without the modes: a byte a tile
HEAD_BYTES = 4096  # of a frame's head without its runs and its directory, at most


class ChangedError(InputError):
    """A writer has cut the file since its index was read: a snapshot may be elsewhere, or gone."""


class FrameCache(Generic[Kept]):
    """Decoded snapshots, at most `limit` bytes; the least recently used goes first, keys last. For threads.

    Several trajectories may share one: a snapshot is kept under its step and an `owner`, who knows that step.
    """

    def __init__(self, limit: int):
        self.limit, self.bytes = limit, 0
        self.lock = threading.Lock()
        self.keys: OrderedDict[tuple[object, int], Kept] = OrderedDict()
        self.others: OrderedDict[tuple[object, int], Kept] = OrderedDict()

    def get(self, step: int, owner: object = None) -> Kept | None:
        with self.lock:
            for kept in (self.keys, self.others):
                if (owner, step) in kept:
                    kept.move_to_end((owner, step))
                    return kept[owner, step]
        return None

    def put(self, step: int, words: Kept, owner: object = None, *, key: bool) -> None:
        """Keep `words`, which nobody may change from now on."""
        name = (owner, step)
        with self.lock:
            if words.nbytes > self.limit or name in self.keys or name in self.others:
                return
            if not key and words.nbytes > self.limit - sum(kept.nbytes for kept in self.keys.values()):
                return
            (self.keys if key else self.others)[name] = words
            self.bytes += words.nbytes
            while self.bytes > self.limit:
                self.bytes -= (self.others or self.keys).popitem(last=False)[1].nbytes

    def drop(self, owner: object) -> None:
        """Let go of all that is kept for `owner`."""
        with self.lock:
            for kept in (self.keys, self.others):
                for name in [name for name in kept if name[0] is owner]:
                    self.bytes -= kept.pop(name).nbytes


class Caches:
    """What the stores that are given it keep together: at most `limit` bytes in memory, and as many on each GPU."""

    def __init__(self, limit: int):
        self.limit, self.lock = limit, threading.Lock()
        self.host: FrameCache[Words] = FrameCache(limit)
        self.devices: dict[torch.device, FrameCache[Tensor]] = {}

    def on(self, device: torch.device) -> "FrameCache[Tensor]":
        with self.lock:
            return self.devices.setdefault(device, FrameCache(self.limit))

    def drop(self, owner: object) -> None:
        self.host.drop(owner)
        with self.lock:
            for cache in self.devices.values():
                cache.drop(owner)


class Decoder:
    """The snapshots of an index, as words. It owns what it keeps in the cache."""

    def __init__(self, index: Index, schema: Schema, cache: FrameCache[Words], threads: int = 1):
        self.index, self.schema, self.cache, self.threads = index, schema, cache, threads
        self.all = range(-(-schema.count // BLOCK))

    def words(self, step: int) -> Words:
        """The snapshot [P], read-only: from the cache, or decoded and kept there."""
        return self.reference(step, self.all, {})

    def decode(self, step: int, blocks: range, out: Words | None = None, *, base_only: bool = False) -> Words:
        """Those blocks of the snapshot, in `out` where it is given. References are exact even with base_only."""
        return self.decode_frame(step, blocks, out, {}, base_only)

    def reference(self, step: int, blocks: range, made: dict[int, Words]) -> Words:
        """Those blocks of the snapshot, read-only. `made` holds what the same read has decoded already."""
        if step in made:
            return made[step]
        kept = self.cache.get(step, self)
        if kept is not None:
            return kept[blocks.start * BLOCK : blocks.stop * BLOCK]
        made[step] = self.decode_frame(step, blocks, None, made, False)
        made[step].flags.writeable = False
        if blocks == self.all:
            self.cache.put(step, made[step], self, key=not self.index.frames[step].record.references)
        return made[step]

    def decode_frame(
        self, step: int, blocks: range, out: Words | None, made: dict[int, Words], base_only: bool
    ) -> Words:
        place = self.index.frames[step]
        references = [self.reference(other, blocks, made) for other in place.record.references]
        try:
            frame = self.read_frame(place, blocks)
            return codec.decode(
                frame,
                references,
                blocks=blocks,
                out=out,
                threads=self.threads,
                verify=not base_only,
                base_only=base_only,
            )
        except CodecError as error:
            raise InputError(f"{place.path}: the snapshot of step {step}: {error}") from None

    def read_frame(self, place: Place, blocks: range) -> Bytes:
        """The frame's bytes, with slack behind them; only the head and those blocks are read.

        Raises CodecError unless it is the frame that the index means.
        """
        record, count = place.record, self.schema.count
        least = LEAST_BLOCK_BYTES * len(self.all) + -(-count // TILE)  # before anyone makes room for the weights
        if not least <= record.frame_bytes <= 8 * count + 2**16 + 2**10 * len(self.all):
            raise CodecError(f"{record.frame_bytes} bytes for {count} weights")
        frame = np.empty(record.frame_bytes + SLACK, np.uint8)  # what is not read takes no memory
        most = HEAD_BYTES + 8 * -(-count // TILE) + ENTRY.itemsize * len(self.all)
        begun = record.frame_bytes if blocks == self.all else min(most, record.frame_bytes)
        read_into(frame[:begun], place, record.payload)
        info = codec.read_info(frame[:begun])
        found = (info.bytes, info.count, info.predictor, info.zero_bits)
        wanted = (record.frame_bytes, count, len(record.references), self.schema.zero_bits)
        if found != wanted:
            raise CodecError(f"a frame of (bytes, weights, references, zero bits) {found}, must be {wanted}")
        if begun < record.frame_bytes:
            directory = frame[info.head_bytes - ENTRY.itemsize * info.blocks : info.head_bytes].view(ENTRY)["bytes"]
            begin, end = (info.head_bytes + int(directory[:block].sum()) for block in (blocks.start, blocks.stop))
            read_into(frame[begin:end], place, record.payload + begin)
        return frame

    def read_table(self, place: Place) -> Bytes:
        """What the payload holds behind the frame."""
        record = place.record
        table = np.empty(record.payload_bytes - record.frame_bytes, np.uint8)
        return read_into(table, place, record.payload + record.frame_bytes)

    def bounds(self, step: int) -> Bounds:
        """Those that its record holds, verified."""
        self.check_record(step)
        place = self.index.frames[step]
        try:
            return from_table(self.read_table(place), self.schema)
        except CodecError as error:
            raise InputError(f"{place.path}: the snapshot of step {step}: {error}") from None

    def base_error(self, step: int) -> float:
        """The most that a weight decoded with base_only is off."""
        place = self.index.frames[step]
        try:
            return codec.base_error(self.read_frame(place, self.all))
        except CodecError as error:
            raise InputError(f"{place.path}: the snapshot of step {step}: {error}") from None

    def check_record(self, step: int) -> None:
        """Raise InputError unless the record's bytes are those that were written."""
        place = self.index.frames[step]
        record = place.record
        try:
            payload = read_into(np.empty(record.payload_bytes, np.uint8), place, record.payload)
            if codec.crc32c(payload) != record.payload_crc:
                raise CodecError("a record's payload that changed since it was written")
        except CodecError as error:
            raise InputError(f"{place.path}: the snapshot of step {step}: {error}") from None


def read_into(data: Bytes, place: Place, offset: int) -> Bytes:
    """Fill `data` from the place's file. Raises ChangedError unless the record was the index's when that was done."""
    done, got = 0, 1
    while done < len(data) and got:
        got = os.preadv(place.file.fileno(), [data[done:].data], offset + done)
        done += got
    # now and not before: a writer may cut the file and append another record while the bytes are read
    header = os.pread(place.file.fileno(), HEADER.size, place.record.offset)
    whole = done == len(data) and len(header) == HEADER.size
    if not whole or HEADER.unpack(header)[-1] != place.record.header_crc:
        raise ChangedError(
            f"{place.path}: the snapshot of step {place.record.step}: the file was cut or changed while it was read"
        )
    return data
