"""Rotary position embedding, twice differentiable in x: each pair of features turns by an angle of its position.

Su et al. (arXiv 2104.09864), equation 34, with the tables of Hugging Face transformers, cos and sin [T, R] of the R
features that turn (R <= d; the others pass through). The features of a pair are i and i + R/2, or, interleaved (GPT-J's
and GLM's order), 2 i and 2 i + 1. With rotate(a, b) = (-b, a) on each pair:

    y = x cos + rotate(x) sin        dx = dy cos - rotate(dy sin)

dx is the transpose of y's map, whether or not the two features of a pair have the same angle; where they have, it is
the rotation back. The map is linear: y' is the map of x', dx' that of dy', and x itself is not needed.

B batch, H heads, T tokens, d head width. 16-bit inputs are computed in float32 and rounded once (transformers rounds
each product).
"""

import torch
from torch import Tensor

from .checks import check, check_frozen
from .dispatch import use_triton
from .pieces import wide
from .twice import Maybe, Tensors, twice_differentiable


def halves(x: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """First and second features of the pairs: views [..., R/2]."""
    half = x.shape[-1] // 2
    return (x[..., ::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])


def turn(x: Maybe, cos: Tensor, sin: Tensor, interleaved: bool, *, back: bool) -> Maybe:
    """The map, or (back) its transpose, of x [B, H, T, d]; cos, sin [1 or B, 1, T, R]."""
    if x is None:
        return None
    width = cos.shape[-1]
    turned, c, s = (wide(t) for t in (x[..., :width], cos, sin))
    out = turned * c
    (a, b), (sa, sb), (ya, yb) = (halves(t, interleaved) for t in (turned, s, out))
    if back:
        ya.addcmul_(b, sb)
        yb.addcmul_(a, sa, value=-1)
    else:
        ya.addcmul_(b, sa, value=-1)
        yb.addcmul_(a, sb)
    if width == x.shape[-1]:
        return out.to(x.dtype)
    return torch.cat((out.to(x.dtype), x[..., width:]), -1)


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensors]:
    return turn(x, cos, sin, interleaved, back=False), ()


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    return (turn(dy, *inputs[1:], back=True),)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Maybe, Tensors]:
    return turn(tangents[0], *inputs[1:], back=False), ()


def backward_jvp(
    inputs: tuple,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    dy: Tensor,
    dy_t: Maybe,
    needs: tuple[bool, ...],
) -> Tensors:
    return (turn(dy_t, *inputs[1:], back=True),)


_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=1)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """x turned by its positions' angles; twice differentiable in x.

    x [B, H, T, d]; cos, sin [T, R] or [B, T, R], frozen, with R even and at most d: the first R features turn. Returns
    x's shape and dtype. Raises ValueError on other shapes and devices, and on tables that require a gradient.
    """
    check(x.ndim == 4, f"x is {tuple(x.shape)}: must be [B, H, T, d]")
    B, _, T, d = x.shape
    for name, t in (("cos", cos), ("sin", sin)):
        width = t.shape[-1] if t.ndim else 0
        fits = tuple(t.shape[:-1]) in ((T,), (1, T), (B, T)) and 0 < width <= d and width % 2 == 0
        check(fits, f"{name} is {tuple(t.shape)}: must be [{T}, R] or [{B}, {T}, R] with R even and at most {d}")
        check(t.device == x.device, f"{name} is on {t.device}, x on {x.device}")
        check_frozen(name, t)
    check(cos.shape == sin.shape, f"cos is {tuple(cos.shape)}, sin {tuple(sin.shape)}: must be one shape")
    tables = (t[None, None] if t.ndim == 2 else t[:, None] for t in (cos, sin))
    if use_triton(x):
        from .rotary_triton import rotary_op  # Triton is needed only from here

        return rotary_op(x, *tables, interleaved)
    return _op(x, *tables, interleaved)
