"""flash_attention on a GPU: launches of the six kernels of flash_attention_kernels.py.

O, the gradients and their tangents are allocated as [B, T, heads, d] and seen as [B, heads, T, d]: what a model does
next is to lay the heads of a token side by side. Inputs are read where they are, with their strides.

A dual pass takes primal and tangent together (forward_dual, backward_dual). Kernels know two kinds of tangents: those
of q, k and v all there, and dO' there or not. So a missing tangent beside others is given as zeros, which is rare: only
in a first layer that adapts some of its projections. No tangent at all costs nothing.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_mask import Mask
from .checks import check
from .flash_attention_kernels import (
    dkdv_along_kernel,
    dkdv_kernel,
    dq_along_kernel,
    dq_kernel,
    forward_along_kernel,
    forward_kernel,
)
from .launch import capability, launch
from .twice import Maybe, Tensors, twice_differentiable

MAX_WIDTH = {2: 128, 4: 64}  # of a head, by bytes an element: three TF32 products of wider rows overflow the registers


class Blocks(NamedTuple):
    """ROWS of a program's tile, STEP of its loop over the other side's tokens, and how it is compiled."""

    rows: int
    step: int
    warps: int
    stages: int


# By WIDTH and bytes an element: each kernel's blocks on sm_80 and on sm_90 or later. `_dual` is an `_along` kernel that
# gives the gradient, too. Chosen by registers and shared memory, as large as does not spill; not timed on a GPU yet.
BLOCKS = {
    (64, 2): {
        "forward": (Blocks(128, 64, 4, 3), Blocks(128, 64, 8, 3)),
        "forward_along": (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2)),
        "dq": (Blocks(128, 64, 8, 2), Blocks(128, 64, 8, 3)),
        "dkdv": (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2)),
        "dq_along": (Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2)),
        "dkdv_along": (Blocks(64, 32, 8, 2), Blocks(64, 32, 4, 2)),
        "dq_dual": (Blocks(128, 32, 8, 2), Blocks(128, 32, 8, 2)),
        "dkdv_dual": (Blocks(64, 16, 8, 2), Blocks(64, 16, 8, 2)),
    },
    (128, 2): {
        "forward": (Blocks(128, 32, 4, 3), Blocks(128, 64, 8, 3)),
        "forward_along": (Blocks(64, 32, 8, 2), Blocks(128, 32, 8, 2)),
        "dq": (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2)),
        "dkdv": (Blocks(64, 32, 8, 2), Blocks(128, 32, 8, 2)),
        "dq_along": (Blocks(32, 64, 8, 2), Blocks(64, 32, 8, 2)),
        "dkdv_along": (Blocks(64, 32, 8, 2), Blocks(32, 32, 4, 2)),
        "dq_dual": (Blocks(32, 64, 8, 2), Blocks(64, 16, 8, 2)),
        "dkdv_dual": (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)),
    },
    (64, 4): {
        "forward": (Blocks(32, 32, 4, 2), Blocks(32, 32, 4, 2)),
        "forward_along": (Blocks(32, 16, 8, 2), Blocks(16, 16, 4, 2)),
        "dq": (Blocks(64, 16, 8, 2), Blocks(64, 16, 8, 2)),
        "dkdv": (Blocks(32, 32, 8, 2), Blocks(32, 32, 8, 2)),
        "dq_along": (Blocks(16, 16, 4, 2), Blocks(16, 16, 4, 2)),
        "dkdv_along": (Blocks(16, 16, 4, 2), Blocks(16, 16, 4, 2)),
        "dq_dual": (Blocks(16, 16, 8, 2), Blocks(16, 16, 4, 2)),
        "dkdv_dual": (Blocks(16, 16, 4, 2), Blocks(16, 16, 4, 2)),
    },
}


CAPPED = {  # in 16 bits, at either width
    "forward": (Blocks(128, 32, 4, 3), Blocks(128, 64, 8, 3)),
    "forward_along": (Blocks(32, 32, 8, 2), Blocks(128, 32, 8, 2)),
    "dq": (Blocks(128, 32, 8, 2), Blocks(128, 64, 8, 2)),
    "dkdv": (Blocks(64, 32, 8, 2), Blocks(64, 32, 8, 2)),
    "dq_along": (Blocks(32, 32, 8, 2), Blocks(64, 32, 8, 2)),
    "dkdv_along": (Blocks(32, 32, 8, 2), Blocks(32, 32, 4, 2)),
    "dq_dual": (Blocks(32, 64, 8, 2), Blocks(64, 16, 8, 2)),
    "dkdv_dual": (Blocks(32, 16, 8, 2), Blocks(16, 32, 8, 2)),
}


def config(kernel: str, width: int, dtype: torch.dtype, capped: bool, chip: tuple[int, int]) -> Blocks:
    row = CAPPED if capped and dtype.itemsize == 2 else BLOCKS[width, dtype.itemsize]
    return row[kernel][chip >= (9, 0)]


def padded_width(q: Tensor) -> int:
    """WIDTH of the tiles; ValueError where there is none."""
    limit = MAX_WIDTH[q.dtype.itemsize]
    check(
        q.shape[-1] <= limit,
        f"q has heads of width {q.shape[-1]} in {q.dtype}: the kernels take at most {limit}; NACD_KERNELS=reference "
        "takes any",
    )
    return 64 if q.shape[-1] <= 64 else 128


@lru_cache(maxsize=64)
def tiles(mask: Mask, rows: int, last_first: bool, device: torch.device) -> Tensor:
    """int32 [n, 4]: (row, begin, end, first token) of every tile of `rows` tokens; the longest work of a row first."""
    found = []
    for row, begin, end in mask.segments:
        firsts = range(begin, end, rows)
        found += [(row, begin, end, first) for first in (reversed(firsts) if last_first else firsts)]
    return torch.tensor(found, dtype=torch.int32, device=device).reshape(len(found), 4)


def run(
    name: str, kernel: Any, inputs: tuple, pointers: Sequence[Maybe], strided: Sequence[Tensor], **constants: Any
) -> None:
    """Launch `kernel` on every tile of queries or (dkdv) of keys. strided: the tensors whose strides it takes."""
    q, k, _, mask, c = inputs
    (_, H, T, d), G = q.shape, k.shape[1]
    width, of_keys = padded_width(q), name.startswith("dkdv")
    blocks = config(name, width, q.dtype, mask.softcap is not None, capability(q))
    where = tiles(mask, blocks.rows, not of_keys, q.device)
    strides = [stride for x in strided for stride in x.stride()[:3]]
    launch(
        kernel, (where.shape[0] * (G if of_keys else H),), *pointers, where, where.shape[0], T, H, H // G, d, c,
        mask.softcap, mask.window, *strides, **constants, WIDTH=width, ROWS=blocks.rows, STEP=blocks.step,
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


def like(x: Tensor, mask: Mask) -> Tensor:
    """Room for a result of x's shape [B, heads, T, d]: zeros where no tile writes, if there are such tokens."""
    B, heads, T, d = x.shape
    return (x.new_empty if mask.covers(B, T) else x.new_zeros)(B, T, heads, d).transpose(1, 2)


def statistic(q: Tensor, mask: Mask) -> Tensor:
    """Room for a float32 number a query, [B, H, T, 1]."""
    B, H, T, _ = q.shape
    make = q.new_empty if mask.covers(B, T) else q.new_zeros
    return make(B, H, T, 1, dtype=torch.float32)


def readable(x: Tensor) -> Tensor:
    """Any strides will do, but for that of a head's elements."""
    return x if x.stride(-1) == 1 else x.contiguous()


def alike(x: Tensor, x_t: Maybe) -> tuple[Tensor, Tensor]:
    """Both readable with the same strides; zeros for a missing tangent."""
    x, x_t = readable(x), torch.zeros_like(x) if x_t is None else x_t
    same = all(n == 1 or i == j for n, i, j in zip(x.shape, x.stride(), x_t.stride()))
    return (x, x_t) if same else (x.contiguous(), x_t.contiguous())


def token_major(x: Tensor) -> Tensor:
    """x [B, H, T, d], laid out as `like` lays out results: x itself if it is one."""
    rows = x.transpose(1, 2)
    return x if rows.is_contiguous() else rows.contiguous().transpose(1, 2)


def forward(*inputs: Any) -> tuple[Tensor, Tensors]:
    """Statistics: lse [B, H, T, 1]."""
    mask = inputs[3]
    q, k, v = map(readable, inputs[:3])
    o, lse = like(q, mask), statistic(q, mask)
    run("forward", forward_kernel, inputs, (q, k, v, o, lse), (q, k, v))
    return o, (lse,)


def forward_dual(inputs: tuple, tangents: Tensors) -> tuple[Tensor, Tensors, Tensor, Tensors]:
    """Tangents of statistics: mu [B, H, T, 1], that of lse."""
    mask = inputs[3]
    (q, q_t), (k, k_t), (v, v_t) = map(alike, inputs[:3], tangents)
    (o, o_t), (lse, mu) = (like(q, mask), like(q, mask)), (statistic(q, mask), statistic(q, mask))
    pointers = (q, q_t, k, k_t, v, v_t, o, o_t, lse, mu)
    run("forward_along", forward_along_kernel, inputs, pointers, (q, k, v))
    return o, (lse,), o_t, (mu,)


def jvp(inputs: tuple, saved: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    """Both again, the tangent kept: O must be at hand while O' is summed, and is a sixth of the work."""
    if all(x is None for x in tangents):
        return None, (None,)
    return forward_dual(inputs, tangents)[2:]


def backward(inputs: tuple, saved: Tensors, do: Tensor, needs: Sequence[bool]) -> Tensors:
    mask = inputs[3]
    q, k, v, do = map(readable, (*inputs[:3], do))
    o, lse = token_major(saved[0]), saved[1].contiguous()
    dq, dk, dv = (like(x, mask) for x in (q, k, v))
    delta = torch.empty_like(lse)
    run("dq", dq_kernel, inputs, (q, k, v, o, lse, do, dq, delta), (q, k, v, do))
    if needs[1] or needs[2]:
        run("dkdv", dkdv_kernel, inputs, (q, k, v, lse, do, delta, dk, dv), (q, k, v, do))
    return wanted((dq, dk, dv), needs)


def wanted(gradients: Tensors, needs: Sequence[bool]) -> Tensors:
    return tuple(x if need else None for x, need in zip(gradients, needs, strict=True))


def along_backward(
    inputs: tuple, saved: Tensors, tangents: Tensors, saved_t: Tensors, do: Tensor, do_t: Maybe, needs: Sequence[bool]
) -> tuple[Tensors, Tensors]:
    """The gradients' tangents after the gradients, which come with them if there is a dO'; else they are None."""
    mask, primal = inputs[3], do_t is not None
    (q, q_t), (k, k_t), (v, v_t) = map(alike, inputs[:3], tangents)
    do, do_t = alike(do, do_t) if primal else (readable(do), None)
    (o, o_t), (lse, mu) = map(token_major, (saved[0], saved_t[0])), (saved[1].contiguous(), saved_t[1].contiguous())
    dq, dk, dv = dx = tuple(like(x, mask) if primal else None for x in (q, k, v))
    dq_t, dk_t, dv_t = dx_t = tuple(like(x, mask) for x in (q, k, v))
    delta, delta_t = torch.empty_like(lse), torch.empty_like(lse)
    kind, xs, strided = "dual" if primal else "along", (q, q_t, k, k_t, v, v_t), (q, k, v, do)
    of_queries = (*xs, o, o_t, lse, mu, do, do_t, dq, dq_t, delta, delta_t)
    run(f"dq_{kind}", dq_along_kernel, inputs, of_queries, strided, PRIMAL=primal)
    if needs[1] or needs[2]:
        of_keys = (*xs, lse, mu, do, do_t, delta, delta_t, dk, dk_t, dv, dv_t)
        run(f"dkdv_{kind}", dkdv_along_kernel, inputs, of_keys, strided, PRIMAL=primal)
    return wanted(dx, needs), wanted(dx_t, needs)


def backward_jvp(
    inputs: tuple, saved: Tensors, tangents: Tensors, saved_t: Tensors, do: Tensor, do_t: Maybe, needs: Sequence[bool]
) -> Tensors:
    """Linear in (tangents, dO'): without tangents it is the gradient of dO'."""
    if saved_t[0] is not None:
        return along_backward(inputs, saved, tangents, saved_t, do, do_t, needs)[1]
    return (None, None, None) if do_t is None else backward(inputs, saved, do_t, needs)


def backward_dual(
    inputs: tuple, saved: Tensors, tangents: Tensors, saved_t: Tensors, do: Tensor, do_t: Maybe, needs: Sequence[bool]
) -> tuple[Tensors, Tensors]:
    if saved_t[0] is not None and do_t is not None:
        return along_backward(inputs, saved, tangents, saved_t, do, do_t, needs)
    dx_t = backward_jvp(inputs, saved, tangents, saved_t, do, do_t, needs)
    return backward(inputs, saved, do, needs), dx_t


flash_attention_op = twice_differentiable(
    forward,
    backward,
    jvp,
    backward_jvp,
    differentiable=3,
    forward_dual=forward_dual,
    backward_dual=backward_dual,
    saves_output=True,
)
