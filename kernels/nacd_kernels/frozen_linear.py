"""A linear layer whose weight is frozen, twice differentiable in x: y = x W^T + bias.

The tangents are the same product (y' = x' W^T, dx' = dy' W). PyTorch's own linear computes this too, but its tangents
record a graph that a dual pass never reads.
"""

import torch
from torch import Tensor

from .checks import check, check_frozen, check_like
from .twice import Tensors, twice_differentiable


def forward(x: Tensor, w: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensors]:
    return torch.nn.functional.linear(x, w, bias), ()


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    return (dy @ inputs[1],)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    (x_t,) = tangents
    return (None if x_t is None else torch.nn.functional.linear(x_t, inputs[1])), ()


def backward_jvp(
    inputs: tuple,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    dy: Tensor,
    dy_t: Tensor | None,
    needs: tuple[bool, ...],
) -> Tensors:
    return (None if dy_t is None else dy_t @ inputs[1],)


_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=1)


def frozen_linear(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias. x [..., D_in], w [D_out, D_in], bias [D_out] or None: one float dtype, w and bias frozen.

    Returns [..., D_out]. Raises ValueError if shapes, dtypes or devices disagree.
    """
    check(
        w.ndim == 2 and x.shape[-1] == w.shape[1],
        f"x has {x.shape[-1]} features, w is {tuple(w.shape)}: must be [D_out, {x.shape[-1]}]",
    )
    check(bias is None or tuple(bias.shape) == (w.shape[0],), f"bias must be [{w.shape[0]}]")
    check_like("w", w, "x", x)
    check_frozen("w", w)
    check_frozen("bias", bias)
    return _op(x, w, bias)
