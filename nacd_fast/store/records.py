"""The records that a trajectory file is made of: their bytes, and the scan that finds them.

csrc/FORMAT.md, "File", describes them; csrc/records.cpp holds the same scan. A record is on the disk before the next
one is begun, so only the end of a file can be torn: there a scan stops and says so. Anything else is damage.
"""

import os
import struct
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .. import native
from ..codec import crc32c
from ..errors import InputError

MAGIC, VERSION = int.from_bytes(b"NREC", "little"), 1
SCHEMA, FRAME, SEAL = 1, 2, 3
NO_STEP = 2**64 - 1
MAX_PAYLOAD_BYTES, MAX_STEP = 2**44, 2**62
COMMIT = 0x74696D6D6F63A55A  # mixed into the commit word, so that it is not zero
COMMIT_BYTES, PAGE = 8, 4096
FIND_BYTES = 2**20

HEADER = struct.Struct("<IHBBQQQQQQQII")
FIELDS = struct.Struct("<IHBBQQQQQQQI")  # those that the header's checksum covers

Bytes = NDArray[np.uint8]

TORN = "a record that was not written to its end"
UNREADABLE = "bytes that cannot be read"


@dataclass(frozen=True)
class Record:
    offset: int  # of its header in the file
    kind: int
    step: int
    references: tuple[int, ...]  # steps, none but in frames
    frame_bytes: int  # of the payload, which the frame begins
    payload_bytes: int
    payload_crc: int
    header_crc: int

    @property
    def payload(self) -> int:
        """Where in the file the payload begins."""
        return self.offset + HEADER.size

    @property
    def end(self) -> int:
        return self.offset + record_bytes(self.payload_bytes)


def record_bytes(payload_bytes: int) -> int:
    return HEADER.size + (payload_bytes + 7) // 8 * 8 + COMMIT_BYTES


def pack(
    kind: int, offset: int, payload: Sequence[Bytes], *, step: int = 0, references: Sequence[int] = ()
) -> tuple[Record, list[bytes | Bytes]]:
    """A record at `offset`, and its bytes in pieces, to be written one behind the other; the payload is not copied.

    The first piece of a frame's payload is the frame.
    """
    payload_bytes, payload_crc = sum(len(piece) for piece in payload), 0
    for piece in payload:
        payload_crc = crc32c(piece, payload_crc)
    frame_bytes = len(payload[0]) if kind == FRAME else 0
    ref_a, ref_b = (*references, NO_STEP, NO_STEP)[:2]
    zeros = zero_pages(payload, offset + HEADER.size)
    fields = FIELDS.pack(
        MAGIC, VERSION, kind, 0, offset, payload_bytes, frame_bytes, step, ref_a, ref_b, zeros, payload_crc
    )
    header_crc = crc32c(np.frombuffer(fields, np.uint8))
    tail = bytes(-payload_bytes % 8) + struct.pack("<Q", (payload_crc << 32 | header_crc) ^ COMMIT)
    record = Record(offset, kind, step, tuple(references), frame_bytes, payload_bytes, payload_crc, header_crc)
    return record, [fields + struct.pack("<I", header_crc), *payload, tail]


def zero_pages(payload: Sequence[Bytes], begin: int) -> int:
    """The file's whole pages that a payload from byte `begin` on, and the zeros behind it, fill with zeros alone."""
    size = sum(len(piece) for piece in payload)
    first, end = begin // PAGE, begin + (size + 7) // 8 * 8
    nonzero, at = np.zeros(end // PAGE + 1 - first, np.bool_), begin
    for piece in payload:
        if len(piece):
            starts = np.append(0, np.arange(PAGE - at % PAGE, len(piece), PAGE))  # of the pages' parts in it
            nonzero[(at + starts) // PAGE - first] |= np.maximum.reduceat(piece, starts) > 0
        at += len(piece)
    return int(np.count_nonzero(~nonzero[1 if begin % PAGE else 0 : end // PAGE - first]))


def scan(descriptor: int, path: Path, lasting: int) -> list[Record]:
    """The whole records of the open file. Raises InputError, naming `path` and the place, where bytes are damaged.

    lasting: the kind that is not begun before all in front of it is on the disk: none lies behind a torn record.
    """
    file_bytes = os.fstat(descriptor).st_size
    module = None if os.environ.get("NACD_CODEC") == "reference" else native.load()
    if module is None:
        records, end, error = scan_reference(descriptor, file_bytes)
    else:
        found, end, status, sentence = module.scan(descriptor, file_bytes)
        records, error = [to_record(*fields) for fields in found], sentence if status else ""
    if error == TORN and find(descriptor, end + 8, file_bytes, lasting):
        error = "a hole in front of records that were written later"
    if error not in ("", TORN):
        raise InputError(f"{path}: damaged at byte {end}: {error}")
    return records


def to_record(
    offset: int,
    kind: int,
    step: int,
    ref_a: int,
    ref_b: int,
    frame_bytes: int,
    payload_bytes: int,
    payload_crc: int,
    header_crc: int,
) -> Record:
    references = tuple(step for step in (ref_a, ref_b) if step != NO_STEP)
    return Record(offset, kind, step, references, frame_bytes, payload_bytes, payload_crc, header_crc)


def find(descriptor: int, begin: int, end: int, kind: int) -> bool:
    """Whether a record's header of that kind lies in [begin, end)."""
    wanted = struct.pack("<IHB", MAGIC, VERSION, kind)
    while begin < end:
        chunk, at = os.pread(descriptor, FIND_BYTES, begin), -1
        while (at := chunk.find(wanted, at + 1)) >= 0:
            with suppress(Damage, struct.error):  # the chunk may end in a header: the next one begins with it
                check_header(chunk[at : at + HEADER.size], begin + at)
                return True
        begin += max(FIND_BYTES - HEADER.size, 8)
    return False


# The scan in Python: the reference for the native one, and what runs where that was not built.


class Damage(Exception):
    """Why no record can be read; the message is the native scan's sentence."""


def read_at(descriptor: int, offset: int, size: int) -> bytes:
    pieces = b""
    while len(pieces) < size:
        piece = os.pread(descriptor, size - len(pieces), offset + len(pieces))
        if not piece:
            raise Damage(UNREADABLE)
        pieces += piece
    return pieces


def zero_parts(descriptor: int, begin: int, end: int) -> int:
    """The pages whose part of [begin, end) is all zeros: those that were never written, and those of zeros."""
    parts = 0
    while begin < end:
        size = min(end - begin, PAGE - begin % PAGE)
        parts += not any(read_at(descriptor, begin, size))
        begin += size
    return parts


def has_hole(descriptor: int, record: Record) -> bool:
    """Whether a page of the record was never written; its header was."""
    zeros = HEADER.unpack(read_at(descriptor, record.offset, HEADER.size))[-3]
    return zero_parts(descriptor, record.offset, record.end) > zeros


def check_header(header: bytes, offset: int) -> Record:
    fields = HEADER.unpack(header)
    magic, version, kind, reserved, place, payload_bytes, frame_bytes, step, ref_a, ref_b = fields[:10]
    zeros, payload_crc, header_crc = fields[10:]
    if magic != MAGIC:
        raise Damage("not a record")
    if version != VERSION:
        raise Damage("a record of a version that this build does not read")
    if crc32c(np.frombuffer(header, np.uint8)[: FIELDS.size]) != header_crc:
        raise Damage("a record's header that changed since it was written")
    ok = kind in (SCHEMA, FRAME, SEAL) and reserved == 0 and place == offset and step <= MAX_STEP
    ok = ok and frame_bytes <= payload_bytes <= MAX_PAYLOAD_BYTES
    ok = ok and zeros <= (payload_bytes + 7) // 8 * 8 // PAGE
    ok = ok and (kind == FRAME or (frame_bytes == 0 and ref_a == NO_STEP))
    if not ok or (ref_a == NO_STEP and ref_b != NO_STEP):
        raise Damage("a record's field outside its limits")
    return to_record(offset, kind, step, ref_a, ref_b, frame_bytes, payload_bytes, payload_crc, header_crc)


def read_record(descriptor: int, offset: int, file_bytes: int) -> Record:
    left = file_bytes - offset
    header = read_at(descriptor, offset, min(left, HEADER.size))
    if left < HEADER.size:
        begun = MAGIC.to_bytes(4, "little").startswith(header[:4])
        raise Damage(TORN if begun or zero_parts(descriptor, offset, file_bytes) else "not a record")
    try:
        record = check_header(header, offset)
    except Damage:
        if zero_parts(descriptor, offset, offset + HEADER.size):
            raise Damage(TORN) from None
        raise
    if record.end > file_bytes:
        raise Damage(TORN)
    (commit,) = struct.unpack("<Q", read_at(descriptor, record.end - COMMIT_BYTES, COMMIT_BYTES))
    if commit != (record.payload_crc << 32 | record.header_crc) ^ COMMIT:
        torn = has_hole(descriptor, record)
        raise Damage(TORN if torn else "a commit word that is not its record's")
    return record


def check_payload(descriptor: int, record: Record) -> None:
    """Raises Damage unless payload and padding are those that were written."""
    data = read_at(descriptor, record.payload, record.end - COMMIT_BYTES - record.payload)
    payload = np.frombuffer(data, np.uint8)[: record.payload_bytes]
    if crc32c(payload) != record.payload_crc or any(data[record.payload_bytes :]):
        torn = has_hole(descriptor, record)
        raise Damage(TORN if torn else "a record's payload that changed since it was written")


def scan_reference(descriptor: int, file_bytes: int) -> tuple[list[Record], int, str]:
    """The whole records, the end of the last one, and why the scan stopped there: "" at the end of the file."""
    records: list[Record] = []
    end, why = 0, ""
    while end < file_bytes:
        try:
            records.append(read_record(descriptor, end, file_bytes))
        except Damage as damage:
            why = str(damage)
            break
        end = records[-1].end
    try:
        if records:
            check_payload(descriptor, records[-1])
    except Damage as damage:
        return records[:-1], records[-1].offset, str(damage)
    return records, end, why
