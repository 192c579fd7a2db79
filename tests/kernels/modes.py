"""First and second derivatives of an op along given directions, in each way that autograd can be asked for them."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nacd_kernels import bare_tangents
from nacd_kernels.twice import Maybe
from tests.kernels.numerics import zeros_for_none

MODES = ("reverse", "forward", "joint")  # over reverse; joint: primal and tangent by the op's dual functions


def curved(y: Tensor) -> Tensor:
    """A fixed curved function of y, so that dy moves with y."""
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=torch.float64, device=y.device).to(y.dtype).view(y.shape)
    return (weights * y + 0.3 * y * y).sum()


def derivatives(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor], directions: Sequence[Maybe], mode: str
) -> list[Tensor]:
    """y, and of curved(y): its slope along the directions, its gradients and their derivatives along them.

    A direction that is None is zero; in `forward` and `joint` the input then has no tangent.
    """
    x = [t.detach().requires_grad_() for t in inputs]
    if mode == "reverse":
        y = fn(*x)
        grads = torch.autograd.grad(curved(y), x, create_graph=True)
        slopes = [(g * v).sum() for g, v in zip(grads, directions, strict=True) if v is not None]
        slope = torch.stack(slopes).sum()
        return [y, slope, *grads, *torch.autograd.grad(slope, x)]
    with forward_ad.dual_level(), bare_tangents() if mode == "joint" else nullcontext():
        dual = [t if v is None else forward_ad.make_dual(t, v) for t, v in zip(x, directions, strict=True)]
        y = fn(*dual)
        loss = curved(y)
        grads = torch.autograd.grad(loss, dual)
        pairs = [forward_ad.unpack_dual(g) for g in (loss, *grads)]
        tangents = [zeros_for_none(p.tangent, p.primal) for p in pairs]
        return [forward_ad.unpack_dual(y).primal, tangents[0], *(p.primal for p in pairs[1:]), *tangents[1:]]


def alone(directions: Sequence[Tensor]) -> list[list[Maybe]]:
    """The directions together, and each by itself."""
    single = [[v if i == j else None for j, v in enumerate(directions)] for i in range(len(directions))]
    return [list(directions), *single] if len(directions) > 1 else [list(directions)]


def assert_same_derivatives(
    fast: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    mode: str,
    tolerance: float = 1e-12,
) -> None:
    """In float64, along random directions, together and alone."""
    g = torch.Generator().manual_seed(7)
    directions = [torch.randn(t.shape, generator=g, dtype=torch.float64).to(t) for t in inputs]
    for some in alone(directions):
        ours, theirs = derivatives(fast, inputs, some, mode), derivatives(plain, inputs, some, "reverse")
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# x [..., m, n] -> its values with strides that ops meet; `expanded` repeats the first row
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "every second": lambda x: torch.stack([x, x], -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT,
    "expanded": lambda x: x[..., :1, :].expand(x.shape),
}


def laid_out(fn: Callable[..., Tensor], layout: str) -> Callable[..., Tensor]:
    """fn, given its first input in that layout, and later a cotangent that is transposed."""
    return lambda x, *rest: fn(LAYOUTS[layout](x), *rest).mT.contiguous()
