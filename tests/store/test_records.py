"""Records: what a scan finds in whole, torn and damaged files, natively and in Python."""

import os
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacd_fast import native
from nacd_fast.codec import crc32c
from nacd_fast.errors import InputError
from nacd_fast.store import records
from nacd_fast.store.records import FRAME, PAGE, SCHEMA, SEAL, TORN, Bytes, Record, pack, scan, scan_reference


def payload(n: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(1, 256, n, np.uint8)


def make(path: Path) -> list[Record]:
    """A schema, three frames of ragged sizes, a seal."""
    kinds: list[tuple[int, list[Bytes], dict[str, Any]]] = [
        (SCHEMA, [payload(9)], {}),
        (FRAME, [payload(64), payload(5)], {"step": 7}),
        (FRAME, [payload(1)], {"step": 8, "references": (7,)}),
        (FRAME, [payload(0)], {"step": 9, "references": (8, 7)}),
        (SEAL, [], {"step": 9}),
    ]
    made: list[Record] = []
    with open(path, "wb") as f:
        for kind, data, fields in kinds:
            record, pieces = pack(kind, f.tell(), data, **fields)
            f.write(b"".join(bytes(piece) for piece in pieces))
            assert f.tell() == record.end and record.end % 8 == 0
            made.append(record)
    return made


def both(path: Path) -> tuple[list[Record], int, str]:
    """What the scan finds; the native one and the one in Python agree."""
    module = native.load()
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        found = scan_reference(f.fileno(), size)
        if module is not None:
            tuples, end, status, sentence = module.scan(f.fileno(), size)
            assert ([records.to_record(*t) for t in tuples], end, sentence if status else "") == found
    return found


def test_a_whole_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(tmp_path / "x")
    assert both(tmp_path / "x") == (made, made[-1].end, "")
    assert [r.references for r in made] == [(), (), (7,), (8, 7), ()]
    assert [(r.frame_bytes, r.payload_bytes) for r in made] == [(0, 9), (64, 69), (1, 1), (0, 0), (0, 0)]
    with open(tmp_path / "x", "rb") as f:
        assert scan(f.fileno(), tmp_path / "x", SEAL) == made
        monkeypatch.setenv("NACD_CODEC", "reference")
        assert scan(f.fileno(), tmp_path / "x", SEAL) == made


def test_every_length_ends_in_a_torn_record(tmp_path: Path) -> None:
    made = make(tmp_path / "x")
    for size in range(made[-1].end, -1, -1):
        os.truncate(tmp_path / "x", size)
        whole = [r for r in made if r.end <= size]
        end = whole[-1].end if whole else 0
        assert both(tmp_path / "x") == (whole, end, "" if end == size else TORN)


def test_every_damaged_byte_that_counts_is_found(tmp_path: Path) -> None:
    made = make(tmp_path / "x")
    data = (tmp_path / "x").read_bytes()
    for at in range(len(data)):
        (tmp_path / "x").write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
        found, end, error = both(tmp_path / "x")
        record = next(r for r in made if at < r.end)
        if record.payload <= at < record.end - records.COMMIT_BYTES:
            assert found == made and not error  # a frame's payload has checksums of its own
        else:
            assert end == record.offset and error not in ("", TORN)


def changed(header: bytes, at: int, field: str, value: int) -> bytes:
    """A header with another field and a fitting checksum."""
    data = bytearray(header)
    struct.pack_into(field, data, at, value)
    struct.pack_into("<I", data, 68, crc32c(np.frombuffer(bytes(data[:68]), np.uint8)))
    return bytes(data)


@pytest.mark.parametrize(
    ("at", "field", "value", "error"),
    [
        (0, "<I", 1, "not a record"),
        (4, "<H", 2, "a record of a version that this build does not read"),
        (6, "<B", 0, "a record's field outside its limits"),
        (6, "<B", 4, "a record's field outside its limits"),
        (6, "<B", SEAL, "a record's field outside its limits"),  # which has no frame and no references
        (7, "<B", 1, "a record's field outside its limits"),
        (8, "<Q", 8, "a record's field outside its limits"),
        (16, "<Q", 2**63, "a record's field outside its limits"),
        (24, "<Q", 2, "a record's field outside its limits"),
        (32, "<Q", 2**63, "a record's field outside its limits"),
        (40, "<Q", records.NO_STEP, "a record's field outside its limits"),
        (16, "<Q", 2**40, TORN),
        (56, "<Q", 1, "a record's field outside its limits"),
        (64, "<I", 1, "a commit word that is not its record's"),
    ],
)
def test_a_header_that_no_writer_writes(tmp_path: Path, at: int, field: str, value: int, error: str) -> None:
    _, pieces = pack(FRAME, 0, [payload(1)], step=9, references=(8, 7))
    rest = b"".join(bytes(piece) for piece in pieces[1:])
    (tmp_path / "x").write_bytes(changed(bytes(pieces[0]), at, field, value) + rest)
    assert both(tmp_path / "x") == ([], 0, error)


@pytest.mark.parametrize("at", [0, 68, 69, 71])
def test_the_last_payload_is_checked(tmp_path: Path, at: int) -> None:
    """And the zeros behind it."""
    made = make(tmp_path / "x")
    os.truncate(tmp_path / "x", made[1].end)
    with open(tmp_path / "x", "r+b") as f:
        f.seek(made[1].payload + at)
        f.write(b"\x80" if at >= made[1].payload_bytes else b"\0")
    assert both(tmp_path / "x") == (made[:1], made[1].offset, "a record's payload that changed since it was written")
    with open(tmp_path / "x", "rb") as f, pytest.raises(InputError, match=r"x: damaged at byte 96: .*payload"):
        scan(f.fileno(), tmp_path / "x", SEAL)


@pytest.mark.parametrize("page", range(4))
def test_a_page_that_was_never_written_is_a_torn_tail(tmp_path: Path, page: int) -> None:
    """After a power cut, any page of the last record may be zeros: its header's, its payload's, its commit word's."""
    first, head = pack(FRAME, 0, [payload(PAGE - 72 - 64 - 40)], step=1)
    last, tail = pack(FRAME, first.end, [payload(3 * PAGE - 80)], step=2)
    data = bytearray(b"".join(bytes(piece) for piece in [*head, *tail]))
    begin = max(page * PAGE, first.end)
    assert first.end < PAGE and last.end > 3 * PAGE
    data[begin : (page + 1) * PAGE] = bytes(len(data[begin : (page + 1) * PAGE]))
    (tmp_path / "x").write_bytes(data)
    assert both(tmp_path / "x") == ([first], first.end, TORN)


@pytest.mark.parametrize("begin", [0, PAGE - 72, PAGE - 8, 2 * PAGE - 80])
@pytest.mark.parametrize("size", [PAGE - 80, PAGE, 3 * PAGE - 1, 5 * PAGE + 9])
def test_pages_of_zeros_that_were_written(tmp_path: Path, begin: int, size: int) -> None:
    """They are no hole: where they are all there is, damage is told. One page more of zeros is a hole."""
    zeros, last = np.zeros(size, np.uint8), payload(9)
    first, head = pack(FRAME, 0, [payload(begin // 8 * 8)], step=1)
    for data in ([zeros], [zeros, last], [last, zeros[: size // 2], zeros[size // 2 :]], [payload(PAGE), zeros, last]):
        record, tail = pack(FRAME, first.end, data, step=2)
        packed = b"".join(bytes(piece) for piece in [*head, *tail])
        path = tmp_path / "x"
        path.write_bytes(packed)
        assert both(path) == ([first, record], record.end, "")
        for at in {record.payload, (record.payload + record.end) // 2, record.end - 9, record.end - 8, record.end - 1}:
            changed = bytearray(packed)
            changed[at] ^= 0x80
            path.write_bytes(changed)
            found, end, error = both(path)
            assert ((found, end) == ([first], first.end) and "payload" in error) or "commit" in error
        for page in range(first.end // PAGE, (record.end - 1) // PAGE + 1):
            changed = bytearray(packed)
            part = slice(max(page * PAGE, first.end), min((page + 1) * PAGE, record.end))
            changed[part] = bytes(part.stop - part.start)
            path.write_bytes(changed)
            assert both(path) == (
                ([first, record], record.end, "") if changed == packed else ([first], first.end, TORN)
            )


@pytest.mark.parametrize("size", [1, PAGE, 2**20, 2**20 + 8, 3 * 2**20])
def test_a_hole_in_front_of_what_lasts_is_damage(tmp_path: Path, size: int) -> None:
    """A seal is begun when all before it is on the disk; a frame may be while other frames of its group are not."""
    first, head = pack(FRAME, 0, [payload(PAGE + size)], step=1)
    _, frame = pack(FRAME, first.end, [payload(9)], step=2)
    path = tmp_path / "x"
    path.write_bytes(b"".join(bytes(piece) for piece in [*head, *frame]))
    os.pwrite(fd := os.open(path, os.O_RDWR), bytes(PAGE), 0)
    assert scan(fd, path, SEAL) == []
    with pytest.raises(InputError, match="damaged at byte 0: a hole in front of records that were written later"):
        scan(fd, path, FRAME)
    os.close(fd)


@pytest.mark.parametrize("text", ["a", "NRE", "step,loss\n", "x" * 999])
def test_another_kind_of_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "x").write_text(text)
    assert both(tmp_path / "x") == ([], 0, TORN if text == "NRE" else "not a record")


def test_both_scans_agree_on_noise(tmp_path: Path) -> None:
    make(tmp_path / "x")
    data, draw = (tmp_path / "x").read_bytes(), random.Random(0)
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(draw.randrange(1, 4)):
            begin = draw.randrange(len(data))
            size = draw.choice([1, 1, 8, 64])
            changed[begin : begin + size] = draw.choice([bytes(size), draw.randbytes(size), b"", data[:size]])
        (tmp_path / "x").write_bytes(changed)
        both(tmp_path / "x")
