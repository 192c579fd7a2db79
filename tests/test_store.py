"""Trajectory files: bit-exact, whole after a kill at any point, and an error for every malformed byte."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from nacd_fast import store
from nacd_fast.errors import InputError
from nacd_fast.store import TrajectoryStore, TrajectoryWriter
from tests.tiny import at_call, run_killed


def snapshot(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator)
        for name, shape in {"b": (3, 5), "a": (65,), "scalar": (), "none": (0, 4)}.items()
    }


def write(folder: Path, steps: list[int]) -> None:
    with TrajectoryWriter(folder) as writer:
        for step in steps:
            writer.append(step, snapshot(step))


def assert_same_bits(x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
    assert list(x) == sorted(y)
    for name in x:
        assert x[name].dtype == torch.float32 and x[name].shape == y[name].shape
        bits = [t.contiguous().view(-1).view(torch.int32) for t in (x[name], y[name])]
        assert torch.equal(*bits)


def test_round_trip_in_any_order(tmp_path: Path) -> None:
    write(tmp_path, [0, 3, 100])
    trajectory = TrajectoryStore(tmp_path)
    assert trajectory.steps == [0, 3, 100] and len(trajectory) == 3
    for step in (100, 0, 3, 100):
        assert_same_bits(trajectory.read(step), snapshot(step))
    start, target = trajectory.read_pair(3, 100)
    assert_same_bits(start, snapshot(3))
    assert_same_bits(target, snapshot(100))


def test_every_bit_pattern_is_kept(tmp_path: Path) -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, -0x80000000, 1, 0x7F800000, -0x800000, 0x7F7FFFFF], dtype=torch.int32)
    odd = {"x": bits.view(torch.float32)}  # NaNs with payload, -0, subnormal, infinities, the largest number
    with TrajectoryWriter(tmp_path) as writer:
        writer.append(0, odd)
    assert_same_bits(TrajectoryStore(tmp_path).read(0), odd)


def test_views_and_strides(tmp_path: Path) -> None:
    flat = torch.arange(12.0)
    views = {"whole": flat, "part": flat[2:8].view(2, 3), "transposed": flat.view(3, 4).T, "strided": flat[::2]}
    with TrajectoryWriter(tmp_path) as writer:
        writer.append(0, views)
    assert_same_bits(TrajectoryStore(tmp_path).read(0), views)


def test_the_writer_takes_up_a_trajectory(tmp_path: Path) -> None:
    write(tmp_path, [0, 1])
    write(tmp_path, [2])
    assert TrajectoryStore(tmp_path).steps == [0, 1, 2]


@pytest.mark.parametrize(("after", "left"), [(-1, []), (0, [0]), (4, [0, 4]), (5, [0, 4]), (99, [0, 4, 8])])
def test_truncate(tmp_path: Path, after: int, left: list[int]) -> None:
    write(tmp_path, [0, 4, 8])
    with TrajectoryWriter(tmp_path) as writer:
        writer.truncate(after)
        assert writer.steps == left
        assert sorted(p.name for p in tmp_path.glob("step*")) == [store.file_name(step) for step in left]
        writer.append(100, snapshot(100))
    assert TrajectoryStore(tmp_path).steps == [*left, 100]


@pytest.mark.parametrize("step", [3, 2, -1, 10**8, True])
def test_steps_must_increase(tmp_path: Path, step: int) -> None:
    write(tmp_path, [3])
    with pytest.raises(InputError, match=r"step.*above the last step 3 and at most 99999999"):
        TrajectoryWriter(tmp_path).append(step, snapshot())
    assert TrajectoryStore(tmp_path).steps == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a"), "tensor a has shape None, in this trajectory it has [65]"),
        (lambda t: t.update(z=torch.zeros(1)), "tensor z has shape [1], in this trajectory it has None"),
        (lambda t: t.update(b=torch.zeros(5, 3)), "tensor b has shape [5, 3], in this trajectory it has [3, 5]"),
        (lambda t: t.update(b=torch.zeros(3, 5).double()), "tensor b is torch.float64, must be torch.float32"),
    ],
)
def test_snapshots_are_alike(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    write(tmp_path, [0])
    other = snapshot(1)
    change(other)
    with pytest.raises(InputError) as caught:
        TrajectoryWriter(tmp_path).append(7, other)
    assert message in str(caught.value) and "step 7" in str(caught.value)
    assert TrajectoryStore(tmp_path).steps == [0]


@pytest.mark.parametrize(
    ("t", "t_end", "message"),
    [
        (5, 8, "no snapshot at step 5; nearest: 4 and 8"),
        (4, 9, "no snapshot at step 9; nearest: 8"),
        (4, -1, "no snapshot at step -1; nearest: 0"),
    ],
)
def test_a_missing_step_names_its_neighbours(tmp_path: Path, t: int, t_end: int, message: str) -> None:
    write(tmp_path, [0, 4, 8])
    with pytest.raises(InputError) as caught:
        TrajectoryStore(tmp_path).read_pair(t, t_end)
    assert str(caught.value) == f"{tmp_path}: {message}"


def test_no_trajectory(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        TrajectoryStore(tmp_path)
    write(tmp_path, [])
    with pytest.raises(InputError, match="no such file"):
        TrajectoryStore(tmp_path)


# Killed while writing


@pytest.mark.parametrize(
    ("calls", "target"), [(0, "write"), (0, "replace"), (0, "sync"), (1, "write"), (1, "replace"), (1, "sync")]
)
def test_a_killed_writer_loses_at_most_its_snapshot(tmp_path: Path, calls: int, target: str) -> None:
    """Killed before one of the six steps of an append: data and index, each written, renamed and synced."""
    write(tmp_path, [0, 1])

    def work() -> None:
        writer = TrajectoryWriter(tmp_path)
        with pytest.MonkeyPatch.context() as patch:
            if target == "write":  # the .part file is there, unfinished; the folder's fsync lies between the two
                patch.setattr(os, "fsync", at_call(2 * calls, os.fsync))
            elif target == "replace":
                patch.setattr(os, "replace", at_call(calls, os.replace))
            else:
                patch.setattr(store, "sync_folder", at_call(calls, store.sync_folder))
            writer.append(2, snapshot(2))

    run_killed(work)
    done = [0, 1, 2] if (calls, target) == (1, "sync") else [0, 1]  # renamed is as good as written
    assert TrajectoryStore(tmp_path).steps == done
    writer = TrajectoryWriter(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {store.INDEX, *map(store.file_name, done)}
    writer.append(3, snapshot(3))
    for step in (*done, 3):
        assert_same_bits(TrajectoryStore(tmp_path).read(step), snapshot(step))


def test_append_reaches_the_disk_before_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("fsync")
        fsync(descriptor)

    def noted_replace(old: Path, new: Path) -> None:
        events.append(new.suffix)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write(tmp_path, [0])
    assert events == ["fsync", ".safetensors", "fsync", "fsync", ".json", "fsync"]


# Hostile bytes


def resign(folder: Path, step: int, data: bytes) -> None:
    """Put other bytes in a snapshot, with a fitting index."""
    (folder / store.file_name(step)).write_bytes(data)
    index = json.loads((folder / store.INDEX).read_text())
    for entry in index["snapshots"]:
        if entry["step"] == step:
            entry.update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (folder / store.INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes, must have"),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes, must have"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1] + b"\1"), "has SHA-256"),
        (lambda p: (p.unlink(), p.mkdir()), "must have"),
        (lambda p: resign(p.parent, 4, b"nonsense" * 9), "is not a safetensors file"),
        (lambda p: resign(p.parent, 4, b"\xff" * 8), "is not a safetensors file"),
        (lambda p: resign(p.parent, 4, b""), "is not a safetensors file"),
        (lambda p: resign(p.parent, 4, save({"a": torch.zeros(65)})), "tensor b has shape None"),
        (lambda p: resign(p.parent, 4, save({**snapshot(4), "b": torch.zeros(5, 3)})), "tensor b has shape [5, 3]"),
        (lambda p: resign(p.parent, 4, save({n: t.half() for n, t in snapshot(4).items()})), "must be torch.float32"),
    ],
)
def test_a_damaged_snapshot(tmp_path: Path, damage: Callable[[Path], object], message: str) -> None:
    write(tmp_path, [0, 4])
    damage(tmp_path / store.file_name(4))
    trajectory = TrajectoryStore(tmp_path)
    assert_same_bits(trajectory.read(0), snapshot(0))
    with pytest.raises(InputError) as caught:
        trajectory.read(4)
    assert message in str(caught.value)
    assert "step00000004.safetensors: the snapshot of step 4" in str(caught.value) and "\n" not in str(caught.value)


def test_snapshots_changed_for_each_other(tmp_path: Path) -> None:
    write(tmp_path, [0, 4])
    a, b = (tmp_path / store.file_name(step) for step in (0, 4))
    data = a.read_bytes(), b.read_bytes()
    a.write_bytes(data[1])
    with pytest.raises(InputError, match="step 0 has SHA-256"):
        TrajectoryStore(tmp_path).read(0)


GOOD: dict[str, Any] = {"version": 1, "tensors": {"a": [2]}, "snapshots": [{"step": 0, "bytes": 1, "sha256": "x"}]}


def entry(**change: Any) -> str:
    return json.dumps({**GOOD, "snapshots": [{"step": 0, "bytes": 1, "sha256": "x", **change}]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
        ("1" * 5000, "not JSON"),
        ("\ud800", "not JSON"),
        ("[]", "keys version, tensors and snapshots"),
        ("null", "keys version"),
        ("{}", "keys version"),
        (json.dumps({**GOOD, "more": 1}), "keys version"),
        (json.dumps({**GOOD, "version": 2}), "version 2, must be 1"),
        (json.dumps({**GOOD, "tensors": []}), "tensors must be"),
        (json.dumps({**GOOD, "tensors": {"a": 2}}), "tensor 'a'"),
        (json.dumps({**GOOD, "tensors": {"a": [-1]}}), "tensor 'a'"),
        (json.dumps({**GOOD, "tensors": {"a": [1e3]}}), "tensor 'a'"),
        (json.dumps({**GOOD, "snapshots": {}}), "snapshots must be"),
        (json.dumps({**GOOD, "snapshots": [1]}), "snapshot 1"),
        (entry(file="../../secret"), "snapshot {"),
        (entry(step=-1), "step -1"),
        (entry(step="0"), "step '0'"),
        (entry(step=True), "step True"),
        (entry(step=10**8), "step 100000000"),
        (entry(bytes=-1), "snapshot {"),
        (entry(sha256=None), "snapshot {"),
        (json.dumps({**GOOD, "snapshots": GOOD["snapshots"] * 2}), "step 0 after step 0"),
    ],
)
@pytest.mark.parametrize("opener", [TrajectoryStore, TrajectoryWriter])
def test_a_damaged_index(tmp_path: Path, text: str, message: str, opener: Callable[[Path], object]) -> None:
    (tmp_path / store.INDEX).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError) as caught:
        opener(tmp_path)
    assert message in str(caught.value) and "index.json" in str(caught.value) and "\n" not in str(caught.value)


def test_the_writer_deletes_nothing_by_a_damaged_index(tmp_path: Path) -> None:
    write(tmp_path, [0, 4])
    (tmp_path / store.INDEX).write_text("{")
    with pytest.raises(InputError):
        TrajectoryWriter(tmp_path)
    assert (tmp_path / store.file_name(4)).exists()
