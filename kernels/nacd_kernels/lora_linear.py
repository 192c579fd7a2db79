"""Frozen linear layers with low-rank adapters, twice differentiable in x and in every A and B.

    y = x W^T + bias + s (x A^T) B^T

Hu et al., LoRA (arXiv 2106.09685), section 4.1. With h = x A^T and g = s dy B:

    dx = dy W + g A                      dA = g^T x                   dB = s dy^T h
    y' = x' W^T + s (h' B^T + h B'^T)    h' = x' A^T + x A'^T
    dx' = dy' W + g' A + g A'            g' = s (dy' B + dy B')
    dA' = g'^T x + g^T x'                dB' = s (dy'^T h + dy^T h')

M rows, D_in and D_out features, R rank. Layers that read the same x (query, key and value; gate and up) are one op: y
[M, S] holds their outputs side by side, the A are stacked, so that x is read once for every h and once for every dA,
and dx is one buffer that each layer adds to.

The products with the frozen weights are those of `frozen_linear.py`; all others are low-rank, those of `low_rank.py` in
PyTorch or of `lora_linear_triton.py` as kernels, whichever the functions below are given as their `kit`.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check, check_linear, check_lora
from .dispatch import use_triton
from .frozen_linear import back_through, cast, rows, spans, through
from .frozen_weight import FrozenWeight, frozen_weight
from .low_rank import REFERENCE, Kit
from .twice import Maybe, Tensors, autocast, twice_differentiable


class LoraLayer(NamedTuple):
    """One layer of `lora_linears`: w [D_out, D_in], bias [D_out] or None, a [R, D_in] and b [D_out, R] or both None."""

    w: FrozenWeight
    bias: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scale: float


class Adapted(NamedTuple):
    """The op's inputs (x, a_1, b_1, a_2, b_2, .., w_1, bias_1, scale_1, ..) by name, or their tangents."""

    x: Maybe
    a: Tensors
    b: Tensors
    w: Tensors
    bias: Tensors
    scale: Tensors

    @classmethod
    def of(cls, inputs: Tensors) -> "Adapted":
        layers = (len(inputs) - 1) // 5
        ab, constants = inputs[1 : 1 + 2 * layers], inputs[1 + 2 * layers :]
        return cls(rows(inputs[0]), ab[::2], ab[1::2], constants[::3], constants[1::3], constants[2::3])

    @classmethod
    def of_tangents(cls, tangents: Tensors) -> "Adapted":
        return cls(rows(tangents[0]), tangents[1::2], tangents[2::2], (), (), ())

    def columns(self) -> list[slice]:
        """Where each layer's output lies in y."""
        return spans([w.shape[0] for w in self.w])

    def ranks(self) -> list[slice]:
        """Where each layer's part lies in h and g; nowhere without an adapter."""
        return spans([0 if a is None else a.shape[0] for a in self.a])


def joined(parts: Sequence[Maybe], primals: Sequence[Maybe], axis: int = 0) -> Maybe:
    """The parts one after the other, a missing one as zeros like its primal; None if all are missing."""
    if all(part is None for part in parts):
        return None
    present = [torch.zeros_like(of) if part is None else part for part, of in zip(parts, primals) if of is not None]
    return present[0] if len(present) == 1 else torch.cat(present, axis)


def part(x: Maybe, columns: slice) -> Maybe:
    return None if x is None else x[:, columns]


def flipped(x: Maybe) -> Maybe:
    return None if x is None else x.T


def along(
    kit: Kit, inputs: Tensors, tangents: Tensors, stats: Tensors, primal: bool
) -> tuple[Maybe, Tensors, Maybe, Tensors]:
    """y, (h,), y', (h',): the first two only if `primal`, else h is what stats holds. No h without adapters."""
    at, t = Adapted.of(inputs), Adapted.of_tangents(tangents)
    a, a_t = joined(at.a, at.a), joined(t.a, at.a)
    h, h_t = stats[0] if stats else None, None
    if a is not None:
        found, h_t = kit.pair(at.x, t.x, a.T, flipped(a_t), primal)
        h = found if primal else h
    columns = at.columns()
    y, y_t = through(inputs[0] if primal else None, tangents[0], at.w, at.bias)
    if y_t is None and any(part is not None for part in (h_t, *t.b)):
        y_t = at.x.new_zeros(*inputs[0].shape[:-1], columns[-1].stop)
    flat, flat_t = rows(y), rows(y_t)
    for b, b_t, scale, place, r in zip(at.b, t.b, at.scale, columns, at.ranks()):
        if b is not None:
            low = part(h, r), part(h_t, r), b.T, flipped(b_t)
            kit.add_pair(part(flat, place), part(flat_t, place), *low, primal, scale)
    return y, () if a is None else (h,), y_t, () if a is None else (h_t,)


def back(
    kit: Kit,
    inputs: Tensors,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    dy: Tensor,
    dy_t: Maybe,
    needs: Tensors,
    primal: bool,
) -> tuple[Tensors, Tensors]:
    """(dx, da_1, db_1, ..) and their tangents, the first only if `primal`; None where not needed."""
    at, t = Adapted.of(inputs), Adapted.of_tangents(tangents)
    flat, flat_t = rows(dy), rows(dy_t)
    outputs = [(part(flat, place), part(flat_t, place)) for place in at.columns()]
    g, g_t = None, None
    if needs[0] or any(needs[1::2]):
        gs = [
            (None, None) if b is None else kit.pair(*output, b, b_t, True, scale)
            for output, b, b_t, scale in zip(outputs, at.b, t.b, at.scale)
        ]
        g, g_t = (joined([g[which] for g in gs], [g[0] for g in gs], axis=1) for which in (0, 1))
    dx = dx_t = None
    if needs[0]:
        a, a_t = joined(at.a, at.a), joined(t.a, at.a)
        dx, dx_t = back_through(dy if primal else None, dy_t, at.w)
        if dx_t is None and any(part is not None for part in (g_t, a_t)):
            dx_t = at.x.new_zeros(inputs[0].shape)
        if a is not None:
            kit.add_pair(rows(dx), rows(dx_t), g, g_t, a, a_t, primal)
    das, das_t = grads_of_a(kit, at, t, g, g_t, needs[1::2], primal)
    dbs, dbs_t = grads_of_b(kit, at, stats, stats_t, outputs, needs[2::2], primal)
    return (dx, *interleaved(das, dbs)), (dx_t, *interleaved(das_t, dbs_t))


def grads_of_a(
    kit: Kit, at: Adapted, t: Adapted, g: Maybe, g_t: Maybe, needs: Tensors, primal: bool
) -> list[list[Maybe]]:
    """[da of each layer, their tangents]: one product for all."""
    out: list[list[Maybe]] = [[None] * len(needs) for _ in range(2)]
    if any(needs):
        for das, stacked in zip(out, kit.pair(g.T, flipped(g_t), at.x, t.x, primal)):
            if stacked is not None:
                parts = torch.unsafe_split_with_sizes(
                    stacked, [r.stop - r.start for r in at.ranks()]
                )  # not views: see `pair`
                das[:] = [da.to(a.dtype) if need else None for da, a, need in zip(parts, at.a, needs)]
    return out


def grads_of_b(
    kit: Kit,
    at: Adapted,
    stats: Tensors,
    stats_t: Tensors,
    outputs: Sequence[tuple[Maybe, Maybe]],
    needs: Tensors,
    primal: bool,
) -> list[list[Maybe]]:
    """[db of each layer, their tangents].

    As the transpose of h^T dy, which reads dy by rows; on a CPU that takes half the time of dy^T h.
    """
    out: list[list[Maybe]] = [[None] * len(needs) for _ in range(2)]
    for i, (b, scale, r, need) in enumerate(zip(at.b, at.scale, at.ranks(), needs)):
        if need:
            h, h_t = part(stats[0], r), part(stats_t[0] if stats_t else None, r)
            for dbs, db in zip(out, kit.pair(h.T, flipped(h_t), *outputs[i], primal, scale)):
                dbs[i] = None if db is None else db.T.contiguous().to(b.dtype)
    return out


def interleaved(a: Sequence[Maybe], b: Sequence[Maybe]) -> list[Maybe]:
    return [t for pair in zip(a, b) for t in pair]


@cache
def op_of(kit: Kit, layers: int) -> Callable[..., Tensor]:
    """The op on `Adapted` inputs of so many layers: six functions, each `along` or `back` with or without tangents."""
    differentiable = 1 + 2 * layers
    nothing = (None,) * differentiable

    def forward(*inputs: Any) -> tuple[Tensor, Tensors]:
        return along(kit, inputs, nothing, (), True)[:2]

    def jvp(inputs: Tensors, stats: Tensors, tangents: Tensors) -> tuple[Maybe, Tensors]:
        return along(kit, inputs, tangents, stats, False)[2:]

    def forward_dual(inputs: Tensors, tangents: Tensors) -> tuple[Tensor, Tensors, Maybe, Tensors]:
        return along(kit, inputs, tangents, (), True)

    def backward(inputs: Tensors, stats: Tensors, dy: Tensor, needs: Tensors) -> Tensors:
        return back(kit, inputs, stats, nothing, (), dy, None, needs, True)[0]

    def backward_jvp(
        inputs: Tensors, stats: Tensors, tangents: Tensors, stats_t: Tensors, dy: Tensor, dy_t: Maybe, needs: Tensors
    ) -> Tensors:
        return back(kit, inputs, stats, tangents, stats_t, dy, dy_t, needs, False)[1]

    def backward_dual(
        inputs: Tensors, stats: Tensors, tangents: Tensors, stats_t: Tensors, dy: Tensor, dy_t: Maybe, needs: Tensors
    ) -> tuple[Tensors, Tensors]:
        return back(kit, inputs, stats, tangents, stats_t, dy, dy_t, needs, True)

    return twice_differentiable(
        forward,
        backward,
        jvp,
        backward_jvp,
        differentiable,
        forward_dual=forward_dual,
        backward_dual=backward_dual,
    )


def lora_linear(
    x: Tensor, w: FrozenWeight, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float
) -> Tensor:
    """y = x W^T + bias + scale (x A^T) B^T, twice differentiable in x, a and b; w and bias are frozen.

    x [..., D_in], w [D_out, D_in] (dense, or quantised: `frozen_weight.py`), bias [D_out] or None: one float dtype;
    a [R, D_in], b [D_out, R]: that dtype or float32, or both None. Returns [..., D_out] in x's dtype. Under
    torch.autocast the frozen product is in its type. Raises ValueError if shapes, dtypes or devices disagree, and if w
    is not quantised yet.
    """
    return _side_by_side(x, [LoraLayer(w, bias, a, b, scale)])


def lora_linears(x: Tensor, layers: Sequence[LoraLayer]) -> tuple[Tensor, ...]:
    """`lora_linear` of every layer on the same x, which is read once for all of them.

    Returns a y [..., D_out] a layer, views of one tensor that holds them side by side. All adapters have one dtype.
    """
    y = _side_by_side(x, layers)
    return tuple(y.split([layer.w.shape[0] for layer in map(quantised, layers)], -1))


def quantised(layer: LoraLayer) -> LoraLayer:
    return layer._replace(w=frozen_weight(layer.w))


def _side_by_side(x: Tensor, layers: Sequence[LoraLayer]) -> Tensor:
    check(len(layers) > 0, "layers is empty: must be one layer or more")
    (x,) = autocast(x)
    adapters: list[Maybe] = []
    constants: list[Any] = []
    for i, layer in enumerate(layers):
        name = f"layers[{i}]." if len(layers) > 1 else ""
        w, bias = cast(frozen_weight(layer.w), layer.bias)
        check_linear(x, w, bias, name)
        check((layer.a is None) == (layer.b is None), f"{name}a and {name}b must be given together, or both be None")
        if layer.a is not None and layer.b is not None:
            check_lora(x, w, layer.a, layer.b, name)
        adapters += [layer.a, layer.b]
        constants += [w, bias, float(layer.scale)]
    kinds = {a.dtype for a in adapters[::2] if a is not None}
    check(len(kinds) < 2, f"the adapters are {' and '.join(sorted(map(str, kinds)))}: must be of one dtype")
    kit = REFERENCE
    if kinds and use_triton(x):
        from .lora_linear_triton import KIT  # Triton is needed only from here

        kit = KIT
    return op_of(kit, len(layers))(x, *adapters, *constants)
