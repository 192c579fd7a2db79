"""kill -9 at every system call of an append, a seal, a cut and a close, and at 200 random moments."""

import os
import random
import shutil
import signal
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import count as count_from
from pathlib import Path

import pytest

from nacd_fast.store import TrajectoryStore, TrajectoryWriter
from tests.store.snapshots import assert_holds, assert_same_bits, killed_before, snapshot, write

CALLS = ("pwrite", "fdatasync", "fsync", "ftruncate", "replace", "unlink")
GROUP = 4


def append(path: Path) -> None:
    writer = TrajectoryWriter(path, group=GROUP)
    step = len(writer.steps)
    writer.append(step, snapshot(step))


def cut(path: Path) -> None:
    TrajectoryWriter(path, group=GROUP).truncate(2)


def close(path: Path) -> None:
    TrajectoryWriter(path, group=GROUP).close()


@pytest.mark.parametrize(
    ("count", "closed", "work", "after"),
    [
        (0, False, append, {1}),
        (2, False, append, {3}),
        (5, False, append, {6}),  # seals
        (4, True, append, {5}),  # takes the sealed group back first
        (4, False, cut, {3}),
        (4, True, cut, {3}),
        (7, False, cut, {5, 3}),  # gives an open group up, then takes a sealed one back
        (7, True, cut, {3}),
        (4, False, close, {4}),
        (7, False, close, {7}),
    ],
)
def test_killed_at_every_call(
    tmp_path: Path, count: int, closed: bool, work: Callable[[Path], None], after: set[int]
) -> None:
    """What was there stays there, or what was asked for is; and the next writer ends with the bytes of a quiet one."""
    write(tmp_path / "whole", range(8), group=GROUP)
    whole, begin, path = (tmp_path / "whole").read_bytes(), tmp_path / "begin", tmp_path / "killed" / "t.nacd"
    begin.mkdir()
    with suppress(KeyboardInterrupt), TrajectoryWriter(begin / "t.nacd", group=GROUP) as writer:
        for step in range(count):
            writer.append(step, snapshot(step))
        if not closed:
            raise KeyboardInterrupt
    kills = 0
    for call in CALLS:
        for number in count_from(0):
            shutil.rmtree(path.parent, ignore_errors=True)
            shutil.copytree(begin, path.parent)
            if not killed_before(call, number, lambda: work(path)):
                break
            kills += 1
            with TrajectoryStore(path) as store:
                done = len(store)
            assert done in {count, *after}
            assert_holds(path, range(done))
            with TrajectoryWriter(path, group=GROUP) as writer:
                writer.truncate(2)
                for step in range(len(writer.steps), 8):
                    writer.append(step, snapshot(step))
            assert path.read_bytes() == whole
            assert [p.name for p in path.parent.iterdir()] == ["t.nacd"]
    assert kills > 1


def write_for_ever(path: Path, pipe: int) -> None:
    """Append and say so; now and then close the file."""
    while True:
        with TrajectoryWriter(path) as writer:
            for step in range(len(writer.steps), len(writer.steps) + random.randrange(1, 25)):
                writer.append(step, snapshot(step))
                os.write(pipe, struct.pack("<q", step))


def test_killed_at_200_random_moments(tmp_path: Path) -> None:
    """Every snapshot whose append returned is read back, bit for bit."""
    path, draw, count, kills = tmp_path / "t.nacd", random.Random(0), 0, 0
    while kills < 200 or count <= 200:  # on a busy machine more kills are needed to come that far
        kills += 1
        assert kills < 2000, f"after {kills} kills only {count} snapshots are there"
        reader, pipe = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write_for_ever(path, pipe)
            finally:
                os._exit(1)
        os.close(pipe)
        time.sleep(draw.uniform(0.0, 0.05))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with open(reader, "rb") as f:
            told = [step for (step,) in struct.iter_unpack("<q", f.read())]
        assert told == list(range(count, count + len(told)))
        if not path.exists():
            continue
        with TrajectoryStore(path) as store:
            steps = store.steps
            assert steps == list(range(len(steps))) and set(told) <= set(steps)
            for step in {*steps[count:], *steps[-9:], *draw.sample(steps, min(3, len(steps)))}:
                assert_same_bits(store.read(step), snapshot(step))
        count = len(steps)
    assert_holds(path, range(count))
