"""Hostile bytes: every length and every changed byte of a small trajectory, and records that no writer writes."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nacd_fast import codec
from nacd_fast.errors import InputError
from nacd_fast.store import TrajectoryStore, TrajectoryWriter
from nacd_fast.store.index import open_name
from nacd_fast.store.records import FRAME, SCHEMA, SEAL, Bytes, pack
from tests.store.snapshots import Shapes, assert_holds, assert_same_bits, snapshot, write

TINY: Shapes = {"a": (7,), "b": (2, 2)}
GROUP = 2


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Snapshots 0 .. 2 sealed, 3 and 4 in the open file."""
    path = tmp_path / "t.nacd"
    with pytest.raises(KeyboardInterrupt), TrajectoryWriter(path, group=GROUP) as writer:
        for step in range(4):
            writer.append(step, snapshot(step, TINY))
        raise KeyboardInterrupt
    return path


def read_all(path: Path) -> list[int]:
    """The steps; every snapshot is read and compared."""
    with TrajectoryStore(path) as store:
        for step in store.steps:
            assert_same_bits(store.read(step), snapshot(step, TINY))
        return store.steps


def test_every_length_opens_to_the_committed_snapshots(path: Path) -> None:
    write(path, [4, 5], TINY, group=GROUP)
    with TrajectoryStore(path) as store:
        ends = {group.end: group.steps for group in store.index.groups}
    for size in range(path.stat().st_size, -1, -1):
        os.truncate(path, size)
        steps = sorted(step for end, steps in ends.items() if end <= size for step in steps)
        with TrajectoryStore(path) as store:
            assert store.steps == steps
        if size in ends:
            assert read_all(path) == steps


def test_every_length_of_the_open_file(path: Path) -> None:
    with TrajectoryStore(path) as store:
        end = store.index.frames[3].record.end
    assert end == open_name(path).stat().st_size
    for size in range(end, -1, -1):
        os.truncate(open_name(path), size)
        assert read_all(path) == [0, 1, 2, *([3] if size == end else [])]
    write(path, [3, 4], TINY, group=GROUP)
    assert read_all(path) == [0, 1, 2, 3, 4]


def test_lengths_then_appended_to(path: Path) -> None:
    """A writer goes on behind a torn tail as if it had not been there."""
    write(path, [4, 5], TINY, group=GROUP)
    whole = path.read_bytes()
    with TrajectoryStore(path) as store:
        ends = {0, store.index.groups[0].begin, *(group.end for group in store.index.groups)}
    for size in range(0, len(whole), 97):
        path.write_bytes(whole[:size])
        TrajectoryWriter(path, group=GROUP).close()
        assert path.stat().st_size in ends
        with TrajectoryWriter(path, group=GROUP) as writer:
            for step in range(len(writer.steps), 6):
                writer.append(step, snapshot(step, TINY))
        assert path.read_bytes() == whole


@pytest.mark.parametrize("damaged", ["main", "open"])
def test_every_changed_byte_is_an_error_or_changes_nothing(path: Path, damaged: str) -> None:
    file = path if damaged == "main" else open_name(path)
    data, detected = file.read_bytes(), 0
    for at in range(len(data)):
        with open(file, "r+b") as f:
            f.seek(at)
            f.write(bytes([data[at] ^ (1 << at % 8)]))
        try:
            assert read_all(path) == [0, 1, 2, 3]
        except InputError as error:
            assert str(file) in str(error) and "\n" not in str(error)
            detected += 1
        with open(file, "r+b") as f:
            f.seek(at)
            f.write(data[at : at + 1])
    assert detected > 0.9 * len(data)  # the rest is padding
    assert read_all(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("tensor", [torch.ones(20_000), torch.zeros(70_000), torch.full((70_000,), 1e-3).bfloat16()])
def test_a_snapshot_of_one_value(tmp_path: Path, tensor: Tensor) -> None:
    """Its frame has pages of zeros: they are not taken for what a power cut left of the last append."""
    path = tmp_path / "t.nacd"
    with pytest.raises(KeyboardInterrupt), TrajectoryWriter(path) as writer:
        for step in range(2):
            writer.append(step, {"x": tensor})
        writer.append(2, {"x": 3 * tensor})
        writer.truncate(1)
        raise KeyboardInterrupt
    with TrajectoryStore(path) as store:
        first, last = (store.index.frames[step].record for step in (0, 1))
    file = open_name(path)
    data = file.read_bytes()
    assert last.end == len(data)
    for whole in (data[: first.end], data):  # the last record is a key, or like the one before
        record = first if len(whole) == first.end else last
        for at in range(record.offset, record.end, max(1, (record.end - record.offset) // 150)):
            changed = bytearray(whole)
            changed[at] ^= 1 << at % 8
            file.write_bytes(changed)
            with pytest.raises(InputError, match="damaged at byte"):
                TrajectoryStore(path)
        for page in range(record.offset // 4096, (record.end - 1) // 4096 + 1):
            changed = bytearray(whole)
            part = slice(max(4096 * page, record.offset), min(4096 * (page + 1), record.end))
            changed[part] = bytes(part.stop - part.start)
            file.write_bytes(changed)
            with TrajectoryStore(path) as store:
                assert store.steps == list(range(record.step + (changed == whole)))


def test_a_changed_name_is_found(path: Path) -> None:
    """The scan does not verify payloads, and the schema is no frame."""
    path.write_bytes(path.read_bytes().replace(b'"b": [2, 2]', b'"c": [2, 2]'))
    for opener in (TrajectoryStore, TrajectoryWriter):
        with pytest.raises(InputError, match="the record at byte 0: a schema that changed since it was written"):
            opener(path)


def test_verify_finds_what_reading_does(path: Path) -> None:
    data = bytearray(path.read_bytes())
    with TrajectoryStore(path) as store:
        store.verify()
        place = store.index.frames[1].record
        data[place.payload + place.frame_bytes - 1] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match=r"t.nacd: the snapshot of step 1: .*changed since it was written"):
            store.verify()
        for step in (0, 2, 3):
            assert_same_bits(store.read(step), snapshot(step, TINY))


def test_a_frame_at_another_ones_place(path: Path) -> None:
    """A store that was opened before a writer cut the file and went on elsewhere reads what is there now."""
    with TrajectoryStore(path, cache_bytes=0) as store:
        with TrajectoryWriter(path, group=GROUP) as writer:
            writer.truncate(0)
            for step in (1, 2, 3):
                writer.append(step, snapshot(100 * step, TINY))
        for step in (1, 2, 3):
            assert_same_bits(store.read(step), snapshot(100 * step, TINY))


def test_a_reference_with_other_values_is_found(tmp_path: Path) -> None:
    """Were the file put together from two, every block's checksum of the decoded words would tell."""
    write(tmp_path / "t.nacd", range(3), {"a": (2000,)}, group=GROUP)
    with TrajectoryStore(tmp_path / "t.nacd") as store:
        words = store.read_flat(0)
        words ^= np.uint32(1 << 14)
        store.decoder.cache.keys[store.decoder, 0] = words
        with pytest.raises(InputError, match="step 1: decoded words that are not those that were encoded"):
            store.read(1)


# Records that no writer writes

GOOD: dict[str, Any] = {"tensors": {"a": [7], "b": [2, 2]}, "dtype": "float32", "group": 2, "eps": 0}
GOOD["layout"] = "hierarchical"


def put(path: Path, records: Sequence[tuple[int, list[Bytes], dict[str, Any]]]) -> None:
    with open(path, "wb") as f:
        for kind, payload, fields in records:
            for piece in pack(kind, f.tell(), payload, **fields)[1]:
                f.write(bytes(piece))


def schema(data: bytes) -> tuple[int, list[Bytes], dict[str, Any]]:
    return SCHEMA, [np.frombuffer(data, np.uint8)], {}


def frame(step: int, *references: int, count: int = 11) -> tuple[int, list[Bytes], dict[str, Any]]:
    words = np.zeros(count, np.uint32)
    return FRAME, [codec.encode(words, [words] * len(references)).data], {"step": step, "references": references}


def seal(step: int) -> tuple[int, list[Bytes], dict[str, Any]]:
    return SEAL, [], {"step": step}


START = schema(json.dumps(GOOD).encode())


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([START, START], "one schema, at its begin"),
        ([seal(0)], "one schema, at its begin"),
        ([frame(0), START], "one schema, at its begin"),
        ([START, seal(0)], "a seal of step 0, must be the last one"),
        ([START, frame(0), seal(1)], "a seal of step 1, must be the last one"),
        ([START, frame(0), frame(0), seal(0)], "step 0 after step 0"),
        ([START, frame(4), seal(4), frame(3), seal(3)], "step 3 after step 4"),
        ([START, frame(4, 4), seal(4)], "step 4 is coded against step 4, which is not there"),
        ([START, frame(4, 5), frame(5), seal(5)], "step 4 is coded against step 5, which is not there"),
        (
            [START, frame(0), *(frame(i, i - 1) for i in range(1, 6)), seal(5)],
            "step 5 is 6 frames deep, must be at most 5",
        ),
    ],
)
@pytest.mark.parametrize("opener", [TrajectoryStore, TrajectoryWriter])
def test_records_in_another_order(tmp_path: Path, records: list, message: str, opener: type) -> None:
    put(tmp_path / "x", records)
    before = (tmp_path / "x").read_bytes()
    with pytest.raises(InputError) as caught:
        opener(tmp_path / "x")
    assert message in str(caught.value) and (tmp_path / "x").read_bytes() == before


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([schema(b"{}")], "an open group has frames alone"),
        ([frame(3), frame(3)], "step 3 after step 3"),
        ([frame(3, 1)], "step 3 is coded against step 1, which is not there"),
    ],
)
def test_an_open_file_that_does_not_fit(tmp_path: Path, records: list, message: str) -> None:
    put(tmp_path / "x", [START, frame(0), seal(0)])
    put(tmp_path / "x.open", records)
    with pytest.raises(InputError) as caught:
        TrajectoryStore(tmp_path / "x")
    assert message in str(caught.value) and "x.open" in str(caught.value)


def test_an_open_file_alone(tmp_path: Path) -> None:
    put(tmp_path / "x", [])
    put(tmp_path / "x.open", [frame(0)])
    for opener in (TrajectoryStore, TrajectoryWriter):
        with pytest.raises(InputError, match=r"no schema, but x\.open has snapshots"):
            opener(tmp_path / "x")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (frame(0, count=12), r"\(bytes, weights, references, zero bits\) .*, 12, 0, 0\), must be"),
        ((FRAME, frame(0, 1)[1], {"step": 0}), r"\(bytes, .*, 11, 1, 0\), must be .*, 11, 0, 0\)"),
        ((FRAME, [np.zeros(400, np.uint8)], {"step": 0}), "step 0: not a frame"),
        ((FRAME, [np.zeros(2**18, np.uint8)], {"step": 0}), "step 0: 262144 bytes for 11 weights"),
        ((FRAME, [np.append(frame(0)[1][0], np.uint8(0))], {"step": 0}), r"must be \("),
    ],
)
def test_a_record_with_another_frame(tmp_path: Path, record: Any, message: str) -> None:
    put(tmp_path / "x", [START, record, seal(0)])
    with TrajectoryStore(tmp_path / "x") as store, pytest.raises(InputError, match=message):
        store.read(0)


def other(**change: Any) -> bytes:
    return json.dumps({**GOOD, **change}).encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[" * 10**5, "not JSON"),
        (b"1" * 5000, "not JSON"),
        (b"\xff", "not JSON"),
        (b"[]", "other keys than"),
        (b"{}", "other keys than"),
        (other(more=1), "other keys than"),
        (other(tensors=[]), "tensors that are no object"),
        (other(tensors={"a": 2}), "tensor 'a'"),
        (other(tensors={"a": [-1]}), "tensor 'a'"),
        (other(tensors={"a": [1e3]}), "tensor 'a'"),
        (other(tensors={"a": [True]}), "tensor 'a'"),
        (other(tensors={"a": [1] * 65}), "tensor 'a'"),
        (other(tensors={"b": [1], "a": [1]}), "names that are not sorted"),
        (other(tensors={"a": [2**21, 2**21]}), "more weights than a frame holds"),
        (other(dtype="float64"), "dtype 'float64'"),
        (other(dtype=[]), "dtype []"),
        (other(layout="deep"), "layout 'deep'"),
        (other(group=9), "group 9"),
        (other(group=0), "group 0"),
        (other(eps=float("nan")), "eps nan"),
        (other(eps="0"), "eps '0'"),
    ],
)
def test_a_schema_that_no_writer_writes(tmp_path: Path, data: bytes, message: str) -> None:
    put(tmp_path / "x", [schema(data)])
    with pytest.raises(InputError) as caught:
        TrajectoryStore(tmp_path / "x")
    assert message in str(caught.value) and "x: the schema" in str(caught.value) and "\n" not in str(caught.value)


def test_no_trajectory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"t\.nacd: no such file"):
        TrajectoryStore(tmp_path / "t.nacd")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        TrajectoryStore(tmp_path)
    write(tmp_path / "t.nacd", [])
    assert_holds(tmp_path / "t.nacd", [])
