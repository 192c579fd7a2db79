"""How good a kernel's numbers are: its error against float64 beside that of PyTorch's own composition.

An op is asked for four things along one random direction, as its four functions give them: y, its tangent, the
gradient, and the gradient's tangent.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nacd_kernels.dispatch import has_triton

if has_triton() and not torch.cuda.is_available():
    from tests.kernels import interpreter  # noqa: F401

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLACK = 1e-7  # of the largest value: what float32 cannot resolve
PARTS = ("y", "y_t", "dx", "dx_t")

Op = Callable[..., Tensor]


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """float64 normal values that float32 and bfloat16 hold exactly."""
    g = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=g)).bfloat16().double().to(DEVICE)


def four(fn: Op, inputs: Sequence[Tensor], seed: int = 99) -> dict[str, list[Tensor]]:
    """y, y', dx and dx' of fn at the inputs, along a fixed direction of the inputs and of the cotangent."""
    directions = [draw(*x.shape, seed=seed + i).to(x.dtype) for i, x in enumerate(inputs)]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x.detach().requires_grad_(), t) for x, t in zip(inputs, directions, strict=True)]
        y = fn(*duals)
        dy, dy_t = (draw(*y.shape, seed=seed + 50 + i).to(y.dtype) for i in (0, 1))
        grads = torch.autograd.grad(y, duals, forward_ad.make_dual(dy, dy_t))
        pairs = [forward_ad.unpack_dual(g) for g in grads]
        whole = forward_ad.unpack_dual(y)
        return {
            "y": [whole.primal.detach()],
            "y_t": [zeros_for_none(whole.tangent, y)],
            "dx": [p.primal.detach() for p in pairs],
            "dx_t": [zeros_for_none(p.tangent, p.primal) for p in pairs],
        }


def four_by_reverse(fn: Op, inputs: Sequence[Tensor], seed: int = 99) -> dict[str, list[Tensor]]:
    """The same of a plain composition, which may lack forward mode: by two reverse passes more."""
    directions = [draw(*x.shape, seed=seed + i).to(x.dtype) for i, x in enumerate(inputs)]
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = fn(*leaves)
    dy, dy_t = (draw(*y.shape, seed=seed + 50 + i).to(y.dtype) for i in (0, 1))
    dy.requires_grad_()
    grads = torch.autograd.grad(y, leaves, dy, create_graph=True)
    # y' = d<dx, v>/d dy, and dx' = d(<dx, v>)/dx + J(x)^T dy'
    inner = torch.stack([(g * v).sum() for g, v in zip(grads, directions, strict=True)]).sum()
    y_t, *mixed = torch.autograd.grad(inner, [dy, *leaves], retain_graph=True, allow_unused=True)
    along = torch.autograd.grad(y, leaves, dy_t)
    total = [a if m is None else a + m for a, m in zip(along, mixed, strict=True)]
    return {"y": [y.detach()], "y_t": [y_t], "dx": [g.detach() for g in grads], "dx_t": total}


def zeros_for_none(x: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like).detach() if x is None else x.detach()


def assert_as_good_as_torch(
    fast: Op,
    plain: Op,
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    plain_reverse: bool = True,
    summands: float = 0.0,
) -> None:
    """The error of `fast` in dtype is at most twice that of `plain` in dtype, part by part, both against float64.

    inputs: float64, exact in dtype (as `draw` makes them). `plain` is asked by reverse passes, or in forward mode.
    summands: the size of what a result of a single number is made of. The error of one number can be zero by luck, so
    there one rounding of a summand in dtype passes, too.
    """
    exact = four_by_reverse(plain, inputs)
    low = [x.to(dtype) for x in inputs]
    base = (four_by_reverse if plain_reverse else four)(plain, low)
    ours = four(fast, low)
    for part in PARTS:
        for i, (a, b, want) in enumerate(zip(ours[part], base[part], exact[part], strict=True)):
            assert a.isfinite().all(), f"{part}[{i}] is not finite"
            error, limit = ((t.double() - want).abs().max() for t in (a, b))
            floor = SLACK * want.abs().max()
            if want.numel() == 1:
                floor += torch.finfo(dtype).eps / 2 * summands
            assert error <= 2 * limit + floor, f"{part}[{i}]: kernel error {error:.2e}, torch error {limit:.2e}"
