"""What check_second_order (second_order.py) asks of a function: its curved scalar phi, its gradients, and their
derivatives along random probes, by finite differences and in both of autograd's modes.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .checks import check

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Problem:
    """fn under the curved scalar, its inputs, and the probes u and v."""

    def __init__(self, fn: Callable[..., Tensor], inputs: Sequence[Any], directions: int, seed: int):
        places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.is_floating_point()]
        check(bool(places), "inputs has no floating tensor to differentiate")
        self.fn, self.inputs, self.places, self.directions = fn, list(inputs), places, directions
        self.x = [inputs[i].detach().clone() for i in places]
        self.dtype = self.x[0].dtype
        check(self.dtype in DTYPES, f"inputs are {self.dtype}: must be one of {', '.join(map(str, DTYPES))}")
        for i, x in zip(places, self.x, strict=True):
            check(x.dtype == self.dtype, f"inputs[{i}] is {x.dtype}, inputs[{places[0]}] {self.dtype}: must be alike")
        self.names = [names_of(fn, len(inputs))[i] for i in places]
        self.generator = torch.Generator().manual_seed(seed)
        self.handed: list[Tensor] = []  # what fn was last given
        self.written: set[str] = set()  # inputs that fn or its backward changes
        self.w: Any = None  # drawn when the shape of fn's result is known
        self.fine = self.finest()
        self.u = [[self.draw(x) for _ in range(directions)] for x in self.x]
        self.v = [[self.draw(x) * scale_of(x) for _ in range(directions)] for x in self.x]

    def draw(self, like: Tensor) -> Tensor:
        """float64 normal numbers that like's type holds."""
        drawn = torch.randn(like.shape, generator=self.generator, dtype=torch.float64)
        return drawn.to(self.dtype).to(like.device, torch.float64)

    def output(self, x: Sequence[Tensor]) -> Tensor:
        """fn's result at x, in float64; w is drawn for the first."""
        arguments = list(self.inputs)
        self.handed = [value.clone() for value in x]  # a copy, should fn or its backward write into it
        for place, value in zip(self.places, self.handed, strict=True):
            arguments[place] = value
        y = self.fn(*arguments)
        check(isinstance(y, Tensor) and y.is_floating_point(), "fn must return one floating tensor")
        if self.w is None:
            self.w = self.draw(y)
        return y.double()

    def phi(self, x: Sequence[Tensor], curved: bool = True) -> Tensor:
        y = self.output(x)
        return (self.w * y + 0.5 * y * y).sum() if curved else (self.w * y).sum()

    def value_size(self) -> float:
        """What a rounding of the elements of y is of, seen in phi."""
        y = self.output([t.detach().requires_grad_() for t in self.x])
        return norm((self.w + y) * y)

    def gradient(self, x: Sequence[Tensor], curved: bool = True, graph: bool = False) -> list[Tensor]:
        return self.value_and_gradient(x, curved, graph)[1]

    def value_and_gradient(self, x: Sequence[Tensor], curved: bool, graph: bool) -> tuple[Tensor, list[Tensor]]:
        """phi and its gradient at x; zeros for what it does not depend on. With a graph, x are the leaves."""
        leaves = x if graph else [t.detach().requires_grad_() for t in x]
        value = self.phi(leaves, curved)
        grads = torch.autograd.grad(value, leaves, create_graph=graph, allow_unused=True)
        for name, ours, theirs in zip(self.names, leaves, self.handed, strict=True):
            if not torch.equal(ours.detach().nan_to_num(), theirs.detach().nan_to_num()):
                self.written.add(name)
        return value.detach(), zeros_for_none(grads, x)

    def slopes(self, gradient: Sequence[Tensor]) -> list[Tensor]:
        """<g_b, v> for every input and probe."""
        return [torch.stack([inner(g, v) for v in vs]) for g, vs in zip(gradient, self.v, strict=True)]

    def finest(self) -> torch.dtype:
        """What differences are taken in: float32 for 16-bit inputs, where fn takes float32 as well."""
        if self.dtype.itemsize < 4:
            try:
                self.gradient([x.float() for x in self.x])
            except Exception:  # fn holds 16-bit weights, say
                return self.dtype
            return torch.float32
        return self.dtype

    def differences(self, steps: Sequence[float], curved: bool = True) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Central differences at every step: of phi, per b [steps, v]; of <g_a, u>, per a and b [steps, v, u]."""
        n, k = len(self.x), self.directions
        values = [torch.zeros(len(steps), k, dtype=torch.float64) for _ in range(n)]
        slopes = [[torch.zeros(len(steps), k, k, dtype=torch.float64) for _ in range(n)] for _ in range(n)]
        for b in range(n):
            for level, h in enumerate(steps):
                for i, v in enumerate(self.v[b]):
                    up, grads_up = self.value_and_gradient(self.moved(b, h * v), curved, graph=False)
                    down, grads_down = self.value_and_gradient(self.moved(b, -h * v), curved, graph=False)
                    values[b][level, i] = (up - down) / (2 * h)
                    for a, (g_up, g_down) in enumerate(zip(grads_up, grads_down, strict=True)):
                        change = (g_up.double() - g_down.double()) / (2 * h)
                        slopes[a][b][level, i] = torch.stack([inner(change, u) for u in self.u[a]])
        return values, slopes

    def moved(self, b: int, by: Tensor) -> list[Tensor]:
        return [(t.double() + by if i == b else t).to(self.fine) for i, t in enumerate(self.x)]

    def reverse(self, a: int, curved: bool) -> list[Tensor]:
        """u^T (d g_a / d x_b) v for every b [v, u], by a second reverse pass."""
        leaves = [t.detach().requires_grad_() for t in self.x]
        g = self.gradient(leaves, curved, graph=True)[a]
        rows = []
        for u in self.u[a]:
            found: Sequence[Tensor | None] = [None] * len(leaves)
            if g.requires_grad:
                found = torch.autograd.grad(g, leaves, u.to(g.dtype), retain_graph=True, allow_unused=True)
            rows.append(self.slopes(zeros_for_none(found, leaves)))
        return [torch.stack(column, -1) for column in zip(*rows, strict=True)]

    def forward(self, b: int, curved: bool) -> list[Tensor]:
        """The same for every a, by dual numbers."""
        rows = []
        for v in self.v[b]:
            with forward_ad.dual_level():
                leaves = [t.detach().requires_grad_() for t in self.x]
                leaves[b] = forward_ad.make_dual(leaves[b], v.to(self.dtype))
                gradient = self.gradient(leaves, curved, graph=True)
                tangents = zeros_for_none([forward_ad.unpack_dual(g).tangent for g in gradient], self.x)
                rows.append([torch.stack([inner(t, u) for u in us]) for t, us in zip(tangents, self.u, strict=True)])
        return [torch.stack(column) for column in zip(*rows, strict=True)]


def zeros_for_none(found: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if t is None else t for t, x in zip(found, like, strict=True)]


def names_of(fn: Callable, count: int) -> list[str]:
    """The names of fn's positional parameters; x0, x1, .. where it does not tell."""
    try:
        parameters = list(inspect.signature(fn).parameters.values())
    except (TypeError, ValueError):  # a builtin without a signature
        parameters = []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in positional]
    return names[:count] if len(names) >= count else [f"x{i}" for i in range(count)]


def scale_of(x: Tensor) -> float:
    """Root mean square of x; 1 for zeros."""
    return (norm(x) / max(x.numel(), 1) ** 0.5) or 1.0


def norm(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x.detach().double()))


def inner(x: Tensor, y: Tensor) -> Tensor:
    """<x, y> in float64, on the CPU."""
    return (x.detach().double() * y).sum().cpu()
