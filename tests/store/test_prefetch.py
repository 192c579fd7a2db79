"""Reading ahead: in order, never too far, with the reader's exceptions, and over when its owner is done."""

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest

from nacd_fast.errors import InputError
from nacd_fast.store import TrajectoryStore
from nacd_fast.store.prefetch import Prefetch
from tests.store.snapshots import WIDE, assert_same_bits, snapshot, write


def settled(value: list[int], wanted: int) -> bool:
    """Whether the list gets as long as wanted, and then no longer."""
    deadline = time.monotonic() + 5
    while len(value) < wanted and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    return len(value) == wanted


def test_pairs_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    write(path, range(20))
    pairs = [(i * 7 % 15, i * 7 % 15 + 4) for i in range(30)]
    with TrajectoryStore(path) as store, store.prefetch(pairs, depth=3) as ahead:
        for (t, t_end), (start, target) in zip(pairs, ahead, strict=True):
            assert_same_bits(start, snapshot(t))
            assert_same_bits(target, snapshot(t_end))


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_no_more_than_depth_ahead(depth: int) -> None:
    read: list[int] = []

    def note(item: int) -> int:
        read.append(item)
        return item

    with Prefetch(note, count(), depth) as ahead:
        assert settled(read, depth)
        for taken in range(1, 4):
            assert next(ahead) == taken - 1
            assert settled(read, depth + taken)


def test_an_exception_comes_in_its_place(tmp_path: Path) -> None:
    path = tmp_path / "t.nacd"
    write(path, range(3))
    with TrajectoryStore(path) as store, store.prefetch([(0, 1), (0, 7), (0, 2)]) as ahead:
        assert_same_bits(next(ahead)[1], snapshot(1))
        with pytest.raises(InputError, match="no snapshot at step 7"):
            next(ahead)
        with pytest.raises(StopIteration):
            next(ahead)


def test_an_exception_of_the_items() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise KeyError("drawn")

    with Prefetch(str, items()) as ahead:
        assert next(ahead) == "1"
        with pytest.raises(KeyError, match="drawn"):
            next(ahead)


def test_it_ends_with_its_items() -> None:
    with Prefetch(str, range(3)) as ahead:
        assert list(ahead) == ["0", "1", "2"]
        assert list(ahead) == []


@pytest.mark.parametrize("how", ["close", "with", "forgotten"])
def test_the_thread_stops(how: str) -> None:
    before = set(threading.enumerate())
    ahead = Prefetch(str, count())
    next(ahead)
    (thread,) = set(threading.enumerate()) - before
    if how == "close":
        ahead.close()
        ahead.close()
        with pytest.raises(StopIteration):
            next(ahead)
    elif how == "with":
        with pytest.raises(KeyError), ahead:
            raise KeyError
    else:
        del ahead
        gc.collect()
    thread.join(5)
    assert not thread.is_alive()


def test_depth_must_be_positive() -> None:
    with pytest.raises(ValueError, match="depth=0, must be at least 1"):
        Prefetch(str, [], depth=0)


@pytest.mark.parametrize("end", ["", "del ahead", "sys.exit(ahead is None)"])
def test_a_process_may_end_while_it_reads_ahead(tmp_path: Path, end: str) -> None:
    """A thread that comes back from native code when the interpreter is gone would abort the process."""
    path = tmp_path / "t.nacd"
    write(path, range(9), WIDE)
    script = f"""
import sys
from itertools import repeat
from pathlib import Path
from nacd_fast.store import TrajectoryStore
ahead = [TrajectoryStore(Path(sys.argv[1])).prefetch(repeat((3, 5)), 10**6) for _ in range(4)]
for _ in ahead[0]:
    break
{end}
"""
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
