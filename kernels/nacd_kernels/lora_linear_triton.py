"""The low-rank products of LoRA on a GPU: `low_rank.py`'s two, as one kernel in three shapes.

`pair_kernel` computes tiles of c = scale p q and, in the same read of p, p', q and q', of c' = scale (p' q + p q'):

    down      x A^T, dy B        long k, few columns
    rows      g^T x, h^T dy      few rows, k goes over the M rows of x
    up        y += h B^T, dx += g A   k is the rank; added in place to what the vendor's GEMM has just written

The frozen products stay with the vendor's GEMM. Down and rows have few tiles, so k is split over programs; the parts
are summed in a fixed order, and results are the same bit for bit on every run.

Everything thin is float32, and so is every dot (tf32x3, about float32's own error). h, dA and dB are float32 where
PyTorch's composition computes them with float32 adapters; a dot in bfloat16 would round A to 8 bits, and be off by 2^-9
where that is off by 2^-20. It costs little: up to a rank of about 32 an A800 waits for x rather than for the dots.
Adapters of 16 bits are widened first; they are small.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .low_rank import Kit
from .twice import Maybe, add

PROGRAMS = 256  # about two for each of an A800's or an H200's multiprocessors
SPAN = 128  # of k, at least, in one program


def config(role: str, thin: int) -> dict[str, int]:
    """Tiles of down, rows and up; `thin` is the rank, or several layers' ranks together.

    Both chips and all types alike. Chosen by registers and shared memory; not timed on a GPU yet.
    """
    if role == "down":
        narrow, warps = (16, 4) if thin <= 16 else (64, 8)
        return {"BLOCK_M": 32, "BLOCK_N": narrow, "BLOCK_K": 32, "num_warps": warps, "num_stages": 3}
    if role == "rows":
        narrow = 16 if thin <= 16 else 32
        return {"BLOCK_M": narrow, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3}
    return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


@triton.jit
def load(ptr, i, j, i_stride, j_stride, i_end, j_end):
    """Tile [i, j] of what begins at ptr, in float32; zero beyond its ends."""
    inside = (i[:, None] < i_end) & (j[None, :] < j_end)
    return tl.load(ptr + (i[:, None] * i_stride + j[None, :] * j_stride), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def store(ptr, i, j, i_stride, j_stride, i_end, j_end, tile, ADD: tl.constexpr):
    """The tile in the type of what begins at ptr, added to it if ADD."""
    inside = (i[:, None] < i_end) & (j[None, :] < j_end)
    at = ptr + (i[:, None] * i_stride + j[None, :] * j_stride)
    if ADD:
        tile += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(at, tile.to(ptr.dtype.element_ty), mask=inside)


@triton.jit
def pair_kernel(
    p_ptr, p_t_ptr, q_ptr, q_t_ptr, c_ptr, c_t_ptr, M, N, K, span, p_m, p_k, q_k, q_n, c_m, c_n, scale,
    DUAL: tl.constexpr, ADD: tl.constexpr, ROWS_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """c [parts, M, N] = scale p [M, K] q [K, N], each part over `span` of k; with DUAL c' = scale (p' q + p q') too.

    Of neighbouring programs the tiles differ along the thin axis (M if ROWS_FIRST), so that they share what is wide.
    Where a tile begins is counted in 64 bits, within a tile 32 do.
    """
    tile, part = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if ROWS_FIRST:
        tiles = tl.cdiv(M, BLOCK_M)
        m, n = tile % tiles, tile // tiles
    else:
        tiles = tl.cdiv(N, BLOCK_N)
        m, n = tile // tiles, tile % tiles
    m, n = m.to(tl.int64) * BLOCK_M, n.to(tl.int64) * BLOCK_N
    i, j, k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    rows, columns, inner = (M - m).to(tl.int32), (N - n).to(tl.int32), tl.minimum(K - part * span, span).to(tl.int32)
    p_at, q_at = m * p_m + part * span * p_k, n * q_n + part * span * q_k
    p_step, q_step = BLOCK_K * p_k, BLOCK_K * q_k
    c = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    c_t = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, inner, BLOCK_K):
        left = inner - start
        p = load(p_ptr + p_at, i, k, p_m, p_k, rows, left)
        q = load(q_ptr + q_at, k, j, q_k, q_n, left, columns)
        c = tl.dot(p, q, c, input_precision="tf32x3")
        if DUAL:
            c_t = tl.dot(load(p_t_ptr + p_at, i, k, p_m, p_k, rows, left), q, c_t, input_precision="tf32x3")
            c_t = tl.dot(p, load(q_t_ptr + q_at, k, j, q_k, q_n, left, columns), c_t, input_precision="tf32x3")
        p_at += p_step
        q_at += q_step
    c_at = part * M * N + m * c_m + n * c_n
    store(c_ptr + c_at, i, j, c_m, c_n, rows, columns, c * scale, ADD)
    if DUAL:
        store(c_t_ptr + c_at, i, j, c_m, c_n, rows, columns, c_t * scale, ADD)


def split(tiles: int, k: int, block: int) -> tuple[int, int]:
    """(parts, span): how many programs share a tile, and how much of k each goes through, a multiple of `block`."""
    parts = min(max(1, PROGRAMS // max(1, tiles)), triton.cdiv(k, SPAN))
    span = max(1, triton.cdiv(triton.cdiv(k, max(1, parts)), block)) * block
    return max(1, triton.cdiv(k, span)), span


def alike(x: Tensor, x_t: Maybe) -> tuple[Tensor, Maybe]:
    """Both with the same strides."""
    if x_t is None or x.stride() == x_t.stride():
        return x, x_t
    return x.contiguous(), x_t.contiguous()


def start(
    role: str, p: Tensor, p_t: Maybe, q: Tensor, q_t: Maybe, c: Tensor, c_t: Maybe, parts: int, span: int, scale: float
) -> None:
    """Launch; c [parts, M, N], or [M, N] of one part. p', q' and c' are there together or not at all."""
    (M, K), N = p.shape, q.shape[1]
    settings = config(role, min(M, N))
    p, p_t, q, q_t = (*alike(p, p_t), *alike(q, q_t))
    launch(
        pair_kernel,
        (tiles_of(M, N, settings), parts),
        *(p, p_t, q, q_t, c, c_t, M, N, K, span, *p.stride(), *q.stride(), *c.stride()[-2:], scale),
        DUAL=c_t is not None,
        ADD=role == "up",
        ROWS_FIRST=role == "rows",
        **settings,
    )


def tiles_of(M: int, N: int, settings: dict[str, int]) -> int:
    return triton.cdiv(M, settings["BLOCK_M"]) * triton.cdiv(N, settings["BLOCK_N"])


def thin_product(p: Tensor, p_t: Maybe, q: Tensor, q_t: Maybe, scale: float) -> tuple[Tensor, Maybe]:
    """(scale p q, scale (p' q + p q')) in float32, the latter only with both p' and q'."""
    (M, K), N = p.shape, q.shape[1]
    role = "down" if N <= M else "rows"
    settings = config(role, min(M, N))
    parts, span = split(tiles_of(M, N, settings), K, settings["BLOCK_K"])
    dual = p_t is not None and q_t is not None
    sums = [p.new_empty(parts, M, N, dtype=torch.float32) for _ in range(1 + dual)]
    c_t = sums[1] if dual else None
    start(role, p, p_t if dual else None, q, q_t if dual else None, sums[0], c_t, parts, span, scale)
    whole = [t.sum(0) if parts > 1 else t.view(M, N) for t in sums]
    return whole[0], whole[1] if dual else None


def pair(p: Tensor, p_t: Maybe, q: Tensor, q_t: Maybe, primal: bool, scale: float = 1.0) -> tuple[Maybe, Maybe]:
    """See `low_rank.pair`; the results are float32."""
    if q.shape[1] <= p.shape[0]:
        q, q_t = wide(q), wide(q_t)
    else:
        p, p_t = wide(p), wide(p_t)
    if primal and p_t is not None and q_t is not None:
        return thin_product(p, p_t, q, q_t, scale)
    terms = [(p_t, q), (p, q_t)]
    along = [thin_product(a, None, b, None, scale)[0] for a, b in terms if a is not None and b is not None]
    return thin_product(p, None, q, None, scale)[0] if primal else None, add(*along)


def add_pair(
    c: Maybe, c_t: Maybe, p: Tensor, p_t: Maybe, q: Tensor, q_t: Maybe, primal: bool, scale: float = 1.0
) -> None:
    """See `low_rank.add_pair`."""
    p, p_t, q, q_t = (wide(t) for t in (p, p_t, q, q_t))

    def up(c: Tensor, c_t: Maybe, p: Tensor, p_t: Maybe, q: Tensor, q_t: Maybe) -> None:
        start("up", p, p_t, q, q_t, c, c_t, 1, p.shape[1], scale)

    both = p_t is not None and q_t is not None
    if primal and both:
        up(c, c_t, p, p_t, q, q_t)
        return
    if primal:
        up(c, None, p, None, q, None)
    if both:
        up(c_t, None, torch.cat([p_t, p], 1), None, torch.cat([q, q_t]), None)
    elif p_t is not None or q_t is not None:
        up(c_t, None, p if p_t is None else p_t, None, q if q_t is None else q_t, None)


def wide(x: Maybe) -> Maybe:
    """In float32."""
    return None if x is None else x.float()


KIT = Kit(pair, add_pair)
