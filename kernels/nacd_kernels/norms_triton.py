"""RMSNorm and LayerNorm on a GPU: a program has one row in registers; formulas and names as in norms.py.

    outputs_kernel     y, r, m and/or their tangents    reads x and x' once
    gradients_kernel   dx and/or dx'                    reads x, x', dy and dy' once

A pointer that is None is compiled away, so the primal, the tangent and both together are variants of one kernel. Sums
are taken in float32, in one order. A row is one block: up to D = 8,192, the widest that fits without spills.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .norms import pair
from .twice import Maybe, Tensors, twice_differentiable

LIMIT = 8192  # D


def config(D: int) -> dict[str, int]:
    """The row's block and its warps: 16 elements a thread and tensor.

    Both chips alike. Chosen by registers; not timed on a GPU yet.
    """
    block = max(32, triton.next_power_of_2(D))
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def load(ptr, at, mask):
    return tl.load(ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def gain(w_ptr, offset, d, mask, BLOCK: tl.constexpr):
    """w + offset, or ones. Loaded again for every use: it is in the cache, and a row leaves few registers for it."""
    w = tl.full([BLOCK], 1.0, tl.float32)
    if w_ptr is not None:
        w = load(w_ptr, d, mask) + offset
    return w


@triton.jit
def outputs_kernel(
    x_ptr, w_ptr, b_ptr, x_t_ptr, y_ptr, y_t_ptr, r_ptr, m_ptr, r_t_ptr, m_t_ptr, D, eps, offset, BLOCK: tl.constexpr
):  # fmt: skip
    """x [P, D] -> y, r [P], m [P] and y', r', m'. Without y, r and m are read; without m_ptr it is RMSNorm."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    n = load(x_ptr, row * D + d, mask)
    if m_ptr is not None:
        m = tl.sum(n) / D if y_ptr is not None else tl.load(m_ptr + row)
        n = tl.where(mask, n - m, 0.0)
        if y_ptr is not None:
            tl.store(m_ptr + row, m)
    r = tl.rsqrt(tl.sum(n * n) / D + eps) if y_ptr is not None else tl.load(r_ptr + row)
    n *= r
    if y_ptr is not None:
        y = n * gain(w_ptr, offset, d, mask, BLOCK)
        if b_ptr is not None:
            y += load(b_ptr, d, mask)
        tl.store(y_ptr + row * D + d, y, mask=mask)
        tl.store(r_ptr + row, r)
    if x_t_ptr is not None:
        n_t = load(x_t_ptr, row * D + d, mask)
        xn = tl.sum(n_t * n) / D
        if m_ptr is not None:
            m_t = tl.sum(n_t) / D
            n_t -= m_t
            tl.store(m_t_ptr + row, m_t)
        n_t = (n_t - n * xn) * r
        tl.store(y_t_ptr + row * D + d, n_t * gain(w_ptr, offset, d, mask, BLOCK), mask=mask)
        tl.store(r_t_ptr + row, -r * r * xn)


@triton.jit
def gradients_kernel(
    x_ptr, w_ptr, x_t_ptr, dy_ptr, dy_t_ptr, r_ptr, m_ptr, r_t_ptr, m_t_ptr, dx_ptr, dx_t_ptr, D, offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx and dx' [P, D], those whose pointer is not None; x_t_ptr is not None where dx_t_ptr is not."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK)
    mask = d < D
    at = row * D + d
    r = tl.load(r_ptr + row)
    n = load(x_ptr, at, mask)
    if m_ptr is not None:
        n = tl.where(mask, n - tl.load(m_ptr + row), 0.0)
    n *= r
    g = load(dy_ptr, at, mask) * gain(w_ptr, offset, d, mask, BLOCK)
    gn = tl.sum(g * n) / D
    mean_g = 0.0
    if m_ptr is not None:
        mean_g = tl.sum(g) / D
    if dx_ptr is not None:
        tl.store(dx_ptr + at, r * (g - mean_g - n * gn), mask=mask)
    if dx_t_ptr is not None:
        x_t = load(x_t_ptr, at, mask)
        xn = -tl.load(r_t_ptr + row) / (r * r)
        e = tl.sum(g * x_t) / D - gn * xn
        if m_ptr is not None:
            e -= mean_g * tl.load(m_t_ptr + row)
        u = -r * (xn * g + gn * x_t)
        if dy_t_ptr is not None:
            u += load(dy_t_ptr, at, mask) * gain(w_ptr, offset, d, mask, BLOCK)
        out = u - n * (tl.sum(u * n) / D + r * e)
        if m_ptr is not None:
            out -= tl.sum(u) / D
        tl.store(dx_t_ptr + at, r * out, mask=mask)


def outputs(inputs: tuple, stats: Tensors | None, x_t: Maybe) -> tuple[Maybe, Tensors, Maybe, Tensors]:
    """y and stats (computed where stats are not given), y' and stats' (where there is a tangent)."""
    x, w, b, eps, offset, center = inputs
    y, y_t = like(x, stats is None), like(x, x_t is not None)
    count = 2 if center else 1
    stats_t = tuple(None if x_t is None else row_numbers(x) for _ in range(count))
    if stats is None:
        stats = tuple(row_numbers(x) for _ in range(count))
    tensors = (x, w, b, x_t)
    launch_rows(outputs_kernel, tensors, (y, y_t, *pair(stats), *pair(stats_t)), (float(eps), float(offset)))
    return y, stats, y_t, stats_t


def gradients(
    inputs: tuple, stats: Tensors, tangents: Tensors, stats_t: Tensors, dy: Tensor, dy_t: Maybe, primal: bool
) -> tuple[Maybe, Maybe]:
    """dx (if `primal`) and dx' (where x moves)."""
    x, w, _, _, offset, _ = inputs
    x_t = tangents[0]
    dx, dx_t = like(x, primal), like(x, x_t is not None)
    rest = (*pair(stats), *pair(stats_t), dx, dx_t)
    launch_rows(gradients_kernel, (x, w, x_t, dy, dy_t), rest, (float(offset),))
    return dx, dx_t


def like(x: Tensor, wanted: bool) -> Maybe:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None


def row_numbers(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def launch_rows(kernel: Any, tensors: Tensors, rest: Tensors, scalars: tuple[float, ...]) -> None:
    """Inputs that are not contiguous are copied: the kernels take rows that follow each other."""
    D = tensors[0].shape[-1]
    flat = (None if x is None else x.contiguous() for x in tensors)
    launch(kernel, (tensors[0].numel() // D,), *flat, *rest, D, *scalars, **config(D))


def forward(*inputs: Any) -> tuple[Tensor, Tensors]:
    return outputs(inputs, None, None)[:2]


def forward_dual(inputs: tuple, tangents: Tensors) -> tuple[Tensor, Tensors, Maybe, Tensors]:
    return outputs(inputs, None, tangents[0])


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Maybe, Tensors]:
    if tangents[0] is None:
        return None, tuple(None for _ in stats)
    return outputs(inputs, stats, tangents[0])[2:]


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    return gradients(inputs, stats, (None,), (None,), dy, None, True)[:1]


def backward_jvp(
    inputs: tuple, stats: Tensors, tangents: Tensors, stats_t: Tensors, dy: Tensor, dy_t: Maybe, needs: tuple[bool, ...]
) -> Tensors:
    if tangents[0] is None:
        return (None,) if dy_t is None else backward(inputs, stats, dy_t, needs)
    return gradients(inputs, stats, tangents, stats_t, dy, dy_t, False)[1:]


def backward_dual(
    inputs: tuple, stats: Tensors, tangents: Tensors, stats_t: Tensors, dy: Tensor, dy_t: Maybe, needs: tuple[bool, ...]
) -> tuple[Tensors, Tensors]:
    if tangents[0] is None:
        return backward(inputs, stats, dy, needs), backward_jvp(inputs, stats, tangents, stats_t, dy, dy_t, needs)
    dx, dx_t = gradients(inputs, stats, tangents, stats_t, dy, dy_t, True)
    return (dx,), (dx_t,)


norm_op = twice_differentiable(
    forward,
    backward,
    jvp,
    backward_jvp,
    differentiable=1,
    forward_dual=forward_dual,
    backward_dual=backward_dual,
)
