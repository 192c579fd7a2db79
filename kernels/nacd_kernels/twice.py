"""Four plain functions -> one op that is right in reverse, forward-over-reverse and reverse-over-reverse mode.

For y = f(x) an op file gives (inputs and tangents are tuples; a None stands for a zero that is never materialised)

    forward(*inputs)                                         -> y, stats
    backward(inputs, stats, dy, needs)                       -> dx = J(x)^T dy
    jvp(inputs, stats, tangents)                             -> y', stats'
    backward_jvp(inputs, stats, tangents, stats', dy, dy', needs) -> d/de backward along (x', dy')

`needs` says which of the inputs want a gradient. Trailing inputs may be constants (labels, a frozen weight, a scale):
`differentiable` is the number of leading inputs that are not.

Statistics are floating tensors, and no statistic is y itself. Forward-over-reverse is `jvp` then `backward_jvp`.
Reverse-over-reverse needs no more: for a cotangent u on dx, the double backward is jvp(u) with respect to dy and
backward_jvp(x' = u, dy' = 0) with respect to x, because the Hessian of <dy, f(x)> is symmetric.

An op built on a raw kernel without this gives *silently wrong* second derivatives. What is not there (third
derivatives, reverse-over-forward) raises; nothing is dropped in silence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Any, ...]  # of Tensor or None
Maybe = Any  # a Tensor or None. Any, because which of them come together is the op's knowledge, not a type checker's

_bare_tangents: ContextVar[bool] = ContextVar("bare_tangents", default=False)


@contextmanager
def bare_tangents() -> Iterator[None]:
    """In here the tangents carry no graph, not even one that refuses to be differentiated.

    That saves memory in a dual pass.
    """
    token = _bare_tangents.set(True)
    try:
        yield
    finally:
        _bare_tangents.reset(token)


class _Refuse(torch.autograd.Function):
    """Identity on the first tensor, an error when it is differentiated with respect to any of the others."""

    @staticmethod
    def forward(ctx: Any, what: str, x: Tensor, *others: Tensor) -> Tensor:
        ctx.what = what
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensors:
        raise RuntimeError(f"{ctx.what} is not there: it would be silently wrong")


def refuse_constants(tangents: Tensors) -> None:
    if any(t is not None for t in tangents):
        raise RuntimeError("a frozen input of a twice-differentiable op carries a tangent, which the op would drop")


def refuse(what: str, results: Tensors, inputs: Tensors) -> Tensors:
    """The results, guarded: differentiating them with respect to any of the inputs raises that `what` is not there."""
    sources = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad] if torch.is_grad_enabled() else []
    if not sources:
        return results
    return tuple(None if x is None else _Refuse.apply(what, x, *sources) for x in results)


def twice_differentiable(
    forward: Callable[..., tuple[Tensor, tuple[Tensor, ...]]],
    backward: Callable[..., Tensors],
    jvp: Callable[..., tuple[Tensor | None, Tensors]],
    backward_jvp: Callable[..., Tensors],
    differentiable: int,
) -> Callable[..., Tensor]:
    """The op `inputs -> y`; see the module's docstring for the four functions."""

    class Backward(torch.autograd.Function):
        """(dy, n_stats, needs, *inputs, *stats) -> dx. Its tangent is backward_jvp; its reverse, that and jvp."""

        @staticmethod
        def forward(dy: Tensor, n_stats: int, needs: tuple[bool, ...], *rest: Any) -> Tensors:
            inputs, stats = rest[: len(rest) - n_stats], rest[len(rest) - n_stats :]
            return tuple(backward(inputs, stats, dy, needs))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
            dy, ctx.n_stats, ctx.needs, *rest = inputs
            ctx.set_materialize_grads(False)
            ctx.constants = [None if isinstance(value, Tensor) else value for value in rest]
            ctx.is_tensor = [isinstance(value, Tensor) for value in rest]
            tensors = [dy, *(value for value in rest if isinstance(value, Tensor))]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def saved(ctx: Any) -> tuple[Tensor, tuple, tuple]:
            dy, *tensors = ctx.saved_tensors
            queue = iter(tensors)
            rest = tuple(
                next(queue) if is_tensor else value
                for is_tensor, value in zip(ctx.is_tensor, ctx.constants, strict=True)
            )
            return dy, rest[: len(rest) - ctx.n_stats], rest[len(rest) - ctx.n_stats :]

        @staticmethod
        def jvp(ctx: Any, dy_t: Tensor | None, _n: None, _needs: None, *rest_t: Tensor | None) -> Tensors:
            dy, inputs, stats = Backward.saved(ctx)
            tangents, stats_t = rest_t[: len(rest_t) - ctx.n_stats], rest_t[len(rest_t) - ctx.n_stats :]
            refuse_constants(tangents[differentiable:])
            with torch.no_grad():
                dx_t = backward_jvp(inputs, stats, tangents[:differentiable], stats_t, dy, dy_t, ctx.needs)
                triples = zip(inputs, dx_t, ctx.needs, strict=False)
                dx_t = tuple(torch.zeros_like(x) if t is None and need else t for x, t, need in triples)
            return (
                dx_t
                if _bare_tangents.get()
                else refuse("the reverse-over-forward derivative of an op", dx_t, (dy, *inputs))
            )

        @staticmethod
        def backward(ctx: Any, *u: Tensor | None) -> Tensors:
            dy, inputs, stats = Backward.saved(ctx)
            needs = tuple(ctx.needs_input_grad[3 : 3 + differentiable])
            with torch.no_grad():
                y_t, stats_t = jvp(inputs, stats, u)
                dx = backward_jvp(inputs, stats, u, stats_t, dy, None, needs)
            results = refuse("the third derivative of an op", (y_t, *dx), (dy, *inputs, *u))
            return (results[0], None, None, *results[1:], *(None for _ in range(len(ctx.is_tensor) - differentiable)))

    class Forward(torch.autograd.Function):
        """inputs -> (y, *stats).

        The stats are outputs so that their tangents travel with them; they get no gradient.
        """

        @staticmethod
        def forward(*inputs: Any) -> Tensors:
            y, stats = forward(*inputs)
            return (y, *stats)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
            ctx.set_materialize_grads(False)
            ctx.n_stats = len(output) - 1
            ctx.constants = [None if isinstance(value, Tensor) else value for value in inputs]
            ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
            tensors = [*(value for value in inputs if isinstance(value, Tensor)), *output[1:]]
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)

        @staticmethod
        def saved(ctx: Any) -> tuple[tuple, tuple]:
            tensors = ctx.saved_tensors
            queue = iter(tensors)
            inputs = tuple(
                next(queue) if is_tensor else value
                for is_tensor, value in zip(ctx.is_tensor, ctx.constants, strict=True)
            )
            return inputs, tuple(tensors[len(tensors) - ctx.n_stats :])

        @staticmethod
        def jvp(ctx: Any, *tangents: Tensor | None) -> Tensors:
            inputs, stats = Forward.saved(ctx)
            refuse_constants(tangents[differentiable:])
            with torch.no_grad():
                y_t, stats_t = jvp(inputs, stats, tangents[:differentiable])
                results = (y_t, *(torch.zeros_like(x) if t is None else t for x, t in zip(stats, stats_t, strict=True)))
            return (
                results
                if _bare_tangents.get()
                else refuse("the reverse-over-forward derivative of an op", results, inputs)
            )

        @staticmethod
        def backward(ctx: Any, dy: Tensor | None, *_: Tensor | None) -> Tensors:
            inputs, stats = Forward.saved(ctx)
            n_constants = len(inputs) - differentiable
            if dy is None:
                return (None,) * len(inputs)
            needs = tuple(ctx.needs_input_grad[:differentiable])
            dx = Backward.apply(dy, ctx.n_stats, needs, *inputs, *stats)
            return (*dx, *(None,) * n_constants)

    return lambda *inputs: Forward.apply(*inputs)[0]


def add(*terms: Maybe) -> Maybe:
    """Sum of the terms, None counting as zero; None if all are."""
    total: Maybe = None
    for term in terms:
        if term is not None:
            total = term if total is None else total + term
    return total


def times(a: Maybe, b: Maybe | float) -> Maybe:
    """Elementwise product, None if either is."""
    return None if a is None or b is None else a * b


def matmul(a: Maybe, b: Maybe) -> Maybe:
    """Matrix product, None if either is."""
    return None if a is None or b is None else a @ b
