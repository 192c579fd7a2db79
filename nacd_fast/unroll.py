"""Exact hypergradients through unrolled training, with memory that does not grow with the number of steps.

The student takes N steps  (theta, s)_{n+1} = U((theta, s)_n, g_n, lr_n)  with  g_n = d/dtheta l(theta_n, inputs_n)  and
optimiser state s. A graph of all N steps costs N times one step's activations. Instead:

- forward sweep: N plain gradients; only (theta_n, s_n) is kept (and g_n where U is not affine in it);
- reverse sweep: with v the cotangent of (theta, s)_{n+1}, the elementwise U gives by its own vector-Jacobian product
  the cotangents of theta_n, s_n, lr_n, and w of g_n. One *dual pass* (the gradient of l at theta_n + e w,
  differentiated at e = 0 by forward-mode AD) adds  d<g_n, w>/dtheta_n  to the first and gives  d<g_n, w>/dinputs_n.

Nothing is dropped and the activations are those of one step, whatever N is. Cost: 3 gradients a step. A retained step
keeps the graph of g_n instead and is differentiated through it by a second reverse pass: 2 gradients a step, for one
step's activations each. Source: Pearlmutter (1994) for the dual pass; MixFlow-MG (arXiv 2505.00793) for the mixed mode;
DESIGN, section 2, of this project.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree  # underscored, but what torch.func and its users flatten trees with

from nacd_kernels import bare_tangents
from nacd_kernels.twice import refuse

from .errors import NonFiniteError
from .updates import SGD, Update, pull_back

Tree = Any
REPLAY_TOLERANCE = 1e-3  # relative; a replayed loss differs by rounding only, unless inner_loss draws random numbers


def unrolled_sgd(
    inner_loss: Callable[[Tree, Tree], Tensor],
    theta0: Tree,
    lr: Tensor | float,
    inputs: Sequence[Tree],
    *,
    update: Update | None = None,
    retain: int = 0,
) -> Tree:
    """theta_N after N = len(inputs) steps of `update` (plain SGD by default) on inner_loss(theta, inputs[n]).

    theta0 is a tree of float tensors of one dtype and device; lr a scalar, or [N] with one value a step; inputs holds a
    tree a step, whose tensors may occur in several steps. The result is a tree like theta0 and composes with autograd:
    any loss on it can be differentiated with respect to theta0, lr and every float tensor in `inputs` that requires a
    gradient (not with respect to anything else that inner_loss uses, and not twice).

    inner_loss must be deterministic and differentiable twice, in forward-over-reverse mode and, for the last `retain`
    steps, whose graphs are retained, in reverse-over-reverse mode; nacd_kernels has such ops. Retaining trades memory
    for time: a step costs a third less, and keeps its activations; retain >= N keeps all. Raises NonFiniteError naming
    the step if a loss is not finite; RuntimeError if a replayed step gives another loss.
    """
    leaves, tree = pytree.tree_flatten(theta0)
    per_step, structures = zip(*(pytree.tree_flatten(step) for step in inputs), strict=True) if inputs else ((), ())
    if not inputs:
        return theta0
    if not leaves or len({(t.dtype, t.device) for t in leaves}) != 1 or not leaves[0].is_floating_point():
        found = sorted({f"{t.dtype} on {t.device}" for t in leaves})
        raise ValueError(f"theta0 must hold float tensors of one dtype and device, has {found}")
    rates = torch.as_tensor(lr, dtype=leaves[0].dtype, device=leaves[0].device)
    if rates.shape not in ((), (len(inputs),)):
        raise ValueError(
            f"lr has shape {tuple(rates.shape)}: must be a scalar or one value for each of the {len(inputs)} steps"
        )
    sizes, shapes = [t.numel() for t in leaves], [t.shape for t in leaves]

    def loss_of(parameters: Sequence[Tensor], step: int, values: Sequence[Any]) -> Tensor:
        return inner_loss(pytree.tree_unflatten(parameters, tree), pytree.tree_unflatten(values, structures[step]))

    if retain < 0:
        raise ValueError(f"retain={retain}: must be the number of steps whose graphs are kept, 0 or more")
    sweep = _Sweep(loss_of, update or SGD(), sizes, shapes, [len(values) for values in per_step], retain)
    theta = torch.cat([t.reshape(-1) for t in leaves])
    theta_n = _Unroll.apply(
        sweep, theta, rates.expand(len(inputs)), *(value for values in per_step for value in values)
    )
    pieces = theta_n.split(sizes)
    return pytree.tree_unflatten([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], tree)


class _Sweep:
    """One unroll's constants, and the two sweeps over flat vectors theta [P]."""

    def __init__(
        self,
        loss_of: Callable,
        update: Update,
        sizes: list[int],
        shapes: list[torch.Size],
        counts: list[int],
        retain: int,
    ):
        self.loss_of, self.update, self.sizes, self.shapes, self.counts = loss_of, update, sizes, shapes, counts
        self.first_retained = len(counts) - retain

    def parameters(self, theta: Tensor) -> list[Tensor]:
        """Views of the flat vector in theta0's shapes."""
        return [piece.view(shape) for piece, shape in zip(theta.split(self.sizes), self.shapes, strict=True)]

    def gradient(self, theta: Tensor, n: int, values: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """l and its gradient [P] at step n."""
        with torch.enable_grad():
            parameters = [p.detach().requires_grad_() for p in self.parameters(theta)]
            loss = self.loss_of(parameters, n, [detached(value) for value in values])
            grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
        return loss.detach(), torch.cat([g.reshape(-1) for g in grads])

    def retained_gradient(
        self, theta: Tensor, n: int, values: Sequence[Any], wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, "Retained"]:
        """l and its gradient [P] at step n, and the graph of that gradient."""
        with torch.enable_grad():
            parameters = [p.detach().requires_grad_() for p in self.parameters(theta)]
            live = live_values(values, wanted)
            loss = self.loss_of(parameters, n, live)
            grads = torch.autograd.grad(loss, parameters, materialize_grads=True, create_graph=True)
        leaves = [value for value, want in zip(live, wanted, strict=True) if want]
        flat = torch.cat([g.detach().reshape(-1) for g in grads])
        return loss.detach(), flat, Retained(parameters, leaves, grads)

    def second_pass(self, graph: "Retained", w: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """d<g, w>/dtheta [P] and d<g, w>/dvalue for each wanted value, through the retained graph of g."""
        linked = [(g, v) for g, v in zip(graph.grads, self.parameters(w), strict=True) if g.requires_grad]
        sources = [*graph.parameters, *graph.leaves]
        if not linked:
            found = tuple(torch.zeros_like(x) for x in sources)
        else:
            grads, cotangents = zip(*linked, strict=True)
            found = torch.autograd.grad(grads, sources, cotangents, retain_graph=True, materialize_grads=True)
        mixed = iter(found[len(graph.parameters) :])
        flat = torch.cat([t.reshape(-1) for t in found[: len(graph.parameters)]])
        return flat, [next(mixed) if want else None for want in wanted]

    def dual_pass(
        self, theta: Tensor, w: Tensor, n: int, values: Sequence[Any], wanted: Sequence[bool]
    ) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
        """l, g [P], d<g, w>/dtheta [P] and d<g, w>/dvalue for each wanted value of step n.

        w is scaled to unit length before the pass and back after it (the pass is linear in w), so that tangents in
        16-bit models do not underflow.
        """
        size = w.norm()
        unit = w / torch.where(size > 0, size, 1.0)
        with torch.enable_grad(), forward_ad.dual_level(), bare_tangents():
            duals = [
                forward_ad.make_dual(p.detach().requires_grad_(), t)
                for p, t in zip(self.parameters(theta), self.parameters(unit), strict=True)
            ]
            live = live_values(values, wanted)
            loss = self.loss_of(duals, n, live)
            targets = [*duals, *(value for value, want in zip(live, wanted, strict=True) if want)]
            grads = [forward_ad.unpack_dual(g) for g in torch.autograd.grad(loss, targets, materialize_grads=True)]
            value_of_loss = forward_ad.unpack_dual(loss).primal.detach()
        primals = [g.primal for g in grads[: len(duals)]]
        tangents = [torch.zeros_like(g.primal) if g.tangent is None else g.tangent for g in grads]
        mixed = iter(tangents[len(duals) :])
        flat = [torch.cat([t.reshape(-1) for t in group]) for group in (primals, tangents[: len(duals)])]
        return value_of_loss, flat[0], flat[1].mul_(size), [next(mixed).mul(size) if want else None for want in wanted]


class Retained(NamedTuple):
    """A step's gradients with their graph, and what they are differentiated with respect to."""

    parameters: list[Tensor]
    leaves: list[Tensor]
    grads: tuple[Tensor, ...]


def detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def live_values(values: Sequence[Any], wanted: Sequence[bool]) -> list[Any]:
    """A step's input leaves, cut off from the outside; those that are wanted take a gradient."""
    cut = [detached(value) for value in values]
    return [value.requires_grad_() if want else value for value, want in zip(cut, wanted, strict=True)]


class _Unroll(torch.autograd.Function):
    """(sweep, theta [P], lr [N], *input leaves) -> theta_N [P]."""

    @staticmethod
    def forward(ctx: Any, sweep: _Sweep, theta: Tensor, lr: Tensor, *values: Any) -> Tensor:
        ctx.save_for_backward(theta, lr, *(value for value in values if isinstance(value, Tensor)))
        ctx.others = [None if isinstance(value, Tensor) else (value,) for value in values]
        theta, state = theta.detach(), sweep.update.init(theta.detach())
        ctx.sweep, ctx.kept, losses = sweep, [], []
        keep, wanted = any(ctx.needs_input_grad), wanted_of(ctx, values)
        for n, start, stop in bounds(sweep.counts):
            graph = None
            if keep and n >= sweep.first_retained:
                loss, grad, graph = sweep.retained_gradient(theta, n, values[start:stop], wanted[start:stop])
            else:
                loss, grad = sweep.gradient(theta, n, values[start:stop])
            losses.append(loss)
            if keep:
                known = graph is not None or not sweep.update.affine_in_grad
                ctx.kept.append(Kept(theta, state, grad if known else None, graph))
            theta, state = sweep.update.step(theta, state, grad, lr[n], n)
        ctx.losses = torch.stack(losses).float()
        if not bool(ctx.losses.isfinite().all()):  # the sweep's only wait for the device
            step = int((~ctx.losses.isfinite()).nonzero()[0])
            raise NonFiniteError(f"inner step {step} of {len(losses)}: the loss is {float(ctx.losses[step])}", step)
        return theta

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        theta_0, lr, *tensors = ctx.saved_tensors  # raises if one of them was changed in place since
        queue = iter(tensors)
        values = [next(queue) if other is None else other[0] for other in ctx.others]
        with torch.no_grad():
            results = _Unroll.reverse(ctx, v.detach(), lr.detach(), values)
        return (None, *refuse("the second derivative through unrolled_sgd", results, (v, theta_0, lr, *tensors)))

    @staticmethod
    def reverse(ctx: Any, v: Tensor, lr: Tensor, values: Sequence[Any]) -> tuple[Tensor | None, ...]:
        """The reverse sweep: cotangents of theta_0, lr and every input leaf."""
        sweep, update = ctx.sweep, ctx.sweep.update
        wanted = wanted_of(ctx, values)
        d_lr, d_values = torch.zeros_like(lr), [None] * len(values)
        replayed = list(ctx.losses)
        d_state = tuple(torch.zeros_like(s) for s in update.init(v))
        for n, start, stop in reversed(bounds(sweep.counts)):
            theta, state, grad, graph = ctx.kept[n]
            guess = torch.zeros_like(theta) if grad is None else grad
            back = pull_back(update, n, theta, state, guess, lr[n], v, d_state)
            if graph is not None:
                curvature, d_values[start:stop] = sweep.second_pass(graph, back.grad, wanted[start:stop])
            else:
                replayed[n], g, curvature, d_values[start:stop] = sweep.dual_pass(
                    theta, back.grad, n, values[start:stop], wanted[start:stop]
                )
            if grad is None:  # affine in the gradient: its own cotangent was right, that of lr needs the gradient
                back = pull_back(update, n, theta, state, g, lr[n], v, d_state)
            v, d_state, d_lr[n] = back.theta + curvature, back.state, back.lr
        check_replay(ctx.losses, torch.stack(replayed).float())
        return (v, d_lr, *d_values)


def wanted_of(ctx: Any, values: Sequence[Any]) -> list[bool]:
    """Which of the input leaves take a gradient."""
    return [isinstance(value, Tensor) and need for value, need in zip(values, ctx.needs_input_grad[3:], strict=True)]


class Kept(NamedTuple):
    """What the forward sweep keeps of a step; the gradient where the reverse sweep needs it before its own pass."""

    theta: Tensor
    state: tuple[Tensor, ...]
    grad: Tensor | None
    graph: Retained | None


def bounds(counts: Sequence[int]) -> list[tuple[int, int, int]]:
    """(step, first, past the last) positions of each step's leaves in the flat list of all."""
    stops = torch.tensor([0, *counts]).cumsum(0).tolist()
    return [(n, stops[n], stops[n + 1]) for n in range(len(counts))]


def check_replay(first: Tensor, second: Tensor) -> None:
    """The reverse sweep must see the losses of the forward sweep; dropout, say, would make its gradient meaningless."""
    off = (first - second).abs() > REPLAY_TOLERANCE * first.abs().clamp_min(1e-6)
    if bool(off.any()):
        n = int(off.nonzero()[0])
        raise RuntimeError(
            f"inner_loss is not deterministic: step {n} gave {float(first[n])}, replayed {float(second[n])}; "
            "switch dropout off"
        )
