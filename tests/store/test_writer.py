"""Appending: what is stored, how deep, in which files, and what a second writer, a full disk or bad input get."""

import errno
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count as count_from
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor

from nacd_fast import codec
from nacd_fast.errors import InputError
from nacd_fast.store import TrajectoryStore, TrajectoryWriter, files, index
from nacd_fast.store.index import open_name
from nacd_fast.store.layout import DEPTH
from tests.store.snapshots import SHAPES, assert_holds, assert_same_bits, exit_of, snapshot, write


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "t.nacd"


def append_next(writer: TrajectoryWriter) -> None:
    writer.append(len(writer.steps), snapshot(len(writer.steps)))


def check_depth(path: Path, layout: str, steps: list[int], patch: pytest.MonkeyPatch) -> None:
    """Every snapshot is read back from at most as many frames as the layout promises, and as the store says."""
    decode, count = codec.decode, [0]

    def counted(*args: Any, **options: Any) -> Any:
        count[0] += 1
        return decode(*args, **options)

    with patch.context() as patched, TrajectoryStore(path, cache_bytes=0) as store:
        patched.setattr(codec, "decode", counted)
        assert store.steps == steps
        for step in steps:
            count[0] = 0
            assert_same_bits(store.read(step), snapshot(step))
            assert count[0] == store.frames_to(step) <= DEPTH[layout]


@pytest.mark.parametrize("layout", list(DEPTH))
@pytest.mark.parametrize("group", [8, 3, 1])
def test_every_snapshot_is_near_at_every_moment(
    path: Path, layout: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Open, sealed, closed after every number of snapshots, taken up again, and cut anywhere."""
    steps = [3 * i for i in range(19)]
    with TrajectoryWriter(path, layout=layout, group=group) as writer:
        for i, step in enumerate(steps):
            writer.append(step, snapshot(step))
            check_depth(path, layout, steps[: i + 1], monkeypatch)
    for i in reversed(range(len(steps))):
        check_depth(path, layout, steps[: i + 1], monkeypatch)
        assert not open_name(path).exists()
        with TrajectoryWriter(path, layout=layout, group=group) as writer:
            writer.truncate(steps[i] - 1)
            check_depth(path, layout, steps[:i], monkeypatch)


@pytest.mark.parametrize("count", [1, 2, 8, 9, 10, 17, 20])
def test_the_bytes_follow_from_the_snapshots_alone(tmp_path: Path, count: int) -> None:
    whole, parts, again = (tmp_path / name for name in ("whole", "parts", "again"))
    write(whole, range(count))
    for step in range(count):
        write(parts, [step])
    write(again, [*range(count), *range(100, 107)])
    with TrajectoryWriter(again) as writer:
        writer.truncate(count - 2)
        if count > 1:
            writer.append(99, snapshot(99))
            writer.truncate(98)
        writer.append(count - 1, snapshot(count - 1))
    assert whole.read_bytes() == parts.read_bytes() == again.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"whole", "parts", "again"}


def test_the_writer_takes_up_an_open_group(path: Path) -> None:
    write(path.with_name("whole"), range(13))
    for begin, end in ((0, 5), (5, 9), (9, 12)):
        with pytest.raises(KeyboardInterrupt), TrajectoryWriter(path) as writer:
            for step in range(begin, end):
                writer.append(step, snapshot(step))
            raise KeyboardInterrupt
        assert open_name(path).exists()
        assert_holds(path, range(end))
    write(path, [12])
    assert path.read_bytes() == path.with_name("whole").read_bytes()


@pytest.mark.parametrize(("after", "left"), [(-1, []), (0, [0]), (4, [0, 4]), (5, [0, 4]), (99, [0, 4, 8])])
@pytest.mark.parametrize("closed", [True, False])
def test_truncate(path: Path, after: int, left: list[int], closed: bool) -> None:
    with TrajectoryWriter(path) as writer:
        for step in (0, 4, 8):
            writer.append(step, snapshot(step))
        if not closed:
            writer.truncate(after)
    with TrajectoryWriter(path) as writer:
        writer.truncate(after)
        assert writer.steps == left
        assert_holds(path, left)
        writer.append(100, snapshot(100))
    assert_holds(path, [*left, 100])


def test_an_emptied_trajectory_takes_other_tensors(path: Path) -> None:
    write(path, range(3))
    with TrajectoryWriter(path) as writer:
        writer.truncate(-1)
    with TrajectoryWriter(path, layout="fast", group=2) as writer:
        writer.append(0, {"x": torch.ones(2)})
    with TrajectoryStore(path) as store:
        assert store.steps == [0] and store.shapes == {"x": [2]} and store.schema.layout == "fast"


def test_views_strides_and_gradients(path: Path) -> None:
    flat = torch.arange(12.0)
    views = {"whole": flat, "part": flat[2:8].view(2, 3), "transposed": flat.view(3, 4).T, "strided": flat[::2]}
    views["parameter"] = torch.nn.Parameter(torch.ones(3))
    with TrajectoryWriter(path) as writer:
        writer.append(0, views)
        flat += 1  # what was appended is the writer's own
        writer.append(1, views)
    with TrajectoryStore(path) as store:
        assert torch.equal(store.read(0)["strided"], torch.arange(0.0, 12, 2))
        assert_same_bits(store.read(1), {name: t.detach() for name, t in views.items()})


@pytest.mark.parametrize("tensors", [{}, {"none": torch.empty(3, 0)}, {"one": torch.tensor(1.5)}])
def test_hardly_any_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    with TrajectoryWriter(path) as writer:
        for step in range(11):
            writer.append(step, {name: t + step for name, t in tensors.items()})
    with TrajectoryStore(path) as store:
        assert len(store) == 11
        assert_same_bits(store.read(5), {name: t + 5 for name, t in tensors.items()})
        store.verify()


def test_bfloat16(path: Path) -> None:
    made = {step: snapshot(step, dtype=torch.bfloat16) for step in range(12)}
    made[3]["b"].view(torch.int16)[0, 0] = 0x7F81  # a NaN with a payload
    with TrajectoryWriter(path) as writer:
        for step, tensors in made.items():
            writer.append(step, tensors)
        with pytest.raises(InputError, match=r"tensor a is torch\.float32, must be torch\.bfloat16"):
            writer.append(50, snapshot(50))
    with TrajectoryStore(path) as store:
        for step, tensors in made.items():
            assert_same_bits(store.read(step), tensors)
            assert_same_bits(store.read(step, tensors=["b"]), {"b": tensors["b"]})


# Bad input


@pytest.mark.parametrize("step", [3, 2, -1, 2**62 + 1, True])
def test_steps_must_increase(path: Path, step: int) -> None:
    write(path, [3])
    with (
        pytest.raises(InputError, match=r"step.*above the last step 3 and at most 4611686018427387904"),
        TrajectoryWriter(path) as writer,
    ):
        writer.append(step, snapshot(0))
    assert_holds(path, [3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a"), "tensor a has shape None, in this trajectory it has [65]"),
        (lambda t: t.update(z=torch.zeros(1)), "tensor z has shape [1], in this trajectory it has None"),
        (lambda t: t.update(b=torch.zeros(5, 3)), "tensor b has shape [5, 3], in this trajectory it has [3, 5]"),
        (lambda t: t.update(b=torch.zeros(3, 5).double()), "tensor b is torch.float64, must be torch.float32"),
    ],
)
def test_snapshots_are_alike(path: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    write(path, [0])
    other = snapshot(1)
    change(other)
    with pytest.raises(InputError) as caught, TrajectoryWriter(path) as writer:
        writer.append(7, other)
    assert message in str(caught.value) and "step 7" in str(caught.value)
    assert_holds(path, [0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "deep"}, "layout='deep', must be one of hierarchical, fast"),
        ({"group": 9}, "group=9, must be from 1 to 8"),
        ({"group": 0}, "group=0, must be from 1 to 8"),
        ({"eps": -0.1}, "eps=-0.1, must be 0"),
        ({"eps": float("nan")}, "eps=nan, must be 0"),
    ],
)
def test_options_outside_their_limits(path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        TrajectoryWriter(path, **options)
    assert message in str(caught.value) and not path.exists()


@pytest.mark.parametrize("options", [{"layout": "fast"}, {"group": 4}, {"eps": 0.5}])
def test_a_trajectory_goes_on_as_it_began(path: Path, options: dict[str, Any]) -> None:
    write(path, [0, 1])
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"made with layout=hierarchical, group=8, eps=0, not with layout="):
        TrajectoryWriter(path, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("tensors", "options", "message"),
    [
        ({"x": torch.zeros(2, dtype=torch.int32)}, {}, "tensor x is torch.int32, must be torch.float32 or"),
        ({"x": torch.zeros(2).bfloat16()}, {"eps": 0.1}, "must be torch.float32 where eps=0.1"),
        (
            {"a": torch.zeros(2), "x": torch.zeros(2).bfloat16()},
            {},
            "tensor x is torch.bfloat16, must be torch.float32",
        ),
    ],
)
def test_types_that_are_not_stored(
    path: Path, tensors: dict[str, Tensor], options: dict[str, Any], message: str
) -> None:
    with TrajectoryWriter(path, **options) as writer, pytest.raises(InputError, match=message):
        writer.append(0, tensors)


@pytest.mark.parametrize("text", ["step,loss\n", "x" * 99])
def test_another_kind_of_file_is_left_alone(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(InputError, match=r"t\.nacd: damaged at byte 0: not a record"):
        TrajectoryWriter(path)
    assert path.read_text() == text


# Two writers


def test_a_second_writer_is_refused(path: Path) -> None:
    with TrajectoryWriter(path) as writer:
        writer.append(0, snapshot(0))
        with pytest.raises(InputError, match=r"^\S+t.nacd: another writer has it open$"):
            TrajectoryWriter(path)

        def other() -> None:
            with pytest.raises(InputError, match="another writer has it open"):
                TrajectoryWriter(path)

        assert exit_of(other) == 0
        writer.append(1, snapshot(1))
    write(path, [2])
    assert_holds(path, [0, 1, 2])


def test_a_forked_child_does_not_keep_the_lock(path: Path) -> None:
    """Loaders fork while a writer is open; they may live longer than it."""
    reader, pipe = os.pipe()
    with TrajectoryWriter(path) as writer:
        writer.append(0, snapshot(0))
        child = os.fork()
        if child == 0:
            os.close(pipe)
            os.read(reader, 1)  # until the parent closes its end
            os._exit(0)
    try:
        write(path, [1])
    finally:
        os.close(pipe)
        os.waitpid(child, 0)
        os.close(reader)
    assert_holds(path, [0, 1])


def test_new_folders_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(files, "sync_folder", synced.append)
    TrajectoryWriter(tmp_path / "a" / "b" / "t.nacd").close()
    assert synced == [tmp_path, tmp_path / "a"]
    TrajectoryWriter(tmp_path / "a" / "b" / "u.nacd").close()
    assert len(synced) == 2


def test_the_largest_step(path: Path) -> None:
    with TrajectoryWriter(path) as writer:
        for i, step in enumerate((0, 10**8, 2**62)):
            writer.append(step, snapshot(i))
    with TrajectoryStore(path) as store:
        assert store.steps == [0, 10**8, 2**62]
        assert_same_bits(store.read(2**62), snapshot(2))


def test_an_append_is_read_back_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = codec.encode

    def wrong(*args: Any, **options: Any) -> codec.Encoded:
        made = encode(*args, **options)
        made.data[-1] ^= 1
        return made

    with TrajectoryWriter(tmp_path / "t.nacd") as writer:
        writer.append(0, snapshot(0))
        with monkeypatch.context() as patch:
            patch.setattr(codec, "encode", wrong)
            with pytest.raises(InputError, match="step 1: its frame cannot be read back"):
                writer.append(1, snapshot(1))
        writer.append(1, snapshot(1))
    assert_holds(tmp_path / "t.nacd", [0, 1])


@pytest.mark.parametrize("work", [append_next, TrajectoryWriter.close, lambda writer: writer.truncate(1)])
@pytest.mark.parametrize("readable", [True, False])
def test_an_encoder_that_fails_cannot_destroy_a_snapshot(
    path: Path, monkeypatch: pytest.MonkeyPatch, work: Callable[[TrajectoryWriter], None], readable: bool
) -> None:
    """A group that is coded anew is decoded before the frames that it replaces are gone."""
    with suppress(KeyboardInterrupt), TrajectoryWriter(path, group=4) as writer:
        for _ in range(13):
            append_next(writer)
        raise KeyboardInterrupt
    before = path.read_bytes(), open_name(path).read_bytes()
    encode = codec.encode

    def wrong(words: Any, *args: Any, **options: Any) -> Any:
        made = encode(words ^ np.uint32(0x10000), *args, **options)
        if not readable:
            made.data[-1] ^= 1
        return made

    writer = TrajectoryWriter(path, group=4)
    with monkeypatch.context() as patch:
        patch.setattr(codec, "encode", wrong)
        with pytest.raises(InputError, match=r"t\.nacd: step \d+: coded anew, it decodes to other values"):
            work(writer)
    assert (path.read_bytes(), open_name(path).read_bytes()) == before
    writer.close()
    assert_holds(path, range(13))


# A full disk


class FullDisk:
    """os.pwrite on a disk that has room for `left` bytes; a write that does not fit is cut, the next one fails."""

    def __init__(self) -> None:
        self.left: float = float("inf")
        self.plain = os.pwrite

    def pwrite(self, descriptor: int, data: Any, offset: int) -> int:
        if self.left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self.plain(descriptor, data[: int(min(self.left, len(data)))], offset)
        self.left -= written
        return written


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[FullDisk]:
    disk = FullDisk()
    monkeypatch.setattr(os, "pwrite", disk.pwrite)
    yield disk


def test_a_disk_that_fills_up_anywhere(path: Path, disk: FullDisk) -> None:
    """Every append fails at several places first, sealing ones at many; then there is room, and all is as ever."""
    write(path.with_name("whole"), range(12))
    writer = TrajectoryWriter(path)
    for step in range(12):
        for room in range(0, 10**5, 97):
            disk.left = room
            try:
                writer.append(step, snapshot(step))
            except InputError as error:
                assert f"the snapshot of step {step}: cannot be written (No space left on device)" in str(error)
                assert_holds(path, range(step))
            else:
                break
        assert room > 0
    disk.left = 100
    with pytest.raises(InputError, match=r"the seal of step 11: cannot be written \(No space left on device\)"):
        writer.close()
    disk.left = float("inf")
    assert_holds(path, range(12))
    TrajectoryWriter(path).close()
    assert path.read_bytes() == path.with_name("whole").read_bytes()


def test_what_could_not_be_cut_off_is_cut_off_later(
    path: Path, disk: FullDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, end: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    writer = TrajectoryWriter(path)
    writer.append(0, {"a": torch.zeros(500)})
    disk.left = 1500
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"No space left on device.*anew"):
        patch.setattr(os, "ftruncate", refuse)
        writer.append(1, {"a": torch.randn(500)})
    disk.left = float("inf")
    with pytest.raises(InputError, match="the snapshot of step 1: its writer is closed, open the trajectory anew"):
        writer.append(1, {"a": torch.zeros(500)})
    with TrajectoryWriter(path) as writer:
        writer.append(1, {"a": torch.zeros(500)})  # a shorter record
        writer.append(2, {"a": torch.zeros(500)})
        with TrajectoryStore(path) as store:
            assert store.steps == [0, 1, 2]


# Calls that fail, each once


FAILURE = OSError(errno.EIO, os.strerror(errno.EIO))
CALLS = ("open", "pwrite", "fdatasync", "fsync", "ftruncate", "replace", "unlink", "preadv")


@pytest.mark.parametrize(("failure", "lasting"), [(FAILURE, False), (FAILURE, True), (InputError("damage"), False)])
@pytest.mark.parametrize(
    ("count", "closed", "work", "after"),
    [
        (2, False, append_next, 3),
        (5, False, append_next, 6),  # seals
        (4, True, append_next, 5),  # takes the sealed group back first
        (5, False, TrajectoryWriter.close, 5),
        (4, False, lambda writer: writer.truncate(2), 3),
        (4, False, lambda writer: writer.truncate(-1), 0),
        (7, False, lambda writer: writer.truncate(4), 5),
        (7, False, lambda writer: writer.truncate(2), 3),
        (7, True, lambda writer: writer.truncate(2), 3),
    ],
)
def test_a_call_that_fails_loses_nothing(
    tmp_path: Path,
    count: int,
    closed: bool,
    work: Callable[[TrajectoryWriter], None],
    after: int,
    failure: Exception,
    lasting: bool,
) -> None:
    """Any system call, once or from then on: then the writer is tried again, and then another one."""
    begin, path = tmp_path / "begin", tmp_path / "failed" / "t.nacd"
    with suppress(KeyboardInterrupt), TrajectoryWriter(begin / "t.nacd", group=4) as writer:
        for _ in range(count):
            append_next(writer)
        if not closed:
            raise KeyboardInterrupt
    failed = 0
    for call in CALLS:
        for number in count_from(0):
            shutil.rmtree(path.parent, ignore_errors=True)
            shutil.copytree(begin, path.parent)
            writer = TrajectoryWriter(path, group=4)
            if not fails_at(call, number, failure, lasting, lambda: work(writer)):  # noqa: B023  # called at once
                break
            failed += 1
            with TrajectoryStore(path) as store:
                assert len(store) in {count, after, *({5} if after == 3 else ())}
            with suppress(InputError):  # a writer that was closed says so
                append_next(writer)
            writer.close()
            with TrajectoryStore(path) as store:
                done = len(store)
            assert_holds(path, range(done))
            assert done >= min(count, after)
            with TrajectoryWriter(path, group=4) as writer:
                writer.truncate(min(count, after) - 1)
                append_next(writer)
            assert_holds(path, range(min(count, after) + 1))
    assert failed


def fails_at(call: str, number: int, failure: Exception, lasting: bool, work: Callable[[], None]) -> bool:
    """Whether `work` came to that os.<call>, which failed, and told so if it failed itself."""
    left, plain = [number], getattr(os, call)

    def patched(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == -1 or (lasting and left[0] < 0):
            raise failure
        return plain(*args, **options)

    with pytest.MonkeyPatch.context() as patch, suppress(InputError):
        patch.setattr(os, call, patched)
        work()
    return left[0] < 0


def test_a_seal_scans_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a long trajectory would be read as often as it has groups."""
    with TrajectoryWriter(path, group=2) as writer:
        monkeypatch.setattr(index, "scan", None)
        for step in range(9):
            writer.append(step, snapshot(step))
        writer.truncate(6)
        writer.truncate(3)
    monkeypatch.undo()
    assert_holds(path, range(4))


def test_a_file_that_may_not_grow(path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
        with TrajectoryWriter(path) as writer:
            for step in range(4):
                writer.append(step, snapshot(step))

    assert exit_of(work) == 1
    with TrajectoryStore(path) as store:
        done = store.steps
    assert 0 < len(done) < 4
    write(path, range(len(done), 10))
    assert_holds(path, range(10))


def test_free_space_is_looked_at_first(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with TrajectoryWriter(path) as writer:
        writer.append(0, snapshot(0))
        monkeypatch.setattr(files, "free_bytes", lambda folder: 1000)
        with pytest.raises(InputError, match=r"t.nacd: the disk has 1,000 bytes left, the next snapshot may take \d"):
            writer.append(1, snapshot(1))
        monkeypatch.undo()
        with monkeypatch.context() as patch, pytest.raises(InputError, match=r"step 1: cannot be written \(Input/out"):
            patch.setattr(os, "statvfs", Mock(side_effect=FAILURE))
            writer.append(1, snapshot(1))
        writer.append(1, snapshot(1))
    assert_holds(path, [0, 1])


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that change files or make changes last, in their order; writes in a row are one."""
    events: list[str] = []

    def note(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            if name != "pwrite" or events[-1:] != ["pwrite"]:
                events.append(name)
            return plain(*args, **options)

        return noted

    for name in ("pwrite", "fdatasync", "fsync", "unlink", "ftruncate", "replace"):
        monkeypatch.setattr(os, name, note(name, getattr(os, name)))
    return events


SEALING = ["pwrite", "fdatasync", "pwrite", "fdatasync", "unlink", "fsync"]


def test_durable_before_append_returns(path: Path, events: list[str]) -> None:
    """The order of writes and syncs: schema, frame, and at the ninth append the frames, their seal, the open file."""
    with TrajectoryWriter(path) as writer:
        events.clear()
        writer.append(0, snapshot(0))
        assert events == ["pwrite", "fdatasync", "fsync", "pwrite", "fdatasync", "fsync"]
        for step in range(1, 9):
            events.clear()
            writer.append(step, snapshot(step))
            assert events == ["pwrite", "fdatasync"]
        events.clear()
        writer.append(9, snapshot(9))
        assert events == [*SEALING, "pwrite", "fdatasync", "fsync"]
        events.clear()
    assert events == SEALING


@pytest.mark.parametrize(
    ("after", "calls"),
    [
        (7, ["ftruncate", "fdatasync"]),
        (4, ["unlink", "fsync"]),
        (3, ["pwrite", "fdatasync", "replace", "fsync", "ftruncate", "fdatasync"]),
        (-1, ["unlink", "fsync", "ftruncate", "fdatasync"]),
    ],
)
def test_a_cut_is_in_the_folder_before_the_main_file_is_cut(
    path: Path, events: list[str], after: int, calls: list[str]
) -> None:
    """Else a power cut could bring the open file back, without the snapshots that it is coded against."""
    with TrajectoryWriter(path, group=4) as writer:
        for step in range(9):
            writer.append(step, snapshot(step))
        events.clear()
        writer.truncate(after)
        assert events == calls


def test_an_interrupted_writer_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a group is sealed but the open file is still there, say."""

    def interrupted(writer: TrajectoryWriter) -> None:
        raise KeyboardInterrupt

    writer = TrajectoryWriter(path, group=2)
    for step in range(3):
        writer.append(step, snapshot(step))
    monkeypatch.setattr(TrajectoryWriter, "_remove_open", interrupted)
    with pytest.raises(KeyboardInterrupt):
        writer.append(3, snapshot(3))
    monkeypatch.undo()
    with pytest.raises(InputError, match="the snapshot of step 3: its writer is closed"):
        writer.append(3, snapshot(3))
    writer.close()
    write(path, [3], group=2)
    assert_holds(path, range(4))


def test_little_is_kept_in_memory(path: Path) -> None:
    with TrajectoryWriter(path) as writer:
        for step in range(20):
            writer.append(step, snapshot(step))
            assert len(writer.recent) <= 2


def test_shapes_are_those_of_the_first_snapshot(path: Path) -> None:
    write(path, [0])
    with TrajectoryStore(path) as store:
        assert store.shapes == {name: list(shape) for name, shape in sorted(SHAPES.items())}
