"""Elementwise references in pieces that fit a processor's cache, so that only results go to memory.

A chain of plain PyTorch calls writes every intermediate to memory and reads it back. On pieces of a few hundred
kilobytes the intermediates stay in the cache, and the whole costs little more than its transcendental functions.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .twice import Maybe

ELEMENTS = 2**16  # at a time and thread; 2^14 to 2^17 were tried, on [520, 2048] and [1028, 3072] in float32


def wide(x: Maybe) -> Maybe:
    """float32 for 16-bit tensors."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def pieces(x: Tensor) -> Iterator[slice]:
    """Slices of x, flat, that are worked on together: small on a processor, all on a GPU."""
    n = x.numel()
    step = ELEMENTS * torch.get_num_threads() if x.device.type == "cpu" else max(1, n)
    return (slice(i, i + step) for i in range(0, n, step))


def cut(part: slice, *tensors: Maybe) -> list[Maybe]:
    """That part of each tensor, in float32 if it is 16-bit; None stays None."""
    return [None if x is None else wide(x[part]) for x in tensors]


def put(out: Maybe, *products: tuple[Maybe, Maybe]) -> None:
    """out = the sum of the products; one with a None in it is zero, and not all are. Nothing if out is None."""
    if out is None:
        return
    first, *rest = [pair for pair in products if pair[0] is not None and pair[1] is not None]
    if not rest:
        torch.mul(*first, out=out)
        return
    total = torch.mul(*first)
    for pair in rest[:-1]:
        total.addcmul_(*pair)
    torch.addcmul(total, *rest[-1], out=out)
