"""RMSNorm and LayerNorm with a frozen affine part, twice differentiable in x.

RMSNorm: Zhang and Sennrich (arXiv 1910.07467), equation 4; LayerNorm: Ba et al. (arXiv 1607.06450). With r the
reciprocal deviation, n = r (x - mean(x)) (RMSNorm: no mean), <u> the mean over the last axis and g = dy w:

    y = n w + b                      dx = r (g - <g> - n <g n>)           (RMSNorm: no <g>)
    n' = r (x' - <x'> - n <x' n>)    r' = -r^2 <x' n>
    dx' = r'/r dx + r (g' - <g'> - n' <g n> - n <g' n + g n'>)

The statistics are computed in float32 for 16-bit inputs, and in the input's own type otherwise.
"""

import torch
from torch import Tensor

from .checks import check, check_frozen
from .twice import Maybe, Tensors, times, twice_differentiable


def wide(x: Maybe) -> Maybe:
    """float32 for 16-bit tensors."""
    return x.float() if x is not None and x.dtype in (torch.float16, torch.bfloat16) else x


def mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def dot(x: Tensor, y: Tensor) -> Tensor:
    """<x y>, the mean of the product over the last axis; x, y [..., D] -> [..., 1]."""
    return torch.linalg.vecdot(x, y).unsqueeze_(-1).div_(x.shape[-1])


def project(x: Tensor, n: Tensor, along: Tensor, center: bool) -> Tensor:
    """x - <x> - n `along` (without <x> unless center)."""
    out = torch.addcmul(x, n, along, value=-1)
    return out.sub_(mean(x)) if center else out


def normalised(x: Tensor, mu: Tensor | None, r: Tensor) -> Tensor:
    return x * r if mu is None else (x - mu).mul_(r)


def forward(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, center: bool) -> tuple[Tensor, Tensors]:
    xw = wide(x)
    mu = mean(xw) if center else None
    n = xw if mu is None else xw - mu
    r = dot(n, n).add_(eps).rsqrt_()
    n = n * r
    y = n.clone() if w is None else n * wide(w)
    y = y if b is None else y + wide(b)
    return y.to(x.dtype), (n, r)


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    x, w, _, _, center = inputs
    n, r = stats
    g = wide(dy) if w is None else wide(dy) * wide(w)
    return (project(g, n, dot(g, n), center).mul_(r).to(x.dtype),)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    x, w, _, _, center = inputs
    n, r = stats
    x_t = wide(tangents[0])
    if x_t is None:
        return None, (None, None)
    along = dot(x_t, n)
    n_t = project(x_t, n, along, center).mul_(r)
    y_t = n_t.clone() if w is None else n_t * wide(w)
    return y_t.to(x.dtype), (n_t, along.mul_(r).mul_(r).neg_())


def backward_jvp(
    inputs: tuple,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    dy: Tensor,
    dy_t: Tensor | None,
    needs: tuple[bool, ...],
) -> Tensors:
    x, w, _, _, center = inputs
    (n, r), (n_t, r_t) = stats, stats_t
    g, g_t = (times(wide(t), wide(w)) if w is not None else wide(t) for t in (dy, dy_t))
    dx_t = None if g_t is None else project(g_t, n, dot(g_t, n), center)
    if n_t is not None:
        gn = dot(g, n)
        moved = n_t * gn + n * dot(g, n_t)
        dx_t = moved.neg_() if dx_t is None else dx_t.sub_(moved)
        dx_t = dx_t.mul_(r).addcmul_(project(g, n, gn, center), r_t)
    elif dx_t is not None:
        dx_t = dx_t.mul_(r)
    return (None if dx_t is None else dx_t.to(x.dtype),)


_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=1)


def rms_norm(x: Tensor, w: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last axis; twice differentiable in x.

    x [..., D], w [D] (frozen) or None. Returns x's shape and dtype. Raises ValueError on a w of another size.
    """
    return _norm(x, w, None, eps, False)


def layer_norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x - mean(x)) / sqrt(var(x) + eps) * w + b over the last axis (biased variance); twice differentiable in x.

    x [..., D], w, b [D] (frozen) or None. Returns x's shape and dtype. Raises ValueError on w, b of another size.
    """
    return _norm(x, w, b, eps, True)


def _norm(x: Tensor, w: Tensor | None, b: Tensor | None, eps: float, center: bool) -> Tensor:
    for name, t in (("w", w), ("b", b)):
        check(t is None or tuple(t.shape) == (x.shape[-1],), f"{name} must be [{x.shape[-1]}], the last axis of x")
        check_frozen(name, t)
    return _op(x, w, b, float(eps), center)
