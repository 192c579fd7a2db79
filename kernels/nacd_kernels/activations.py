"""Elementwise activations, twice differentiable: relu, gelu, and the gated MLPs' silu_mul and gelu_mul.

With f the activation of g, f1 and f2 its first and second derivative, and u the other factor (1 for gelu):

    y = f u                              y' = f1 u g' + f u'
    dg = dy u f1                         du = dy f
    dg' = (dy' u + dy u') f1 + dy u f2 g'    du' = dy' f + dy f1 g'

silu and tanh-gelu (GPT-2's gelu_new) are g times a sigmoid: with s = sigmoid(z), q = s (1 - s), k = sqrt(2 / pi),

    silu   z = g                         z1 = 1                         z2 = 0
    tanh   z = 2 k (g + 0.044715 g^3)    z1 = 2 k (1 + 0.134145 g^2)    z2 = 0.53658 k g
    f = g s      f1 = s + g q z1         f2 = q (2 z1 + g z2) + g q z1^2 (1 - 2 s)

and the exact gelu, with Phi the normal distribution and p its density, has

    f = g Phi    f1 = Phi + g p          f2 = p (2 - g^2)

relu's second derivative is 0, and so is its first at 0, as in PyTorch. Sources: Hendrycks and Gimpel (arXiv
1606.08415); Shazeer (arXiv 2002.05202), the gated variants without their projections. PyTorch's own silu has no
forward-mode formula for its backward, so a Llama fails there. 16-bit inputs are computed in float32 and rounded once.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check, check_like
from .dispatch import use_triton
from .pieces import cut, pieces, put
from .twice import Maybe, Tensors, add, times, twice_differentiable

CUBE = 0.044715  # of tanh-gelu
K = math.sqrt(2 / math.pi)
APPROXIMATIONS = {"none": "gelu", "tanh": "gelu_tanh"}
aten = torch.ops.aten


def curve(kind: str, g: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """f, f1 and (if `second`) f2 at g; fresh tensors."""
    return gelu_curve(g, second) if kind == "gelu" else sigmoid_curve(kind, g, second)


def gelu_curve(g: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    below = torch.mul(g, math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
    p = (g * g).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    gp = g * p
    # (g p) g: p underflows to 0 before g^2 overflows
    f2 = p.mul_(2).addcmul_(gp, g, value=-1) if second else None
    return g * below, below.add_(gp), f2


def sigmoid_curve(kind: str, g: Tensor, second: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    if kind == "silu":
        z1, s = None, torch.sigmoid(g)
    else:
        square = (g * g).clamp_(max=1e4)  # s is 0 or 1 long before, and q z1 stays 0 where it would become 0 inf
        z1 = (square * (6 * K * CUBE)).add_(2 * K)
        s = square.mul_(2 * K * CUBE).add_(2 * K).mul_(g).sigmoid_()
    q = torch.addcmul(s, s, s, value=-1)
    bend = g * q if z1 is None else (g * q).mul_(z1)
    f2 = None
    if second and z1 is None:
        f2 = q.mul_(2).add_(bend).addcmul_(bend, s, value=-2)
    elif second:
        assert z1 is not None
        # 2 z1 + g z2 = 4 (z1 - k)
        f2 = torch.addcmul(bend, bend, s, value=-2).mul_(z1).addcmul_(q, z1, value=4).add_(q, alpha=-4 * K)
    return g * s, s.add_(bend), f2


def value(kind: str, g: Tensor) -> Tensor:
    """f at g, as a fresh tensor. PyTorch's own tanh-gelu takes several times longer on a CPU."""
    if kind != "gelu_tanh":
        return F.gelu(g) if kind == "gelu" else F.silu(g)
    return (g * g).mul_(2 * K * CUBE).add_(2 * K).mul_(g).sigmoid_().mul_(g)


def slope_times(kind: str, g: Tensor, v: Tensor) -> Tensor:
    """f1(g) v alone, for which PyTorch has fused loops."""
    if kind != "gelu_tanh":
        return aten.gelu_backward(v, g) if kind == "gelu" else aten.silu_backward(v, g)
    return curve(kind, g, False)[1].mul_(v)


def flat(x: Maybe) -> Maybe:
    return None if x is None else x.reshape(-1)


def like(x: Tensor, wanted: bool) -> Maybe:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None


def outputs(kind: str, gate: Tensor, up: Maybe, gate_t: Maybe, up_t: Maybe, primal: bool) -> tuple[Maybe, Maybe]:
    """y (if `primal`) and y' (if there is a tangent); up is None for an activation by itself."""
    y, y_t = like(gate, primal), like(gate, gate_t is not None or up_t is not None)
    flats = [flat(x) for x in (gate, up, gate_t, up_t)]
    out, out_t = flat(y), flat(y_t)
    for part in pieces(gate, gate.numel()):
        g, u, g_t, u_t = cut(part, *flats)
        if g_t is None:
            f, moved = value(kind, g), None
        elif up is None and not primal:
            out_t[part] = slope_times(kind, g, g_t)
            continue
        else:
            f, f1, _ = curve(kind, g, False)
            moved = f1.mul_(g_t)
        if y_t is not None:
            if up is None:
                out_t[part] = moved
            else:
                put(out_t[part], (moved, u), (f, u_t))
        if primal:
            out[part] = f if up is None else f.mul_(u)
    return y, y_t


def gradients(
    kind: str,
    gate: Tensor,
    up: Maybe,
    gate_t: Maybe,
    up_t: Maybe,
    dy: Tensor,
    dy_t: Maybe,
    needs: tuple[bool, ...],
    primal: bool,
    tangent: bool,
) -> tuple[Tensors, Tensors]:
    """(dg, du) if `primal` and (dg', du') if `tangent`, each only where it is needed and not zero."""
    curved, linear = gate_t is not None, dy_t is not None
    d_gate, d_up = like(gate, primal and needs[0]), like(gate, primal and needs[1])
    d_gate_t = like(gate, tangent and needs[0] and (curved or linear or up_t is not None))
    d_up_t = like(gate, tangent and needs[1] and (curved or linear))
    flats = [flat(x) for x in (gate, up, gate_t, up_t, dy, dy_t)]
    outs = [flat(x) for x in (d_gate, d_up, d_gate_t, d_up_t)]
    for part in pieces(gate, gate.numel()):
        g, u, g_t, u_t, d, d_t = cut(part, *flats)
        dg, du, dg_t, du_t = (None if x is None else x[part] for x in outs)
        if up is None and not curved:
            for out, v in ((dg, d), (dg_t, d_t)):
                if out is not None:
                    out.copy_(slope_times(kind, g, v))
            continue
        f, f1, f2 = curve(kind, g, curved and dg_t is not None)
        scaled, scaled_t = (d, d_t) if u is None else (d * u, add(times(d_t, u), times(d, u_t)))
        put(dg, (f1, scaled))
        put(du, (f, d))
        put(dg_t, (f1, scaled_t), (None if f2 is None else f2.mul_(g_t), scaled))
        put(du_t, (f, d_t), (f1.mul_(g_t) if curved else None, d))
    return (d_gate, d_up), (d_gate_t, d_up_t)


class Activation:
    """The functions of an op, from `outputs` and `gradients` as above, of the reference or of the kernels.

    Inputs (gate, up, kind) if `gated`, else (x, kind).
    """

    def __init__(self, outputs: Callable[..., tuple], gradients: Callable[..., tuple], gated: bool):
        self.outputs, self.gradients, self.gated = outputs, gradients, gated

    def pair(self, tensors: tuple) -> tuple[Maybe, Maybe]:
        return (tensors[0], tensors[1]) if self.gated else (tensors[0], None)

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensors]:
        return self.outputs(inputs[-1], *self.pair(inputs), None, None, True)[0], ()

    def forward_dual(self, inputs: tuple, tangents: Tensors) -> tuple[Tensor, Tensors, Maybe, Tensors]:
        y, y_t = self.outputs(inputs[-1], *self.pair(inputs), *self.pair(tangents), True)
        return y, (), y_t, ()

    def jvp(self, inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Maybe, Tensors]:
        return self.outputs(inputs[-1], *self.pair(inputs), *self.pair(tangents), False)[1], ()

    def backward(self, inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
        return self.both(inputs, (None, None), dy, None, needs, True, False)[0]

    def backward_jvp(
        self,
        inputs: tuple,
        stats: Tensors,
        tangents: Tensors,
        stats_t: Tensors,
        dy: Tensor,
        dy_t: Maybe,
        needs: tuple[bool, ...],
    ) -> Tensors:
        return self.both(inputs, tangents, dy, dy_t, needs, False, True)[1]

    def backward_dual(
        self,
        inputs: tuple,
        stats: Tensors,
        tangents: Tensors,
        stats_t: Tensors,
        dy: Tensor,
        dy_t: Maybe,
        needs: tuple[bool, ...],
    ) -> tuple[Tensors, Tensors]:
        return self.both(inputs, tangents, dy, dy_t, needs, True, True)

    def both(
        self,
        inputs: tuple,
        tangents: Tensors,
        dy: Tensor,
        dy_t: Maybe,
        needs: tuple[bool, ...],
        primal: bool,
        tangent: bool,
    ) -> tuple[Tensors, Tensors]:
        wanted = needs if self.gated else (needs[0], False)
        dx, dx_t = self.gradients(
            inputs[-1], *self.pair(inputs), *self.pair(tangents), dy, dy_t, wanted, primal, tangent
        )
        return (dx, dx_t) if self.gated else (dx[:1], dx_t[:1])

    def op(self) -> Callable[..., Tensor]:
        return twice_differentiable(
            self.forward,
            self.backward,
            self.jvp,
            self.backward_jvp,
            differentiable=2 if self.gated else 1,
            forward_dual=self.forward_dual,
            backward_dual=self.backward_dual,
        )


_activate = Activation(outputs, gradients, gated=False).op()
_gate = Activation(outputs, gradients, gated=True).op()

_relu = twice_differentiable(
    forward=lambda x: (torch.relu(x), ()),
    backward=lambda inputs, stats, dy, needs: (aten.threshold_backward(dy, inputs[0], 0),),
    jvp=lambda inputs, stats, tangents: (threshold(tangents[0], inputs[0]), ()),
    backward_jvp=lambda inputs, stats, tangents, stats_t, dy, dy_t, needs: (threshold(dy_t, inputs[0]),),
    differentiable=1,
)


def threshold(v: Maybe, x: Tensor) -> Maybe:
    return None if v is None else aten.threshold_backward(v, x, 0)


def relu(x: Tensor) -> Tensor:
    """max(x, 0), twice differentiable. x [...]; the result is alike."""
    if use_triton(x):
        from .activations_triton import activate  # Triton is needed only from here

        return activate(x, "relu")
    return _relu(x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x) with Phi the normal distribution, or its tanh form; twice differentiable. x [...]; the result is alike.

    approximate: `none` or `tanh` (GPT-2's gelu_new, Gemma's gelu_pytorch_tanh). Raises ValueError on another.
    """
    kind = checked_kind(approximate)
    if use_triton(x):
        from .activations_triton import activate

        return activate(x, kind)
    return _activate(x, kind)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, twice differentiable in both. gate, up [...]: one shape, dtype and device; so is the result."""
    return _gated(gate, up, "silu")


def gelu_mul(gate: Tensor, up: Tensor, approximate: str = "none") -> Tensor:
    """gelu(gate, approximate) * up (GeGLU; Gemma's is tanh), twice differentiable in both.

    gate, up [...]: one shape, dtype and device; so is the result. Raises ValueError on another `approximate`.
    """
    return _gated(gate, up, checked_kind(approximate))


def checked_kind(approximate: str) -> str:
    choices = " or ".join(APPROXIMATIONS)
    check(approximate in APPROXIMATIONS, f"approximate={approximate!r}: must be {choices}")
    return APPROXIMATIONS[approximate]


def _gated(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    check(gate.shape == up.shape, f"gate is {tuple(gate.shape)}, up {tuple(up.shape)}: must be one shape")
    check_like("up", up, "gate", gate)
    if use_triton(gate):
        from .activations_triton import gate_with

        return gate_with(gate, up, kind)
    return _gate(gate, up, kind)
