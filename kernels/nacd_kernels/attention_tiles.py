"""How the reference goes through an attention call: run by run of segments, tile by tile of whole rows of scores.

The memory of a tile is block * L scores, or size * threads where that is more: linear in the tokens of a segment.
B rows, T tokens, H query heads, G key heads; n segments of one length L at once, `ratio` = H / G.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_mask import Mask
from .twice import Maybe, Tensors


class Tile(NamedTuple):
    """Some query rows of some heads, and the keys that they see."""

    rows: tuple[slice, slice]  # of [G, L * ratio, e]
    keys: tuple[slice, slice]  # of [G, L, d]
    bias: Tensor  # 0, or -inf where hidden: [rows, w], for the last w of the keys


class Tiles:
    """The tiles of one run (`by_run`): q [G, L * ratio, d], row r of token r // ratio, against k [G, L, d].

    The heads that share a key head lie in one product, and a tile of any tensor is a slice of it.
    """

    def __init__(self, q: Tensor, k: Tensor, window: int | None, block: int, size: int):
        self.heads, self.L = k.shape[:2]
        self.ratio = q.shape[1] // self.L
        self.before = self.L if window is None else window - 1  # keys that a query sees before itself
        blocks = -(-self.L * self.ratio // block)
        self.step = -(-self.L // blocks)  # tokens of a block, all blocks alike
        reach = min(self.L, self.before + self.step)
        self.together = max(1, size * torch.get_num_threads() // (self.step * self.ratio * reach))
        # what a block hides: of its own keys, and with a window of the keys before it that one of its rows sees
        self.near = 0 if window is None else self.before
        token = torch.arange(self.step, device=q.device).repeat_interleave(self.ratio)[:, None]
        ahead = torch.arange(-self.near, self.step, device=q.device) - token
        self.bias = q.new_zeros(ahead.shape).masked_fill_((ahead > 0) | (ahead < -self.before), -torch.inf)

    def __iter__(self) -> Iterator[Tile]:
        for h in range(0, self.heads, self.together):
            heads = slice(h, h + self.together)
            for i in range(0, self.L, self.step):
                j, near = min(i + self.step, self.L), min(i, self.near)
                bias = self.bias[: (j - i) * self.ratio, self.near - near : self.near + j - i]
                rows, keys = slice(i * self.ratio, j * self.ratio), slice(max(0, i - self.before), j)
                yield Tile((heads, rows), (heads, keys), bias)


def by_run(work: Callable[..., None], mask: Mask, like: Sequence[Maybe], tensors: Sequence[Maybe]) -> Tensors:
    """Results like each of `like` (None where it is None): work(results, *tensors) adds to zeros, run by run.

    tensors: q [B, H, T, d], k [B, G, T, d], and others of H or G heads. What work sees is [n G, rows, e] for a run of
    n segments: a row a token of k, H/G rows a token of q, all contiguous, 16-bit types as float32.
    """
    q, k = tensors[:2]
    assert q is not None and k is not None
    G, dtype = k.shape[1], torch.promote_types(q.dtype, torch.float32)

    def rows(x: Tensor) -> Tensor:
        return x.unflatten(1, (G, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1).to(dtype).contiguous()

    # what work sees are views of the results where it can be, not the other way round: autograd lets nobody write
    # into a view that an op made
    results = [None if x is None else torch.zeros(x.shape, dtype=dtype, device=x.device) for x in like]
    for run in mask.runs():
        places: list[Maybe] = [None if x is None else run.cut(x) for x in results]
        parts: list[Maybe] = [None if x is None else rows(x) for x in places]
        work(parts, *(None if x is None else rows(run.cut(x)) for x in tensors))
        for place, part in zip(places, parts, strict=True):
            if place is not None and part.data_ptr() != place.data_ptr():
                place.copy_(part.unflatten(0, (-1, G)).unflatten(2, (run.length, -1)).transpose(2, 3).flatten(1, 2))
    return tuple(None if x is None else x.to(q.dtype) for x in results)
