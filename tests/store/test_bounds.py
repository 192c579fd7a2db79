"""The bounded-error mode: every weight within its tensor's bound, the bound recorded, values for good."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nacd_fast.codec import CodecError
from nacd_fast.errors import InputError
from nacd_fast.store import TrajectoryStore, TrajectoryWriter, writer
from nacd_fast.store.bounds import from_table, runs_of
from nacd_fast.store.schema import Schema
from tests.store.snapshots import Shapes, assert_same_bits, snapshot

SHAPES: Shapes = {"a": (3000,), "b": (40, 13), "c": (), "d": (512,), "e": (0,)}


def rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("eps", [0.5, 0.01])
def test_every_weight_is_within_its_bound(tmp_path: Path, eps: float) -> None:
    path = tmp_path / "t.nacd"
    written = {step: snapshot(step, SHAPES) for step in range(0, 36, 2)}
    for step, tensors in written.items():
        tensors["d"] = written[step // 4 * 4]["d"].clone()  # changes at every other snapshot
    with TrajectoryWriter(path, eps=eps) as writer:
        for step, tensors in written.items():
            writer.append(step, tensors)
            if step == 24:
                with TrajectoryStore(path) as store:
                    while_open = {at: store.read(at) for at in store.steps}
    with TrajectoryStore(path) as store:
        read = {step: store.read(step) for step in store.steps}
        bounds = {step: store.bounds(step) for step in store.steps}
        store.verify()
    for step, tensors in while_open.items():
        assert_same_bits(read[step], tensors)  # sealing changed nothing
    assert set(bounds[0].values()) == {0.0}
    assert_same_bits(read[0], written[0])
    lossy = 0
    for step in list(written)[1:]:
        for name in ("a", "c", "d"):
            error = (read[step][name].double() - written[step][name].double()).abs().max()
            assert error <= bounds[step][name], (step, name)
            assert bounds[step][name] == pytest.approx(eps * rms(written[step][name] - read[step - 2][name]), rel=1e-5)
            lossy += int(error > 0)
        if step % 4:  # what is left of d's change is the error of the snapshot before
            assert bounds[step]["d"] <= eps * bounds[step - 2]["d"]
        b = (read[step]["b"] - written[step]["b"])[written[step]["b"].isfinite()]
        assert bounds[step]["b"] == 0 and not b.any()  # with NaN and infinity in it: lossless
    assert lossy > 15


def test_a_seal_keeps_what_was_kept_exactly(tmp_path: Path) -> None:
    """Behind an infinite reference tiles are raw, whatever the bound; the seal has other references."""
    path = tmp_path / "t.nacd"
    with TrajectoryWriter(path, eps=0.1) as writer:
        for step in range(6):
            tensors = snapshot(step, {"a": (500,)})
            tensors["a"][0] = float("inf") if step == 1 else 0.0
            writer.append(step, tensors)
        with TrajectoryStore(path) as store:
            before = {step: store.read(step) for step in store.steps}
            assert store.bounds(3)["a"] > 0
    assert_same_bits(before[3], {"a": snapshot(3, {"a": (500,)})["a"].index_fill(0, torch.tensor([0]), 0.0)})
    with TrajectoryStore(path) as store:
        for step, tensors in before.items():
            assert_same_bits(store.read(step), tensors)


def test_values_outlive_cuts_and_other_sessions(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    shapes: Shapes = {"a": (3000,)}
    with TrajectoryWriter(path, eps=0.1) as writer:
        for step in range(12):
            writer.append(step, snapshot(step, shapes))
    with TrajectoryStore(path) as store:
        before = {step: (store.read(step), store.bounds(step)) for step in range(6)}
    with TrajectoryWriter(path, eps=0.1) as writer:
        writer.truncate(5)
        with TrajectoryStore(path) as store:
            for step, (tensors, bounds) in before.items():
                assert_same_bits(store.read(step), tensors)
                assert store.bounds(step) == bounds
        for step in range(6, 12):
            writer.append(step, snapshot(step, shapes))
    with TrajectoryWriter(tmp_path / "whole", eps=0.1) as writer:
        for step in range(12):
            writer.append(step, snapshot(step, shapes))
    assert (tmp_path / "whole").read_bytes() == path.read_bytes()


def test_it_is_smaller(tmp_path: Path) -> None:
    for eps in (0.0, 0.1):
        with TrajectoryWriter(tmp_path / f"{eps}", eps=eps) as writer:
            for step in range(9):
                writer.append(step, snapshot(step, {"a": (20_000,)}))
    assert (tmp_path / "0.1").stat().st_size < 0.6 * (tmp_path / "0.0").stat().st_size


def test_a_tile_in_two_tensors_takes_the_smaller_bound() -> None:
    schema = Schema({"a": [700], "b": [900], "c": [10], "d": [2000]}, "float32", "fast", 8, 0.1)
    runs = runs_of(np.array([0.5, 0.25, 0.0, 0.25], np.float32), schema, exact=False)
    # tiles: 0 a, 1 a and b, 2 b, 3 b, c and d, 4 .. 7 d
    assert [(first, bound) for first, _, bound in runs] == [(0, 0.5), (1, 0.25), (3, 0.0), (4, 0.25)]
    assert all(step <= 2 * bound for _, step, bound in runs if bound)
    assert [bound for *_, bound in runs_of(np.array([0.5, 0, 0, 0], np.float32), schema, exact=True)] == [0, 0]
    assert runs_of(np.zeros(4, np.float32), schema, exact=False) == []


def test_a_table_that_does_not_fit(tmp_path: Path) -> None:
    schema = Schema({"a": [1], "b": [1]}, "float32", "fast", 8, 0.1)
    assert from_table(np.empty(0, np.uint8), schema).tolist() == [0, 0]
    with pytest.raises(CodecError, match="7 bytes of bounds for 2 tensors"):
        from_table(np.zeros(7, np.uint8), schema)
    for bad in (np.nan, np.inf, -1e-3):
        with pytest.raises(CodecError, match="no sizes of errors"):
            from_table(np.array([1e-3, bad], "<f4").view(np.uint8), schema)


def test_a_changed_bound_is_found(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    with TrajectoryWriter(path, eps=0.1) as writer:
        for step in range(3):
            writer.append(step, {"a": torch.full((9,), float(step))})
    with TrajectoryStore(path) as store:
        record = store.index.frames[1].record
        assert record.payload_bytes == record.frame_bytes + 4
        data = bytearray(path.read_bytes())
        data[record.payload + record.frame_bytes] ^= 1
        path.write_bytes(data)
        with pytest.raises(InputError, match="step 1: a record's payload that changed"):
            store.bounds(1)


def test_verify_reads_the_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.nacd"
    monkeypatch.setattr(writer, "to_table", lambda bounds: np.full(3, 255, np.uint8) if bounds.any() else bounds[:0])
    with TrajectoryWriter(path, eps=0.1) as made:
        for step in range(2):
            made.append(step, {"a": torch.full((9,), float(step))})
        with TrajectoryStore(path) as store:
            for read in (store.verify, lambda: store.bounds(1)):
                with pytest.raises(InputError, match=r"open: the snapshot of step 1: 3 bytes of bounds for 1 tensors"):
                    read()
        made._release()
