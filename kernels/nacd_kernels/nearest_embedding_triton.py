"""The scores of nearest_embedding on a GPU: product and minima in one kernel; the scores never reach memory.

A program has BLOCK_P queries and BLOCK_V rows, a tile of scores s = |t|^2 / 2 - p t, and leaves of it for every query

    low, at    the least score and its column        second    the least of the others

[P, tiles] each, a BLOCK_V-th of the scores. From these `scan` draws the candidates: `at` where low may be among the k
best, and all rows of a tile whose second may be too, which is rare. Products are the tensor cores' in the table's type
(float32 as TF32) with float32 sums; what that rounds is in the error bound, so the index stays exact.

Programs go through the queries first, so that a tile of the table is read from memory once.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import capability, launch
from .nearest_candidates import WAITING, Nearest, error
from .nearest_candidates import scan as scan_in_chunks

HUGE = 3.0e38
FAR = tl.constexpr(HUGE)  # the score of no row, or of a banned one
DOUBTFUL = 2  # tiles a query to be measured whole: with more of them the chunks of the reference take over
ACCUMULATOR = 2.0**-22  # unit roundoff of the tensor cores' sums, which truncate and align
TF32 = 2.0**-9  # both inputs of a TF32 product, truncated


class Config(NamedTuple):
    """Tile sizes. Chosen by registers and shared memory; not timed on a GPU yet."""

    BLOCK_P: int
    BLOCK_V: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def config(P: int, dtype: torch.dtype, chip: tuple[int, int]) -> Config:
    """Few queries: the table's tiles are large, since reading them is what takes the time."""
    wide = dtype.itemsize == 4
    if P <= 128:
        rows = max(16, triton.next_power_of_2(P))
        return Config(rows, 128, 32 if wide else 64, 8 if rows == 128 else 4, 4)
    if chip >= (9, 0):
        return Config(128, 256, 32 if wide else 64, 8, 3)
    return Config(128, 128, 32 if wide else 64, 8, 3)


@triton.jit
def tile_minima_kernel(
    p_ptr, table_ptr, half_ptr, low_ptr, at_ptr, second_ptr, P, V, D, p_stride, table_stride, table_step, tiles,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """p [P, D], table [V, D], half [V] -> low, at, second [P, tiles] of every tile of BLOCK_V rows."""
    i_p = tl.program_id(0)
    i_v = tl.program_id(1)
    queries = i_p * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    columns = tl.arange(0, BLOCK_D)
    p_at = p_ptr + queries.to(tl.int64)[:, None] * p_stride + columns[None, :]
    t_at = table_ptr + rows.to(tl.int64)[None, :] * table_stride + columns[:, None] * table_step
    there_p = queries[:, None] < P
    there_v = rows[None, :] < V
    products = tl.zeros((BLOCK_P, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + columns < D
        b_p = tl.load(p_at + start, mask=there_p & inside[None, :], other=0.0)
        b_t = tl.load(t_at + start * table_step, mask=there_v & inside[:, None], other=0.0)
        products = tl.dot(b_p, b_t, products, input_precision=PRECISION)
    half = tl.load(half_ptr + rows, mask=rows < V, other=float("inf"))
    s = tl.minimum(half[None, :] - products, FAR)
    low = tl.min(s, 1)
    place = tl.argmin(s, 1)
    others = tl.where(tl.arange(0, BLOCK_V)[None, :] == place[:, None], FAR, s)
    out = queries.to(tl.int64) * tiles + i_v
    tl.store(low_ptr + out, low, mask=queries < P)
    tl.store(at_ptr + out, i_v * BLOCK_V + place, mask=queries < P)
    tl.store(second_ptr + out, tl.min(others, 1), mask=queries < P)


def tile_minima(p: Tensor, table: Tensor, half: Tensor) -> tuple[Tensor, Tensor, Tensor, int]:
    """low, at, second [P, tiles] and the rows of a tile; p (contiguous) and table of one type, half [V] float32."""
    (P, D), V = p.shape, table.shape[0]
    sizes = config(P, p.dtype, capability(p))
    tiles = triton.cdiv(V, sizes.BLOCK_V)
    low, second = half.new_empty(2, P, tiles)
    at = torch.empty(P, tiles, dtype=torch.int32, device=p.device)
    launch(
        tile_minima_kernel, (triton.cdiv(P, sizes.BLOCK_P), tiles), p, table, half, low, at, second, P, V, D,
        p.stride(0), table.stride(0), table.stride(1), tiles, PRECISION="tf32" if p.dtype == torch.float32 else "ieee",
        **sizes._asdict(),
    )  # fmt: skip
    return low, at, second, sizes.BLOCK_V


def scan(p: Tensor, table: Tensor, half: Tensor, p_squares: Tensor, largest: float, found: Nearest) -> None:
    """Add to `found` whatever may be among its k nearest; half [V] is |t|^2 / 2 in float64, infinite where banned."""
    rounded = p.to(table.dtype).contiguous()
    off = (p.double() - rounded.double()).norm(dim=1)
    plain = partial(scan_in_chunks, p, table, half, p_squares, largest, found)
    if not off.isfinite().all() or max(largest, float(p_squares.max())) > HUGE / 8:
        return plain()
    margin = 2 * error(p_squares, largest, p.shape[1], ACCUMULATOR, TF32 if table.dtype == torch.float32 else 0.0)
    margin += 2 * off * largest**0.5
    low, at, second, size = tile_minima(rounded, table, half.float())
    limit = torch.full_like(low[:, 0], 0.99 * HUGE)  # no banned row's score
    if low.shape[1] >= found.k:
        limit = torch.minimum(limit, (low.topk(found.k, largest=False).values[:, -1] + margin).float())
    whole = second <= limit[:, None]
    if int(whole.count_nonzero()) > DOUBTFUL * p.shape[0]:
        return plain()
    query, tile = ((low <= limit[:, None]) & ~whole).nonzero(as_tuple=True)
    found.add(query, at[query, tile].long())
    for pairs in whole.nonzero().split(max(1, WAITING // size)):
        query, tile = pairs.T
        row = tile[:, None] * size + torch.arange(size, device=p.device)
        there = (row < len(half)) & half[row.clamp(max=len(half) - 1)].isfinite()
        found.add(query[:, None].expand_as(row)[there], row[there])
