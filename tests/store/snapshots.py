"""Small snapshots that change smoothly, trajectories of them, and writers that are killed."""

import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nacd_fast.store import TrajectoryStore, TrajectoryWriter

Shapes = dict[str, tuple[int, ...]]

SHAPES: Shapes = {"b": (3, 5), "a": (65,), "scalar": (), "none": (0, 4)}
WIDE: Shapes = {"a": (70_000,), "b": (300, 300), "c": (1,), "d": (129, 513)}  # 4 blocks; b and d are in two each
ODD = [0x7FC00001, 0x7F800001, -0x80000000, 1, 0x7F800000, -0x800000, 0x7F7FFFFF, -1]


def snapshot(step: int, shapes: Shapes = SHAPES, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A line and some noise; b has NaNs with payloads, infinities, -0 and a subnormal in it, another one each step."""
    made: dict[str, Tensor] = {}
    for i, (name, shape) in enumerate(shapes.items()):
        base, noise = (
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (i, 1000 * step + i)
        )
        made[name] = (0.01 * base * (1 + 0.01 * step) + 1e-5 * noise).to(dtype)
    if "b" in made and dtype == torch.float32:
        flat = made["b"].view(-1).view(torch.int32)
        flat[step % len(flat)] = ODD[step % len(ODD)]
    return made


def write(path: Path, steps: Iterable[int], shapes: Shapes = SHAPES, **options: Any) -> None:
    with TrajectoryWriter(path, **options) as writer:
        for step in steps:
            writer.append(step, snapshot(step, shapes))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32)


def assert_same_bits(x: dict[str, Tensor], y: dict[str, Tensor]) -> None:
    assert list(x) == sorted(y)
    for name in x:
        assert x[name].dtype == y[name].dtype and x[name].shape == y[name].shape
        assert torch.equal(bits(x[name]), bits(y[name])), name


def assert_holds(path: Path, steps: Iterable[int]) -> None:
    """The trajectory has these snapshots, no others, every bit of them."""
    with TrajectoryStore(path) as store:
        assert store.steps == list(steps)
        for step in store.steps:
            assert_same_bits(store.read(step), snapshot(step))


def exit_of(work: Callable[[], object]) -> int:
    """The exit status of `work` in a process of its own: 0, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # a forked OpenMP pool hangs
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_before(call: str, number: int, work: Callable[[], object]) -> bool:
    """Run `work` in a process that dies by kill -9 before its os.<call> of that number; False: it made fewer."""

    def doomed() -> None:
        left, plain = [number], getattr(os, call)

        def patched(*args: Any, **options: Any) -> Any:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return plain(*args, **options)

        setattr(os, call, patched)
        work()

    status = exit_of(doomed)
    assert status in (0, -signal.SIGKILL)
    return status != 0
