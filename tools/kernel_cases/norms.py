"""Launches of norms_triton.py: every variant at one width, and the widest variant at every width's setting."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nacd_kernels import norms_triton as norms

WIDTHS = (512, 1024, 2048, 8192)


def cases() -> Iterator[Callable[[], object]]:
    yield from passes(4096, torch.bfloat16, center=True, both=False)
    yield from passes(4096, torch.bfloat16, center=False, both=True)
    for D in WIDTHS:
        yield from passes(D, torch.float32, center=True, both=True)


def passes(D: int, dtype: torch.dtype, center: bool, both: bool) -> Iterator[Callable[[], object]]:
    """The dual passes, and (unless `both`) primal and tangent by themselves."""
    x, x_t, dy, dy_t = (torch.zeros(2, D, dtype=dtype) for _ in range(4))
    w = torch.zeros(D, dtype=dtype)
    inputs = (x, w, w if center else None, 1e-6, 0.0, center)
    stats, stats_t = (tuple(torch.zeros(2) for _ in range(1 + center)) for _ in range(2))
    yield partial(norms.forward_dual, inputs, (x_t,))
    yield partial(norms.backward_dual, inputs, stats, (x_t,), stats_t, dy, dy_t, (True,))
    if both:
        return
    yield partial(norms.forward, *inputs)
    yield partial(norms.jvp, inputs, stats, (x_t,))
    yield partial(norms.backward, inputs, stats, dy, (True,))
    yield partial(norms.backward_jvp, inputs, stats, (x_t,), stats_t, dy, dy_t, (True,))
    yield partial(norms.backward_jvp, inputs, stats, (x_t,), stats_t, dy, None, (True,))
