"""The activations on a GPU: flat kernels, a block of elements a program; formulas and names as in activations.py.

    outputs_kernel     y and/or y'                 reads g, u and the tangents there are, each once
    gradients_kernel   dg, du and/or dg', du'      reads the same and dy, dy', each once

A pointer that is None is compiled away, so the primal, the tangent and both together are variants of one kernel. What
moves the memory is all that counts here: everything is computed in float32 in registers and rounded once.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import triton
import triton.language as tl

from .activations import Activation
from .launch import launch
from .twice import Maybe

# Elements a program, and its warps: 8 elements a thread, one 16-byte load of a 16-bit tensor. Both chips alike; chosen
# by registers, not timed on a GPU yet.
BLOCK, WARPS = 1024, 4


@triton.jit
def load(ptr, at, n):
    return tl.load(ptr + at, mask=at < n, other=0.0).to(tl.float32)


@triton.jit
def curve(g, KIND: tl.constexpr):
    """f, f1 and f2."""
    K: tl.constexpr = 0.7978845608028654  # sqrt(2 / pi)
    if KIND == "relu":
        # NaN stays NaN, as in PyTorch
        f1 = tl.where(g <= 0, 0.0, 1.0)
        f, f2 = tl.where(g <= 0, 0.0, g), tl.zeros_like(g)
    elif KIND == "gelu":
        below = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        p = tl.exp(-0.5 * g * g) * 0.3989422804014327
        # (g p) g: p underflows to 0 before g^2 overflows
        f, f1, f2 = g * below, below + g * p, 2 * p - (g * p) * g
    else:
        square = tl.minimum(g * g, 1e4)  # s is 0 or 1 long before
        z1 = tl.full(g.shape, 1.0, tl.float32) if KIND == "silu" else 2 * K + 6 * K * 0.044715 * square
        z = g if KIND == "silu" else g * (2 * K + 2 * K * 0.044715 * square)
        e = tl.exp(-tl.abs(z))
        s = tl.where(z < 0, e, 1.0) / (1 + e)
        q = e / ((1 + e) * (1 + e))  # s (1 - s), which cancels where s is near 1
        bend = g * q * z1
        twice = 2.0 if KIND == "silu" else 4 * (z1 - K)  # 2 z1 + g z2
        f, f1, f2 = g * s, s + bend, q * twice + bend * z1 * (1 - 2 * s)
    return f, f1, f2


@triton.jit
def outputs_kernel(
    g_ptr, u_ptr, g_t_ptr, u_t_ptr, y_ptr, y_t_ptr, n, KIND: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y and y' of n elements; u_ptr is None for an activation by itself."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f, f1, _ = curve(load(g_ptr, at, n), KIND)
    u = tl.full([BLOCK], 1.0, tl.float32)
    if u_ptr is not None:
        u = load(u_ptr, at, n)
    if y_ptr is not None:
        tl.store(y_ptr + at, f * u, mask=at < n)
    if y_t_ptr is not None:
        y_t = tl.zeros([BLOCK], tl.float32)
        if g_t_ptr is not None:
            y_t += f1 * u * load(g_t_ptr, at, n)
        if u_t_ptr is not None:
            y_t += f * load(u_t_ptr, at, n)
        tl.store(y_t_ptr + at, y_t, mask=at < n)


@triton.jit
def gradients_kernel(
    g_ptr, u_ptr, g_t_ptr, u_t_ptr, dy_ptr, dy_t_ptr, dg_ptr, du_ptr, dg_t_ptr, du_t_ptr, n,
    KIND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dg, du, dg' and du' of n elements, those whose pointer is not None."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f, f1, f2 = curve(load(g_ptr, at, n), KIND)
    dy = load(dy_ptr, at, n)
    zero = tl.zeros([BLOCK], tl.float32)
    u, g_t, u_t, dy_t = zero + 1, zero, zero, zero
    if u_ptr is not None:
        u = load(u_ptr, at, n)
    if g_t_ptr is not None:
        g_t = load(g_t_ptr, at, n)
    if u_t_ptr is not None:
        u_t = load(u_t_ptr, at, n)
    if dy_t_ptr is not None:
        dy_t = load(dy_t_ptr, at, n)
    if dg_ptr is not None:
        tl.store(dg_ptr + at, dy * u * f1, mask=at < n)
    if du_ptr is not None:
        tl.store(du_ptr + at, dy * f, mask=at < n)
    if dg_t_ptr is not None:
        tl.store(dg_t_ptr + at, (dy_t * u + dy * u_t) * f1 + dy * u * f2 * g_t, mask=at < n)
    if du_t_ptr is not None:
        tl.store(du_t_ptr + at, dy_t * f + dy * f1 * g_t, mask=at < n)


def run(kernel: Any, kind: str, tensors: Sequence[Maybe], outs: Sequence[Maybe]) -> None:
    """Inputs that are not contiguous are copied: the kernels go through memory in order."""
    n = tensors[0].numel()
    flat = (None if x is None else x.contiguous() for x in tensors)
    launch(kernel, (triton.cdiv(n, BLOCK),), *flat, *outs, n, num_warps=WARPS, KIND=kind, BLOCK=BLOCK)


activation = Activation(partial(run, outputs_kernel), partial(run, gradients_kernel), gated=False)
gated = Activation(partial(run, outputs_kernel), partial(run, gradients_kernel), gated=True)
activation_op, gated_op = activation.op(), gated.op()
