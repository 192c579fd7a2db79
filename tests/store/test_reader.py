"""Reading: any order, any part, into any tensor, from any thread, while a writer appends."""

import os
import signal
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nacd_fast import codec
from nacd_fast.errors import InputError
from nacd_fast.store import TrajectoryStore, TrajectoryWriter, reader
from nacd_fast.store.decoder import FrameCache
from nacd_fast.store.files import write_at
from nacd_fast.store.index import read_index
from nacd_fast.store.reader import runs_of_blocks
from nacd_fast.store.records import FRAME, SCHEMA, SEAL, pack
from nacd_fast.store.schema import Schema
from tests.store.snapshots import SHAPES, WIDE, assert_holds, assert_same_bits, snapshot, write


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "t.nacd"
    write(path, range(10), WIDE)
    return path


def watch_decode(patch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of blocks of all decoded frames from now on."""
    decode, blocks = codec.decode, []

    def watched(*args: Any, **options: Any) -> Any:
        blocks.append(len(options["blocks"]))
        return decode(*args, **options)

    patch.setattr(codec, "decode", watched)
    return blocks


def test_round_trip_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    steps = [0, 3, 100, *range(200, 220)]
    write(path, steps)
    with TrajectoryStore(path) as store:
        assert store.steps == steps and len(store) == len(steps)
        for step in (100, 0, 219, 3, 204, 100, *reversed(steps)):
            assert_same_bits(store.read(step), snapshot(step))
        start, target = store.read_pair(3, 100)
        assert_same_bits(start, snapshot(3))
        assert_same_bits(target, snapshot(100))
        store.verify()


# every 16th pattern or so is special: small numbers make zeros, subnormals and NaNs with payloads likely
WORDS = st.one_of(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1 << 31, 0x7F800000, 0xFF800000]),
    st.integers(0x7F800000, 0x7F80FFFF),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=hnp.arrays(np.uint32, st.tuples(st.integers(1, 11), st.sampled_from([1, 2, 63, 513, 1025])), elements=WORDS),
    group=st.integers(1, 8),
    layout=st.sampled_from(["hierarchical", "fast"]),
)
def test_every_bit_pattern_is_kept(
    tmp_path_factory: pytest.TempPathFactory, words: np.ndarray, group: int, layout: str
) -> None:
    path = tmp_path_factory.mktemp("bits") / "t.nacd"
    rows = torch.from_numpy(words.view(np.int32)).view(torch.float32)
    with TrajectoryWriter(path, layout=layout, group=group) as writer:
        for step, row in enumerate(rows):
            writer.append(step, {"x": row})
        with TrajectoryStore(path) as store:
            assert all(np.array_equal(store.read_flat(step), row) for step, row in enumerate(words))
    with TrajectoryStore(path) as store:
        assert all(np.array_equal(store.read_flat(step), row) for step, row in enumerate(words))


@pytest.mark.parametrize(
    ("t", "t_end", "message"),
    [
        (5, 8, "no snapshot at step 5; nearest: 4 and 8"),
        (4, 9, "no snapshot at step 9; nearest: 8"),
        (4, -1, "no snapshot at step -1; nearest: 0"),
    ],
)
def test_a_missing_step_names_its_neighbours(tmp_path: Path, t: int, t_end: int, message: str) -> None:
    path = tmp_path / "t.nacd"
    write(path, [0, 4, 8])
    with TrajectoryStore(path) as store, pytest.raises(InputError) as caught:
        store.read_pair(t, t_end)
    assert str(caught.value) == f"{path}: {message}"


# Parts


@pytest.mark.parametrize(
    ("tensors", "names", "blocks"),
    [
        (None, ["a", "b", "c", "d"], 4),
        (["a"], ["a"], 2),
        (["b"], ["b"], 2),
        (["c"], ["c"], 1),
        (["d", "a"], ["a", "d"], 4),
        (["c", "b", "c"], ["b", "c"], 2),
        ([""], ["a", "b", "c", "d"], 4),
        ([], [], 0),
    ],
)
def test_parts_decode_the_blocks_that_hold_them(
    wide: Path, tensors: list[str] | None, names: list[str], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TrajectoryStore(wide, cache_bytes=0) as store:
        decoded = watch_decode(monkeypatch)
        read = store.read(3, tensors=tensors)
        assert_same_bits(read, {name: t for name, t in snapshot(3, WIDE).items() if name in names})
        assert sum(decoded) == store.frames_to(3) * blocks


def test_parts_come_from_the_cache(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TrajectoryStore(wide) as store:
        store.read(3)
        decoded = watch_decode(monkeypatch)
        assert_same_bits(store.read(3, tensors=["b"]), {"b": snapshot(3, WIDE)["b"]})
        assert decoded == [2]


def test_prefixes(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    names = ["layers.1.A", "layers.1.B", "layers.10.A", "layers.1"]
    with TrajectoryWriter(path) as writer:
        writer.append(0, {name: torch.ones(2) for name in names})
    with TrajectoryStore(path) as store:
        assert list(store.read(0, tensors=["layers.1."])) == ["layers.1.A", "layers.1.B"]
        assert list(store.read(0, tensors=["layers.1"])) == ["layers.1"]  # a name before what begins with it
        assert list(store.read(0, tensors=["layers"])) == sorted(names)
        assert list(store.read(0, tensors=["layers.10"])) == ["layers.10.A"]
    with TrajectoryWriter(tmp_path / "u") as writer:
        writer.append(0, {name: torch.ones(2) for name in names[:3]})
    with TrajectoryStore(tmp_path / "u") as store:
        assert list(store.read(0, tensors=["layers.1"])) == ["layers.1.A", "layers.1.B"]
        with pytest.raises(InputError, match=r"u: no tensor is 'layers.2' or begins with it"):
            store.read(0, tensors=["layers.2"])


def test_ranges_of_blocks() -> None:
    places = {"a": slice(0, 10), "b": slice(10, 70_000), "empty": slice(70_000, 70_000), "c": slice(400_000, 400_001)}
    assert list(runs_of_blocks(places)) == [(range(2), ["a", "b", "empty"]), (range(6, 7), ["c"])]
    assert list(runs_of_blocks({})) == []


# Into what


def test_out_is_filled(wide: Path) -> None:
    wanted = snapshot(5, WIDE)
    flat = torch.cat([wanted[name].reshape(-1) for name in sorted(wanted)])
    with TrajectoryStore(wide) as store:
        for step in (5, 8, 5):  # not cached, a key, not cached
            out = torch.empty(len(flat))
            read = store.read(step, out=out)
            assert read["a"].data_ptr() == out.data_ptr()
            assert_same_bits(read, snapshot(step, WIDE))
        assert torch.equal(out, flat)
        strided, double = torch.empty(2 * len(flat))[::2], torch.empty(len(flat), dtype=torch.float64)
        assert_same_bits(store.read(5, out=strided), wanted)
        store.read(5, out=double)
        assert torch.equal(strided, flat) and torch.equal(double, flat.double())
        by_name = {name: torch.empty(t.shape) for name, t in wanted.items()}
        assert all(store.read(5, out=by_name)[name] is by_name[name] for name in wanted)
        assert_same_bits({name: by_name[name] for name in sorted(by_name)}, wanted)
        part = torch.empty(90_001)
        assert_same_bits(store.read(5, tensors=["b", "c"], out=part), {name: wanted[name] for name in ("b", "c")})
        assert torch.equal(part, torch.cat([wanted["b"].reshape(-1), wanted["c"]]))
        for bad in (torch.empty(len(flat) + 1), torch.empty(1, len(flat))):
            with pytest.raises(InputError, match=r"out of shape .*: must be \[226178\]"):
                store.read(5, out=bad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": None}, "out has tensors a, b, d, must have a, b, c, d"),
        ({"e": torch.empty(1)}, "out has tensors a, b, c, d, e, must have a, b, c, d"),
        ({"c": torch.empty(5)}, "out: tensor c has shape [5], must be [1]"),
        ({"c": torch.empty(1, dtype=torch.int32)}, "out: tensor c is torch.int32, must be of a floating type"),
    ],
)
def test_out_by_name_must_fit(wide: Path, change: dict[str, Any], message: str) -> None:
    fits = {name: torch.zeros(shape) for name, shape in WIDE.items()} | change
    out = {name: t for name, t in sorted(fits.items()) if t is not None}
    with TrajectoryStore(wide) as store:
        with pytest.raises(InputError) as caught:
            store.read(5, out=out)
        assert str(caught.value) == message
        assert not any(t.any() for name, t in out.items() if name in "abd")
        with pytest.raises(InputError, match=r"out is torch\.int64, must be of a floating type"):
            store.read(5, out=torch.empty(226178, dtype=torch.int64))


def test_device_and_dtype(wide: Path) -> None:
    with TrajectoryStore(wide) as store:
        made = store.read(5, dtype=torch.float64, device="cpu")
        assert all(torch.equal(t, snapshot(5, WIDE)[name].double()) for name, t in made.items())


def test_what_is_read_is_the_readers_own(wide: Path) -> None:
    with TrajectoryStore(wide) as store:
        for step in (0, 5):
            for _ in range(2):
                for t in store.read(step).values():
                    t.add_(1)
                store.read_flat(step)[:] = 7
            assert_same_bits(store.read(step), snapshot(step, WIDE))


def test_the_base_layer_is_near(wide: Path) -> None:
    with TrajectoryStore(wide) as store:
        exact, base = store.read(5), store.read(5, base_only=True)
        part = store.read(5, tensors=["d"], base_only=True)["d"]
        limit = store.base_error(5)
    assert torch.equal(part, base["d"])
    finite = exact["b"].isfinite() & (exact["b"].abs() < 1e30)
    assert max(float((exact[n].double() - base[n]).abs()[finite if n == "b" else ...].max()) for n in exact) <= limit
    assert 0 < limit < 1e-3 * float(exact["a"].abs().max())
    for name in ("a", "d"):
        error = float((exact[name] - base[name]).abs().max())
        assert 0 < error < 1e-3 * float(exact[name].abs().max())


# The cache


def test_the_cache_is_bounded_and_keeps_keys() -> None:
    cache: FrameCache[Any] = FrameCache(limit=40)
    made = {step: np.full(3, step, np.uint32) for step in range(6)}  # 12 bytes each
    cache.put(0, made[0], key=True)
    for step in (1, 2, 3):
        cache.put(step, made[step], key=False)
        assert cache.bytes <= 40
    assert [cache.get(step) is not None for step in range(4)] == [True, False, True, True]
    cache.get(2)
    cache.put(4, made[4], key=True)
    assert [cache.get(step) is not None for step in range(5)] == [True, False, True, False, True]
    cache.put(5, made[5], key=True)
    cache.put(1, made[1], key=False)  # no room beside the keys
    assert [cache.get(step) is not None for step in range(6)] == [True, False, False, False, True, True]
    cache.put(9, np.zeros(11, np.uint32), key=True)
    assert cache.get(9) is None and cache.bytes == 36


def test_what_is_kept_is_read_only(wide: Path) -> None:
    with TrajectoryStore(wide) as store, pytest.raises(ValueError, match="read-only"):
        store.decoder.words(0)[:] = 1


@pytest.mark.parametrize("cache_bytes", [0, 3 * 904_712, 2**29])
def test_the_cache_saves_frames(wide: Path, cache_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = watch_decode(monkeypatch)
    with TrajectoryStore(wide, cache_bytes=cache_bytes) as store:
        for step in (1, 3, 5, 7, 1, 3):
            assert_same_bits(store.read(step), snapshot(step, WIDE))
        assert store.decoder.cache.bytes <= cache_bytes
    assert len(decoded) == {0: 30, 3 * 904_712: 15, 2**29: 5 + 6}[cache_bytes]


def test_many_threads_one_store(wide: Path) -> None:
    errors: list[BaseException] = []
    with TrajectoryStore(wide, cache_bytes=2 * 904_712) as store:

        def work(seed: int) -> None:
            try:
                for step in np.random.default_rng(seed).permutation(10).tolist():
                    assert_same_bits(store.read(step), snapshot(step, WIDE))
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


# Beside a writer


def test_reading_while_a_writer_appends_seals_and_closes(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    write(path, [0])
    child = os.fork()
    if child == 0:
        try:
            for begin in range(1, 400, 20):
                write(path, range(begin, begin + 20))
        finally:
            os._exit(0)
    seen, opened = 0, 0
    try:
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            with TrajectoryStore(path) as store:
                steps = store.steps
                assert steps == list(range(len(steps))) and len(steps) >= seen
                seen, opened = len(steps), opened + 1
                for step in steps[-9:]:
                    try:
                        assert_same_bits(store.read(step), snapshot(step))
                    except InputError as error:  # a closed file's last group is taken back and written anew
                        assert "cut" in str(error)
            if seen > 200:
                break
    finally:
        os.kill(child, signal.SIGKILL)
    assert opened > 3 and seen > 20
    os.waitpid(child, 0)
    write(path, [])
    with TrajectoryStore(path) as store:
        done = len(store)
    assert_holds(path, range(done))


def test_a_group_that_is_sealed_while_the_files_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The open file that was opened is not the one that belongs to the main file any more: both are opened anew."""
    path = tmp_path / "t.nacd"
    with TrajectoryWriter(path) as writer:
        for step in range(9):
            writer.append(step, snapshot(step))
        waiting = [9, 10]

        def late(*args: Any) -> Any:
            for step in waiting:
                writer.append(step, snapshot(step))
            waiting.clear()
            return read_index(*args)

        monkeypatch.setattr(reader, "read_index", late)
        assert_holds(path, range(11))


def test_an_open_store_outlives_a_seal(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    with TrajectoryWriter(path) as writer:
        for step in range(7):
            writer.append(step, snapshot(step))
        with TrajectoryStore(path, cache_bytes=0) as store:
            for step in range(7, 12):
                writer.append(step, snapshot(step))
            writer.close()
            for step in store.steps:
                assert_same_bits(store.read(step), snapshot(step))
    assert store.shapes == {name: list(shape) for name, shape in sorted(SHAPES.items())}


def test_a_record_that_is_replaced_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another snapshot's record of the same size, in its place before its bytes are read: never that one's values."""
    path, preadv = tmp_path / "t.nacd", os.preadv
    with TrajectoryWriter(path) as writer:
        writer.append(0, {"a": torch.tensor([1.0])})
        writer.append(1, {"a": torch.tensor([1.5])})
        waiting, sizes = [2], [writer.open_path.stat().st_size]

        def late(*args: Any) -> int:
            for step in waiting:
                waiting.clear()
                writer.truncate(0)
                writer.append(step, {"a": torch.tensor([1.25])})
                sizes.append(writer.open_path.stat().st_size)
            return preadv(*args)

        with TrajectoryStore(path) as store:
            store.read(0)
            monkeypatch.setattr(os, "preadv", late)
            with pytest.raises(InputError, match=r"step 1: the file was cut or changed while it was read"):
                store.read(1)
        assert sizes[0] == sizes[1]


def test_weights_that_no_frame_of_its_size_holds(tmp_path: Path) -> None:
    """A schema of 4 TiB is refused before memory is asked for."""
    path = tmp_path / "t.nacd"
    with TrajectoryWriter(tmp_path / "small") as writer:
        writer.append(0, {"a": torch.ones(3)})
        frame = np.fromfile(writer.open_path, np.uint8)[writer.index.frames[0].record.payload :][:204]
    end = 0
    with FileIO(path, "w") as file:
        schema = Schema({"a": [2**40]}, "float32", "hierarchical", 8, 0.0).to_json()
        for kind, payload in ((SCHEMA, np.frombuffer(schema, np.uint8)), (FRAME, frame), (SEAL, frame[:0])):
            end = write_at(file, end, pack(kind, end, [payload])[1])
    with TrajectoryStore(path) as store:
        assert store.shapes == {"a": [2**40]}
        for tensors in (None, ["a"]):
            with pytest.raises(InputError, match=r"step 0: 204 bytes for 1099511627776 weights"):
                store.read(0, tensors=tensors)


def test_a_store_goes_on_where_a_writer_takes_the_last_group_back(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    write(path, range(12))
    with TrajectoryStore(path) as store, TrajectoryWriter(path) as writer:
        assert_same_bits(store.read(9), snapshot(9))
        writer.append(12, snapshot(12))
        assert_same_bits(store.read(10), snapshot(10))
        assert store.steps == list(range(13))


def test_what_was_cached_of_a_group_that_is_written_anew_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    write(path, range(6))
    with TrajectoryStore(path) as store, TrajectoryStore(path) as cold, TrajectoryWriter(path) as writer:
        store.read(4)  # keeps what it is coded against
        writer.truncate(2)
        for step in range(3, 5):
            writer.append(step, snapshot(step + 50))
        with pytest.raises(InputError, match="the file was cut or changed while it was read"):
            cold.read(5)
        for step in (4, 3):
            assert_same_bits(store.read(step), snapshot(step + 50))
        assert_same_bits(store.read(2), snapshot(2))
        with pytest.raises(InputError, match="no snapshot at step 5; nearest: 4"):
            store.read(5)


def test_a_path_without_a_name() -> None:
    with pytest.raises(InputError, match="a folder, must be a trajectory file"):
        TrajectoryStore(Path("."))
