"""Launches of lora_linear_triton.py: the six functions with float32 adapters, and the dual ones at a higher rank."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from nacd_kernels import lora_linear_triton as kernels

M, D = 256, 1024  # enough to split k


def cases() -> Iterator[Callable[[], object]]:
    for dtype in (torch.bfloat16, torch.float32):
        for rank in (16, 64):
            for primal, tangents in ((True, True), (True, False)) if rank == 16 else ((True, True),):
                yield from products(dtype, rank, primal, tangents)


def products(dtype: torch.dtype, rank: int, primal: bool, tangents: bool) -> Iterator[Callable[[], object]]:
    """h, y, g, dx, dA and dB of a layer."""

    def zeros(*shape: int, of: torch.dtype = torch.float32) -> list[Tensor | None]:
        return [torch.zeros(shape, dtype=of), torch.zeros(shape, dtype=of) if tangents else None]

    def flipped(pair: list[Tensor | None]) -> list[Tensor | None]:
        return [None if t is None else t.T for t in pair]

    x, a, b, h = zeros(M, D, of=dtype), zeros(rank, D), zeros(D, rank), zeros(M, rank)
    yield partial(kernels.pair, *x, *flipped(a), primal)
    yield partial(kernels.pair, *x, *b, primal, 2.0)
    yield partial(kernels.pair, *flipped(h), *x, primal)
    yield partial(kernels.add_pair, *x, *h, *flipped(b), primal, 2.0)
    yield partial(kernels.add_pair, *x, *h, *a, primal)
