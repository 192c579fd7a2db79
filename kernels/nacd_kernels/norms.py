"""RMSNorm and LayerNorm with a frozen affine part, twice differentiable in x.

RMSNorm: Zhang and Sennrich (arXiv 1910.07467), equation 4; LayerNorm: Ba et al. (arXiv 1607.06450). With m the mean, r
the reciprocal deviation, n = r (x - m) (RMSNorm: m = 0), <u> the mean of u over the last axis, g = dy w, and the
projection P(u) = u - <u> - n <u n> (RMSNorm: no <u>):

    y = n w + b          dx = r P(g)
    n' = r P(x')         m' = <x'>          r' = -r^2 <x' n>
    dx' = r P(g' - r <x' n> g - r <g n> x') - r e n           with e = <dx x'> = r (<g x'> - <g> <x'> - <g n> <x' n>)

The last line is d(r P(g)) with r' and n' written out and P taken out of the three terms that have it. Only r (and m)
are kept: n is x with a row's two numbers, so a retained graph holds one tensor fewer a norm, and no pass is slower for
it.

16-bit inputs are computed in float32 and rounded once, as Gemma does; transformers' Llama rounds n to 16 bits before it
multiplies by w, so there the results differ by that rounding.
"""

import torch
from torch import Tensor

from .checks import check, check_frozen
from .dispatch import use_triton
from .pieces import wide
from .twice import Maybe, Tensors, twice_differentiable

aten = torch.ops.aten


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x y>, the mean of the product over the last axis; x, y [..., D] -> [..., 1]."""
    return torch.linalg.vecdot(x, y).unsqueeze_(-1).div_(x.shape[-1])


def gain(x: Tensor, w: Maybe, offset: float = 0.0) -> Maybe:
    """w + offset in the type computed in; None for ones."""
    if w is None:
        return None
    w = w.to(torch.promote_types(x.dtype, torch.float32))
    return w + offset if offset else w


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def centred(x: Tensor, m: Maybe) -> Tensor:
    """n / r. Sums are taken over it and not over x, or they would cancel where the mean is large."""
    return x if m is None else x - m


def project(u: Tensor, x: Tensor, m: Maybe, r: Tensor, w: Maybe = None, un: Maybe = None) -> Tensor:
    """r P(u w): for LayerNorm PyTorch's one pass; for RMSNorm with un = <u w n>, where that is known."""
    if m is not None:
        return aten.native_layer_norm_backward(u, x, x.shape[-1:], m, r, w, None, [True, False, False])[0]
    g = u if w is None else u * w
    un = dot(g, x).mul_(r) if un is None else un
    return (g * r if w is None else g.mul_(r)).addcmul_(x, un * r.square(), value=-1)


def pair(stats: Tensors) -> tuple[Tensor, Maybe]:
    """r and m of the statistics, or of their tangents: RMSNorm has no m."""
    return stats[0], stats[1] if len(stats) > 1 else None


def forward(x: Tensor, w: Maybe, b: Maybe, eps: float, offset: float, center: bool) -> tuple[Tensor, Tensors]:
    xw, w = wide(x), gain(x, w, offset)
    if center:
        y, m, r = torch.native_layer_norm(xw, x.shape[-1:], w, gain(x, b), eps)
        return y.to(x.dtype), (r, m)
    r = dot(xw, xw).add_(eps).rsqrt_()
    y = xw * r
    return (y if w is None else y.mul_(w)).to(x.dtype), (r,)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Maybe, Tensors]:
    x, w, _, _, offset, _ = inputs
    r, m = pair(stats)
    x_t = wide(tangents[0])
    if x_t is None:
        return None, tuple(None for _ in stats)
    x, w, dtype = wide(x), gain(x, w, offset), x.dtype
    xn = dot(x_t, centred(x, m)).mul_(r)
    n_t = project(x_t, x, m, r, None, xn)
    y_t = n_t if w is None else n_t.mul_(w)
    r_t = xn.mul_(r).mul_(r).neg_()
    return y_t.to(dtype), (r_t,) if m is None else (r_t, mean(x_t))


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    x, w, _, _, offset, _ = inputs
    r, m = pair(stats)
    return (project(wide(dy), wide(x), m, r, gain(x, w, offset)).to(x.dtype),)


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


def gradients(
    inputs: tuple, stats: Tensors, tangents: Tensors, stats_t: Tensors, dy: Tensor, dy_t: Maybe, primal: bool
) -> tuple[Maybe, Tensor]:
    """dx (if `primal`) and dx', where x moves."""
    x, w, _, _, offset, _ = inputs
    (r, m), (r_t, m_t), dtype = pair(stats), pair(stats_t), x.dtype
    x, w, x_t, dy, dy_t = wide(x), gain(x, w, offset), wide(tangents[0]), wide(dy), wide(dy_t)
    g = dy if w is None else dy * w
    c = centred(x, m)
    gn, xn = dot(g, c).mul_(r), (r_t / r.square()).neg_()
    e = dot(g, x_t)
    e = (e if m is None else e.sub_(mean(g) * m_t)).addcmul_(gn, xn, value=-1).mul_(r)
    u = g * (r * xn).neg_() if dy_t is None else torch.addcmul(dy_t if w is None else dy_t * w, g, r * xn, value=-1)
    u.addcmul_(x_t, r * gn, value=-1)
    dx = project(g, x, m, r, None, gn).to(dtype) if primal else None
    return dx, project(u, x, m, r).addcmul_(c, e.mul_(r).mul_(r), value=-1).to(dtype)


_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=1, backward_dual=backward_dual)


def rms_norm(x: Tensor, w: Tensor | None, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (w + offset) over the last axis; twice differentiable in x.

    x [..., D], w [D] (frozen) or None (ones, whatever the offset). offset is 1 in Gemma. Returns x's shape and dtype.
    Raises ValueError on a w of another size, and beyond D = 8,192 where the Triton kernels run.
    """
    return _norm(x, w, None, eps, offset, False)


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * w + b over the last axis (biased variance); twice differentiable in x.

    x [..., D], w, b [D] (frozen) or None. Returns x's shape and dtype. Raises ValueError on w, b of another size, and
    beyond D = 8,192 where the Triton kernels run.
    """
    return _norm(x, w, b, eps, 0.0, True)


def _norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, offset: float, center: bool) -> Tensor:
    check(x.ndim > 0 and x.shape[-1] > 0, f"x is {tuple(x.shape)}: must be [..., D] with D > 0")
    for name, t in (("w", w), ("b", b)):
        check(t is None or tuple(t.shape) == (x.shape[-1],), f"{name} must be [{x.shape[-1]}], the last axis of x")
        check(t is None or t.device == x.device, f"{name} is on another device than x, {x.device}")
        check_frozen(name, t)
    inputs = (x, w, b, float(eps), float(offset), center)
    if use_triton(x):
        from .norms_triton import LIMIT, norm_op  # Triton is needed only from here

        D = x.shape[-1]
        check(D <= LIMIT, f"x has {D} features, and the kernels take up to {LIMIT}; NACD_KERNELS=reference takes more")
        return norm_op(*inputs)
    return _op(*inputs)
