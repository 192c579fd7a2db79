"""How every Triton kernel of the package is launched: one door, so that what is launched can also be listed.

`recording` collects the launches instead of making them: `tools/compile_kernels.py` compiles each of them ahead of time
for chips that are not there. `capability` is what tuning tables ask for; under `recording` it is the chip recorded for.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

INTERPRETED = (8, 0)  # the tuning tables' answer where kernels are interpreted on a CPU


class Launch(NamedTuple):
    """One launch: the kernel, its arguments in order, and what is fixed when it is compiled."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]
    num_warps: int
    num_stages: int


class Recorder(NamedTuple):
    target: tuple[int, int]
    note: Callable[[Launch], None]


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


@contextmanager
def recording(target: tuple[int, int], note: Callable[[Launch], None]) -> Iterator[None]:
    """In here nothing is launched: `note` gets each launch as it would be on a chip of compute capability `target`."""
    token = _recorder.set(Recorder(target, note))
    try:
        yield
    finally:
        _recorder.reset(token)


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the chip that x is on, (8, 0) for an A800, (9, 0) for an H200."""
    recorder = _recorder.get()
    if recorder is not None:
        return recorder.target
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else INTERPRETED


def launch(
    kernel: Any, grid: tuple[int, ...], *args: Any, num_warps: int = 4, num_stages: int = 2, **constants: Any
) -> None:
    """Run `kernel` on a grid of programs, on the device of the first tensor argument.

    args are the kernel's arguments in order, constants its tl.constexpr parameters by name. An empty grid runs nothing.
    """
    recorder = _recorder.get()
    if recorder is not None:
        recorder.note(Launch(kernel, args, constants, num_warps, num_stages))
        return
    if 0 in grid:
        return
    where = next(x.device for x in args if isinstance(x, Tensor))
    with torch.cuda.device(where) if where.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
