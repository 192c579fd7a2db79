"""A frozen linear layer with a low-rank adapter, twice differentiable in x, A and B.

    y = x W^T + bias + s (x A^T) B^T

Hu et al., LoRA (arXiv 2106.09685), section 4.1. With h = x A^T and g = dy B:

    dx = dy W + s g A          dA = s g^T x          dB = s dy^T h
    y' = x' W^T + s (h' B^T + h B'^T)                h' = x' A^T + x A'^T
    dx' = dy' W + s (g' A + g A')                    g' = dy' B + dy B'
    dA' = s (g'^T x + g^T x')                        dB' = s (dy'^T h + dy^T h')

M rows, D_in and D_out features, R rank. The frozen weight takes part in one product a row and pass: forward, backward,
and one more each for their tangents.
"""

import torch
from torch import Tensor

from .checks import check_lora
from .twice import Tensors, add, matmul, times, twice_differentiable


def rows(x: Tensor) -> Tensor:
    """[..., D] -> [M, D]."""
    return x.reshape(-1, x.shape[-1])


def forward(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensors]:
    x2 = rows(x)
    h = x2.to(a.dtype) @ a.T
    y = torch.mm(x2, w.T) if bias is None else torch.addmm(bias, x2, w.T)
    y.addmm_(h.to(y.dtype), b.T.to(y.dtype), alpha=scale)
    return y.view(*x.shape[:-1], w.shape[0]), (h,)


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    x, a, b, w, _, scale = inputs
    (h,) = stats
    dy2, x2 = rows(dy), rows(x)
    dya = dy2.to(a.dtype)
    g = (dya @ b).mul_(scale)
    dx = torch.mm(dy2, w).addmm_(g.to(dy.dtype), a.to(dy.dtype)).view(x.shape) if needs[0] else None
    da = g.T @ x2.to(a.dtype) if needs[1] else None
    db = (dya.T @ h).mul_(scale) if needs[2] else None
    return dx, da, db


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    x, a, b, w, _, scale = inputs
    (h,) = stats
    x_t, a_t, b_t = tangents
    x2 = rows(x).to(a.dtype)
    x2_t = None if x_t is None else rows(x_t)
    h_t = add(matmul(None if x2_t is None else x2_t.to(a.dtype), a.T), None if a_t is None else x2 @ a_t.T)
    low = add(matmul(h_t, b.T), None if b_t is None else h @ b_t.T)
    y_t = None if x2_t is None else torch.mm(x2_t, w.T)
    if low is not None:
        y_t = low.mul_(scale).to(x.dtype) if y_t is None else y_t.add_(low.to(y_t.dtype), alpha=scale)
    return (None if y_t is None else y_t.view(*x.shape[:-1], w.shape[0])), (h_t,)


def backward_jvp(
    inputs: tuple,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    dy: Tensor,
    dy_t: Tensor | None,
    needs: tuple[bool, ...],
) -> Tensors:
    x, a, b, w, _, scale = inputs
    (h,), (h_t,) = stats, stats_t
    x_t, a_t, b_t = tangents
    dy2 = rows(dy).to(a.dtype)
    dy2_t = None if dy_t is None else rows(dy_t)
    dya_t = None if dy2_t is None else dy2_t.to(a.dtype)
    g = dy2 @ b
    g_t = add(matmul(dya_t, b), matmul(dy2, b_t))
    dx = da = db = None
    if needs[0]:
        low = add(matmul(g_t, a), matmul(g, a_t))
        dx = None if dy2_t is None else torch.mm(dy2_t, w)
        if low is not None:
            dx = low.mul_(scale).to(x.dtype) if dx is None else dx.add_(low.to(dx.dtype), alpha=scale)
        dx = None if dx is None else dx.view(x.shape)
    if needs[1]:
        da = times(
            add(
                None if g_t is None else g_t.T @ rows(x).to(a.dtype),
                None if x_t is None else g.T @ rows(x_t).to(a.dtype),
            ),
            scale,
        )
    if needs[2]:
        db = times(add(None if dya_t is None else dya_t.T @ h, None if h_t is None else dy2.T @ h_t), scale)
    return dx, da, db


_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=3)


def lora_linear(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """y = x W^T + bias + scale (x A^T) B^T, twice differentiable in x, a and b; w and bias are frozen.

    x [..., D_in], w [D_out, D_in], bias [D_out] or None: one float dtype; a [R, D_in], b [D_out, R]: that dtype or
    float32. Returns [..., D_out] in x's dtype. Raises ValueError if shapes, dtypes or devices disagree.
    """
    check_lora(x, w, bias, a, b)
    return _op(x, a, b, w, bias, float(scale))
