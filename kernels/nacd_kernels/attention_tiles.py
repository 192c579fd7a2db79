"""How the reference goes through an attention call: run by run of segments, some heads at a time, tile by tile.

What is worked on is gathered into contiguous pieces that stay in the cache, a few heads at a time, and the results are
put where they belong from there: in a model q, k and v are views [B, T, H, d] of a projection's result.

The memory of a tile is block * L scores, or size * threads where that is more: linear in the tokens of a segment.
B rows, T tokens, H query heads, G key heads; n segments of one length L at once, `ratio` = H / G.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_mask import Mask
from .twice import Maybe, Tensors

BLOCK = 128  # query rows of a tile, at most
TILE = 1 << 18  # scores of a tile for each thread, where several heads fit: what a core's cache holds
# measured on one core at T = 130, 514 and 1026, d = 64: BLOCK 32..256, TILE 2^14..2^20


class Tile(NamedTuple):
    """Some query rows, and the keys that they see."""

    rows: slice  # of [heads, L * ratio, e]
    keys: slice  # of [heads, L, d]
    bias: Tensor  # 0, or -inf where hidden: [rows, w], for the last w of the keys


class Tiles:
    """The tiles of every segment of L tokens: of q [heads, L * ratio, d], row r of token r // ratio, and k [.., L, d].

    The query heads that share a key head lie in one product, and a tile of any tensor is a slice of it.
    """

    def __init__(self, L: int, ratio: int, window: int | None, like: Tensor):
        self.L, self.ratio = L, ratio
        self.before = L if window is None else window - 1  # keys that a query sees before itself
        blocks = -(-L * ratio // BLOCK)
        self.step = -(-L // blocks)  # tokens of a block, all blocks alike
        # what a block hides: of its own keys, and with a window of the keys before it that one of its rows sees
        self.near = 0 if window is None else self.before
        token = torch.arange(self.step, device=like.device).repeat_interleave(ratio)[:, None]
        ahead = torch.arange(-self.near, self.step, device=like.device) - token
        self.bias = like.new_zeros(ahead.shape).masked_fill_((ahead > 0) | (ahead < -self.before), -torch.inf)

    def __iter__(self) -> Iterator[Tile]:
        for i in range(0, self.L, self.step):
            j, near = min(i + self.step, self.L), min(i, self.near)
            bias = self.bias[: (j - i) * self.ratio, self.near - near : self.near + j - i]
            yield Tile(slice(i * self.ratio, j * self.ratio), slice(max(0, i - self.before), j), bias)

    def heads(self, n: int, G: int) -> Iterator[tuple[slice, slice]]:
        """The segments and key heads of [n, G] whose tiles are worked on together."""
        scores = self.step * self.ratio * min(self.L, self.before + self.step)
        together = max(1, TILE * torch.get_num_threads() // scores)
        segments, step = max(1, together // G), -(-G // -(-G // together))  # chunks of G all alike
        for i in range(0, n, segments):
            for g in range(0, G, step):
                yield slice(i, i + segments), slice(g, g + step)


def by_run(work: Callable[..., None], mask: Mask, like: Sequence[Maybe], tensors: Sequence[Maybe]) -> Tensors:
    """Results like each of `like` (None where it is None): work(tiles, results, *tensors) adds to zeros, run by run.

    tensors: q [B, H, T, d], k [B, G, T, d], and others of H or G heads. What work sees is [heads, rows, e], a head of a
    segment: a row a token of k, H/G rows a token of q, all contiguous, 16-bit types as float32.
    """
    q, k = tensors[:2]
    assert q is not None and k is not None
    (B, G, T, _), dtype = k.shape, torch.promote_types(q.dtype, torch.float32)
    make = torch.empty_like if mask.covers(B, T) else torch.zeros_like
    results = [None if x is None else make(x) for x in like]
    for run in mask.runs():
        tiles = Tiles(run.length, q.shape[1] // G, mask.window, q.new_empty(0, dtype=dtype))
        sources, places = ([None if x is None else by_head(run.cut(x), G) for x in xs] for xs in (tensors, results))
        for some in tiles.heads(run.rows * run.parts, G):
            given = [None if x is None else piece(x[some]).to(dtype).contiguous() for x in sources]
            found = [None if x is None else x[some].new_zeros(x[some].shape, dtype=dtype) for x in places]
            work(tiles, [None if x is None else piece(x) for x in found], *given)
            for place, out in zip(places, found, strict=True):
                if place is not None and out is not None:
                    place[some] = out
    return tuple(results)


def piece(x: Tensor) -> Tensor:
    """[n, G, L, H / G or 1, e] -> [n G, L H / G or L, e]."""
    return x.flatten(2, 3).flatten(0, 1)


def by_head(x: Tensor, G: int) -> Tensor:
    """[n, H or G, L, e] -> the view [n, G, L, H / G or 1, e]."""
    return x.unflatten(1, (G, -1)).transpose(2, 3)
