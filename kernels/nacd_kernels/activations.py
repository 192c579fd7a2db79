"""Elementwise activations, twice differentiable: silu_mul (the gated MLP of Llama) and relu.

silu_mul: Shazeer (arXiv 2002.05202), SwiGLU without the projections. With s = sigmoid(g):

    f = g s        f1 = s + f (1 - s)        f2 = s (1 - s) (2 + g (1 - 2 s))
    y = f u        dg = dy u f1              du = dy f
    dg' = dy' u f1 + dy (u' f1 + u f2 g')    du' = dy' f + dy f1 g'

PyTorch's own silu has no forward-mode formula for its backward, so a Llama fails there without this op. relu's second
derivative is 0: y' = [x > 0] x', dx = [x > 0] dy, dx' = [x > 0] dy' (and 0 at x = 0, as in PyTorch).
"""

import torch
from torch import Tensor

from .checks import check, check_like
from .twice import Tensors, add, times, twice_differentiable


def forward(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensors]:
    return torch.nn.functional.silu(gate).mul_(up), ()


def derivatives(gate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s, f and f1."""
    s = torch.sigmoid(gate)
    f = gate * s
    return s, f, torch.addcmul(s, f, 1 - s)


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    gate, up = inputs
    _, f, f1 = derivatives(gate)
    return (f1.mul_(up).mul_(dy) if needs[0] else None), (f.mul_(dy) if needs[1] else None)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    gate, up = inputs
    gate_t, up_t = tangents
    _, f, f1 = derivatives(gate)
    return add(None if gate_t is None else f1.mul_(up).mul_(gate_t), times(up_t, f)), ()


def backward_jvp(
    inputs: tuple,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    dy: Tensor,
    dy_t: Tensor | None,
    needs: tuple[bool, ...],
) -> Tensors:
    gate, up = inputs
    gate_t, up_t = tangents
    s, f, f1 = derivatives(gate)
    d_gate = d_up = None
    if needs[0]:
        through_f1 = add(times(dy_t, up), times(up_t, dy))
        d_gate = None if through_f1 is None else through_f1.mul_(f1)
        if gate_t is not None:
            f2 = s * (1 - s) * (2 + gate * (1 - 2 * s))
            d_gate = add(d_gate, f2.mul_(gate_t).mul_(up).mul_(dy))
    if needs[1]:
        d_up = add(times(dy_t, f), None if gate_t is None else f1.mul_(gate_t).mul_(dy))
    return d_gate, d_up


_silu_mul = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=2)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, twice differentiable in both. gate, up [...]: one shape, dtype and device; so is the result."""
    check(gate.shape == up.shape, f"gate is {tuple(gate.shape)}, up {tuple(up.shape)}: must be one shape")
    check_like("up", up, "gate", gate)
    return _silu_mul(gate, up)


def _relu_backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    return (torch.where(inputs[0] > 0, dy, 0),)


_relu = twice_differentiable(
    forward=lambda x: (torch.relu(x), ()),
    backward=_relu_backward,
    jvp=lambda inputs, stats, tangents: (
        None if tangents[0] is None else torch.where(inputs[0] > 0, tangents[0], 0),
        (),
    ),
    backward_jvp=lambda inputs, stats, tangents, stats_t, dy, dy_t, needs: (
        (None,) if dy_t is None else _relu_backward(inputs, stats, dy_t, needs)
    ),
    differentiable=1,
)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), twice differentiable. x [...]; the result is alike."""
    return _relu(x)
