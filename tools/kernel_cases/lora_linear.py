"""Launches of lora_linear_triton.py: the products of a layer, of primals and of primal and tangent together."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from nacd_kernels import lora_linear_triton as kernels

M, D = 256, 1024  # enough to split k


def cases() -> Iterator[Callable[[], object]]:
    for dtype in (torch.bfloat16, torch.float32):
        for rank in (16, 64):
            yield from products(dtype, rank, tangents=True)
        yield from products(dtype, 16, tangents=False)
    yield from products(torch.bfloat16, 64, tangents=False)


def products(dtype: torch.dtype, rank: int, tangents: bool) -> Iterator[Callable[[], object]]:
    """h, y, g, dx, dA and dB of a layer."""

    def zeros(*shape: int, of: torch.dtype = torch.float32) -> Any:
        return [torch.zeros(shape, dtype=of), torch.zeros(shape, dtype=of) if tangents else None]

    def flipped(tensors: Any) -> Any:
        return [None if t is None else t.T for t in tensors]

    pair: Any = kernels.pair
    add_pair: Any = kernels.add_pair
    x, a, b, h = zeros(M, D, of=dtype), zeros(rank, D), zeros(D, rank), zeros(M, rank)
    yield partial(pair, *x, *flipped(a), primal=True)
    yield partial(pair, *x, *b, primal=True, scale=2.0)
    yield partial(pair, *flipped(h), *x, primal=True)
    yield partial(add_pair, *x, *h, *flipped(b), primal=True, scale=2.0)
    yield partial(add_pair, *x, *h, *a, primal=True)
