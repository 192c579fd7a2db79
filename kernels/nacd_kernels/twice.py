"""Four plain functions -> one op that is right in reverse, forward-over-reverse and reverse-over-reverse mode.

For y = f(x) an op file gives (inputs and tangents are tuples; a None stands for a zero that is never materialised)

    forward(*inputs)                                              -> y, stats
    backward(inputs, stats, dy, needs)                            -> dx = J(x)^T dy
    jvp(inputs, stats, tangents)                                  -> y', stats'
    backward_jvp(inputs, stats, tangents, stats', dy, dy', needs) -> dx' = d/de backward along (x', dy')

and, where two of them share work, what is then called instead, by a dual pass or in reverse-over-reverse mode:

    forward_dual(inputs, tangents)                                 -> y, stats, y', stats'
    backward_dual(inputs, stats, tangents, stats', dy, dy', needs) -> dx, dx'
    double_backward(inputs, stats, u, dy, needs)                   -> (y', *dx') of jvp and backward_jvp with dy' = 0

`needs` says which of the inputs want a gradient. Trailing inputs may be constants (labels, a frozen weight, a scale):
`differentiable` is the number of leading inputs that are not. Statistics are tensors that the later functions reuse;
with `saves_output` they are handed on as (y, *stats), so that no op keeps a copy of its result.

Forward-over-reverse is `jvp` then `backward_jvp`. Reverse-over-reverse needs no more: for a cotangent u on dx, the
double backward is jvp(u) with respect to dy and backward_jvp(x' = u, dy' = 0) with respect to x, because the Hessian of
<dy, f(x)> is symmetric.

An op built on a raw kernel without this gives *silently wrong* second derivatives. What is not there (third
derivatives, reverse-over-forward) raises; nothing is dropped in silence. The functions see plain tensors and never
autocast, whatever transform, checkpoint or mode the op is called under: `torch.func.vmap` loops over its batch.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree  # underscored, but what torch.func and its users flatten trees with

Tensors = tuple[Any, ...]  # of Tensor or None
Maybe = Any  # a Tensor or None. Any, because which of them come together is the op's knowledge, not a type checker's

_bare_tangents: ContextVar[bool] = ContextVar("bare_tangents", default=False)


@contextmanager
def bare_tangents() -> Iterator[None]:
    """For dual passes by torch.autograd.forward_ad: in here the tangents of the ops carry no graph.

    That saves memory, and lets an op compute its result and the tangent together. A tangent made in here must not be
    differentiated: outside, trying to raises.
    """
    token = _bare_tangents.set(True)
    try:
        yield
    finally:
        _bare_tangents.reset(token)


def in_dual_pass() -> bool:
    """Under `bare_tangents` and no torch.func transform, whose tensors cannot be taken apart here."""
    return _bare_tangents.get() and not torch._C._are_functorch_transforms_active()


def twice_differentiable(
    forward: Callable[..., tuple[Tensor, Tensors]],
    backward: Callable[..., Tensors],
    jvp: Callable[..., tuple[Tensor | None, Tensors]],
    backward_jvp: Callable[..., Tensors],
    differentiable: int,
    *,
    forward_dual: Callable[..., tuple[Tensor, Tensors, Tensor | None, Tensors]] | None = None,
    backward_dual: Callable[..., tuple[Tensors, Tensors]] | None = None,
    double_backward: Callable[..., Tensors] | None = None,
    saves_output: bool = False,
) -> Callable[..., Tensor]:
    """The op `inputs -> y`; see the module's docstring for the functions."""

    def with_output(y: Maybe, stats: Tensors) -> Tensors:
        return (y, *stats) if saves_output else stats

    def filled(tangents: Tensors, primals: Tensors, needs: Sequence[bool]) -> Tensors:
        """Zeros where autograd insists on a tangent."""
        triples = zip(tangents, primals, needs, strict=True)
        return tuple(torch.zeros_like(x) if t is None and need else t for t, x, need in triples)

    def tangent_of_forward(inputs: Tensors, saved: Tensors, tangents: Tensors) -> Tensors:
        y_t, stats_t = jvp(inputs, saved, tangents)
        kept = saved[1:] if saves_output else saved
        return (y_t, *filled(stats_t, kept, [x.is_floating_point() for x in kept]))

    def tangent_of_backward(
        inputs: Tensors, saved: Tensors, tangents: Tensors, saved_t: Tensors, dy: Tensor, dy_t: Maybe, needs: Any
    ) -> Tensors:
        dx_t = backward_jvp(inputs, saved, tangents, saved_t, dy, dy_t, needs)
        return filled(dx_t, inputs[:differentiable], needs)

    def one_by_one(inputs: Tensors, saved: Tensors, u: Tensors, dy: Tensor, needs: Any) -> Tensors:
        """Cotangents of (dy, *inputs) for a cotangent u of dx."""
        y_t, stats_t = jvp(inputs, saved, u)
        return (y_t, *backward_jvp(inputs, saved, u, with_output(y_t, stats_t), dy, None, needs))

    jvp_once = _once("the reverse-over-forward derivative of an op", tangent_of_forward)
    backward_jvp_once = _once("the reverse-over-forward derivative of an op", tangent_of_backward)
    double_backward_once = _once("the third derivative of an op", double_backward or one_by_one)

    class Backward(_Function):
        """(dy, dual, n_saved, needs, *inputs, *saved) -> dx."""

        @staticmethod
        def forward(dy: Tensor, dual: "_Dual | None", n_saved: int, needs: Any, *rest: Any) -> Tensors:
            inputs, saved = rest[: len(rest) - n_saved], rest[len(rest) - n_saved :]
            with plain(dy):
                if dual is None or backward_dual is None:
                    return tuple(backward(inputs, saved, dy, needs))
                dx, dx_t = backward_dual(inputs, saved, dual.tangents, dual.saved_t, dy, dual.dy_t, needs)
                dual.result = filled(dx_t, inputs[:differentiable], needs)
                return tuple(dx)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
            dy, ctx.dual, ctx.n_saved, ctx.needs, *rest = inputs
            save(ctx, [dy, *rest])

        @staticmethod
        def jvp(ctx: Any, dy_t: Maybe, _dual: None, _n: None, _needs: Any, *rest_t: Maybe) -> Tensors:
            if ctx.dual is not None and ctx.dual.result is not None:
                return ctx.dual.take()
            dy, *rest = saved_values(ctx)
            n_inputs = len(rest) - ctx.n_saved
            refuse_constants(rest_t[differentiable:n_inputs])
            tangents = rest_t[:differentiable], rest_t[n_inputs:]
            run = tangent_of_backward if in_dual_pass() else backward_jvp_once
            with torch.no_grad() if in_dual_pass() else nullcontext(), plain(dy):
                return run(tuple(rest[:n_inputs]), tuple(rest[n_inputs:]), *tangents, dy, dy_t, ctx.needs)

        @staticmethod
        def backward(ctx: Any, *u: Maybe) -> Tensors:
            dy, *rest = saved_values(ctx)
            n_inputs = len(rest) - ctx.n_saved
            needs = tuple(ctx.needs_input_grad[4 : 4 + differentiable])
            inputs, saved = tuple(rest[:n_inputs]), tuple(rest[n_inputs:])
            y_t, *dx = double_backward_once(inputs, saved, u, dy, needs)
            return (y_t, None, None, None, *dx, *(None for _ in range(len(rest) - differentiable)))

    class Forward(_Function):
        """(dual, *inputs) -> (y, *stats).

        The stats are outputs so that their tangents travel with them; they get no gradient.
        """

        @staticmethod
        def forward(dual: "_Dual | None", *inputs: Any) -> Tensors:
            with plain(inputs[0]):
                if dual is None:
                    y, stats = forward(*inputs)
                else:
                    assert forward_dual is not None
                    y, stats, y_t, stats_t = forward_dual(inputs, dual.tangents)
                    dual.result = (y_t, *filled(stats_t, stats, [x.is_floating_point() for x in stats]))
            return (y, *stats)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
            ctx.dual, *rest = inputs
            stats = output if saves_output else output[1:]
            ctx.n_saved = len(stats)
            save(ctx, [*rest, *stats])

        @staticmethod
        def jvp(ctx: Any, _dual: None, *tangents: Maybe) -> Tensors:
            refuse_constants(tangents[differentiable:])
            if ctx.dual is not None:
                return ctx.dual.take()
            values = saved_values(ctx)
            inputs, saved = tuple(values[: len(tangents)]), tuple(values[len(tangents) :])
            run = tangent_of_forward if in_dual_pass() else jvp_once
            with torch.no_grad() if in_dual_pass() else nullcontext(), plain(values[0]):
                return run(inputs, saved, tangents[:differentiable])

        @staticmethod
        def backward(ctx: Any, dy: Maybe, *_: Maybe) -> Tensors:
            values = saved_values(ctx)
            n_inputs = len(values) - ctx.n_saved
            if dy is None:
                return (None,) * (1 + n_inputs)
            needs = tuple(ctx.needs_input_grad[1 : 1 + differentiable])
            dual = None
            if backward_dual is not None and in_dual_pass():
                parts = [tangent_of(x) for x in (dy, *values)]
                if any(t is not None for t in parts):
                    rest_t = parts[1:]
                    dual = _Dual(tuple(rest_t[:differentiable]), tuple(rest_t[n_inputs:]), parts[0])
            dx = Backward.apply(dy, dual, ctx.n_saved, needs, *values)
            return (None, *dx, *(None,) * (n_inputs - differentiable))

    def op(*inputs: Any) -> Tensor:
        dual = None
        if forward_dual is not None and in_dual_pass():
            tangents = tuple(tangent_of(x) for x in inputs)
            refuse_constants(tangents[differentiable:])
            if any(t is not None for t in tangents):
                dual = _Dual(tangents[:differentiable])
        return Forward.apply(dual, *inputs)[0]

    return op


class _Dual:
    """The tangents that a joint function reads, and the tangents it found, on their way to autograd's jvp."""

    def __init__(self, tangents: Tensors, saved_t: Tensors = (), dy_t: Maybe = None):
        self.tangents, self.saved_t, self.dy_t = tangents, saved_t, dy_t
        self.result: Tensors | None = None

    def take(self) -> Tensors:
        """The result, once: nothing of the pass is kept alive by the graph."""
        found, self.result = self.result, None
        assert found is not None, "autograd asked for a tangent that was not computed, or twice"
        self.tangents, self.saved_t, self.dy_t = (), (), None
        return found


class _Function(torch.autograd.Function):
    """What the Functions here share: a batch of torch.func.vmap is gone through in a loop."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        # what `apply` would find out anew in every call
        vars(cls)["forward"].__func__.__signature__ = inspect.signature(cls.forward)

    @classmethod
    def vmap(cls, info: Any, in_dims: tuple, *args: Any) -> tuple[Tensors, Tensors]:
        def item(value: Any, dim: Any, i: int) -> Any:
            return value.select(dim, i) if isinstance(value, Tensor) and dim is not None else value

        results = [cls.apply(*(item(a, d, i) for a, d in zip(args, in_dims))) for i in range(info.batch_size)]
        stacked = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*results, strict=True))
        return stacked, tuple(None if x is None else 0 for x in stacked)


def _once(what: str, compute: Callable[..., Tensors]) -> Callable[..., Tensors]:
    """`compute` (trees of tensors -> tensors), whose results raise that `what` is not there when differentiated."""

    class Once(_Function):
        @staticmethod
        def forward(spec: Any, *flat: Any) -> Tensors:
            with plain(next(x for x in flat if isinstance(x, Tensor))):
                return tuple(compute(*pytree.tree_unflatten(flat, spec)))

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple, output: Tensors) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *_: Maybe) -> Tensors:
            raise RuntimeError(f"{what} is not there: it would be silently wrong")

        @staticmethod
        def jvp(ctx: Any, *_: Maybe) -> Tensors:
            raise RuntimeError(f"{what} is not there: it would be silently wrong")

    def run(*args: Any) -> Tensors:
        flat, spec = pytree.tree_flatten(args)
        return Once.apply(spec, *flat)

    return run


def save(ctx: Any, values: Sequence[Any]) -> None:
    """Keep values, tensors among them, for `saved_values`."""
    ctx.set_materialize_grads(False)
    ctx.constants = [None if isinstance(value, Tensor) else (value,) for value in values]
    tensors = [value for value in values if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def saved_values(ctx: Any) -> list[Any]:
    queue = iter(ctx.saved_tensors)
    return [next(queue) if constant is None else constant[0] for constant in ctx.constants]


def tangent_of(x: Any) -> Maybe:
    return forward_ad.unpack_dual(x).tangent if isinstance(x, Tensor) else None


def wants_gradient(x: Tensor) -> bool:
    """Whether a derivative with respect to x can still be asked for."""
    if torch._C._are_functorch_transforms_active():  # in there x does not tell of the outer transforms
        return True
    return (x.requires_grad and torch.is_grad_enabled()) or tangent_of(x) is not None


def plain(x: Tensor) -> AbstractContextManager:
    """No autocast: an op's functions compute in the types they are given."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def autocast(*tensors: Maybe) -> Tensors:
    """Under torch.autocast the tensors in its type, as for torch.nn.functional.linear; else as they are."""
    kind = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


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
