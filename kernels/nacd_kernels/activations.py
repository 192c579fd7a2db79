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

The reference shares a transcendental function between what needs it, in pieces that stay in the cache; but where one or
two of PyTorch's fused passes say it all (gelu by itself, relu) they are faster.
"""

import math
from collections.abc import Callable, Sequence
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


def curve(kind: str, g: Tensor, first: bool, second: bool) -> tuple[Maybe, Maybe, Maybe]:
    """f and f1 (if `first`), and f2 (if `second`), at g; fresh tensors."""
    return gelu_curve(g, first, second) if kind == "gelu" else sigmoid_curve(kind, g, second)


def gelu_curve(g: Tensor, first: bool, second: bool) -> tuple[Maybe, Maybe, Maybe]:
    f, f1, f2 = None, None, None
    p = (g * g).mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    gp = g * p
    if second:
        f2 = p.mul_(2).addcmul_(gp, g, value=-1)  # (g p) g: p underflows to 0 before g^2 overflows
    if first:
        below = torch.mul(g, math.sqrt(0.5)).erf_().add_(1).mul_(0.5)
        f, f1 = g * below, below.add_(gp)
    return f, f1, f2


def sigmoid_curve(kind: str, g: Tensor, second: bool) -> tuple[Tensor, Tensor, Maybe]:
    if kind == "silu":
        z1, s = None, torch.sigmoid(g)
        q = torch.addcmul(s, s, s, value=-1)
    else:
        square = (g * g).clamp_(max=1e4)  # s is 0 or 1 long before, and q z1 stays 0 where it would become 0 inf
        z1 = (square * (6 * K * CUBE)).add_(2 * K)
        z = square.mul_(2 * K * CUBE).add_(2 * K).mul_(g)
        s = torch.sigmoid(z)
        q = z.neg_().sigmoid_().mul_(s)  # 1 - s cancels, and z1 is large
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
    """f at g, as a fresh tensor. PyTorch's own tanh-gelu takes three times longer on a CPU."""
    if kind != "gelu_tanh":
        return F.gelu(g) if kind == "gelu" else F.silu(g)
    return (g * g).mul_(2 * K * CUBE).add_(2 * K).mul_(g).sigmoid_().mul_(g)


def fill_outputs(kind: str, tensors: Sequence[Maybe], outs: Sequence[Maybe]) -> None:
    """(g, u, g', u') -> (y, y'); u is None for an activation by itself, tangents and results where there are none."""
    if kind == "gelu" and tensors[1] is None:
        (g, _, g_t, _), (y, y_t) = tensors, outs
        if y is not None:
            aten.gelu.out(g, out=y)
        if y_t is not None:
            aten.gelu_backward.grad_input(g_t, g, grad_input=y_t)
        return
    (y, y_t), flats = (flat(x) for x in outs), [flat(x) for x in tensors]
    for part in pieces(tensors[0]):
        g, u, g_t, u_t = cut(part, *flats)
        f, f1, _ = (value(kind, g), None, None) if g_t is None else curve(kind, g, first=True, second=False)
        if y is not None and u is None:
            y[part] = f
        elif y is not None:
            put(y[part], (f, u))
        if y_t is not None:
            put(y_t[part], (f1, g_t if u is None else times(g_t, u)), (f, u_t))


def fill_gradients(kind: str, tensors: Sequence[Maybe], outs: Sequence[Maybe]) -> None:
    """(g, u, g', u', dy, dy') -> (dg, du, dg', du'), each None where it is not."""
    g, u, g_t, _, dy, dy_t = tensors
    if kind == "gelu" and u is None and g_t is None:
        for out, v in ((outs[0], dy), (outs[2], dy_t)):
            if out is not None:
                aten.gelu_backward.grad_input(v, g, grad_input=out)
        return
    flats, flat_outs = [flat(x) for x in tensors], [flat(x) for x in outs]
    for part in pieces(tensors[0]):
        g, u, g_t, u_t, dy, dy_t = cut(part, *flats)
        dg, du, dg_t, du_t = (None if x is None else x[part] for x in flat_outs)
        v, v_t = (dy, dy_t) if u is None else (dy * u, add(times(dy_t, u), times(dy, u_t)))
        first = v_t is not None or dg is not None or du is not None or du_t is not None
        f, f1, f2 = curve(kind, g, first, second=g_t is not None and dg_t is not None)
        put(dg, (f1, v))
        put(du, (f, dy))
        put(dg_t, (f1, v_t), (None if f2 is None else f2.mul_(g_t), v))
        put(du_t, (f, dy_t), (None if g_t is None or du_t is None else f1.mul_(g_t), dy))


def flat(x: Maybe) -> Maybe:
    return None if x is None else x.reshape(-1)


def like(x: Tensor, wanted: bool) -> Maybe:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device) if wanted else None


class Activation:
    """The functions of an op, from what fills its results: the reference above, or the kernels.

    Inputs (g, u, kind) if `gated`, else (g, kind).
    """

    def __init__(self, fill_outputs: Callable[..., None], fill_gradients: Callable[..., None], gated: bool):
        self.fill_outputs, self.fill_gradients, self.gated = fill_outputs, fill_gradients, gated

    def pair(self, tensors: tuple) -> tuple[Maybe, Maybe]:
        return (tensors[0], tensors[1]) if self.gated else (tensors[0], None)

    def outputs(self, inputs: tuple, tangents: Tensors, primal: bool) -> tuple[Maybe, Maybe]:
        """y (if `primal`) and y' (where there is a tangent)."""
        (g, u), (g_t, u_t) = self.pair(inputs), self.pair(tangents)
        outs = like(g, primal), like(g, g_t is not None or u_t is not None)
        if any(x is not None for x in outs):
            self.fill_outputs(inputs[-1], (g, u, g_t, u_t), outs)
        return outs

    def gradients(
        self, inputs: tuple, tangents: Tensors, dy: Tensor, dy_t: Maybe, needs: Sequence[bool], primal: bool
    ) -> tuple[Tensors, Tensors]:
        """dx (if `primal`) and dx' (where it is not zero), of the inputs that need it."""
        (g, u), (g_t, u_t) = self.pair(inputs), self.pair(tangents)
        need_g, need_u = needs[0], self.gated and needs[1]
        moves_f = g_t is not None or dy_t is not None
        dx = like(g, primal and need_g), like(g, primal and need_u)
        dx_t = like(g, need_g and (moves_f or u_t is not None)), like(g, need_u and moves_f)
        if any(x is not None for x in (*dx, *dx_t)):
            self.fill_gradients(inputs[-1], (g, u, g_t, u_t, dy, dy_t), (*dx, *dx_t))
        return (dx, dx_t) if self.gated else (dx[:1], dx_t[:1])

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensors]:
        return self.outputs(inputs, (None, None), True)[0], ()

    def forward_dual(self, inputs: tuple, tangents: Tensors) -> tuple[Tensor, Tensors, Maybe, Tensors]:
        y, y_t = self.outputs(inputs, tangents, True)
        return y, (), y_t, ()

    def jvp(self, inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Maybe, Tensors]:
        return self.outputs(inputs, tangents, False)[1], ()

    def backward(self, inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
        return self.gradients(inputs, (None, None), dy, None, needs, True)[0]

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
        return self.gradients(inputs, tangents, dy, dy_t, needs, False)[1]

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
        return self.gradients(inputs, tangents, dy, dy_t, needs, True)

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


_activate = Activation(fill_outputs, fill_gradients, gated=False).op()
_gate = Activation(fill_outputs, fill_gradients, gated=True).op()

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
        from .activations_triton import activation_op  # Triton is needed only from here

        return activation_op(x, "relu")
    return _relu(x)


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x) with Phi the normal distribution, or its tanh form; twice differentiable. x [...]; the result is alike.

    approximate: `none` or `tanh` (GPT-2's gelu_new, Gemma's gelu_pytorch_tanh). Raises ValueError on another.
    """
    kind = checked_kind(approximate)
    if use_triton(x):
        from .activations_triton import activation_op

        return activation_op(x, kind)
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
        from .activations_triton import gated_op

        return gated_op(gate, up, kind)
    return _gate(gate, up, kind)
