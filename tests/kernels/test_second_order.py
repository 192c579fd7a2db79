"""Right functions pass, and of wrong ones it is told which input lost its second derivative, and how."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

import nacd_kernels as ops
from nacd_kernels.second_order import (
    FIRST,
    FORWARD,
    REVERSE,
    SecondOrderError,
    SecondOrderReport,
    check_second_order,
)
from nacd_kernels.second_order_probe import names_of

GENERATOR = torch.Generator().manual_seed(0)
ALL_DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])


def rand(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64).to(dtype)


def verdicts(report: SecondOrderReport, mode: str) -> dict[tuple[str, str], str]:
    return {(v.first, v.second): v.verdict for v in report.verdicts if v.mode == mode}


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


W, TABLE, LABELS = rand(7, 6), rand(11, 6), torch.tensor([3, -100, 0, 10, 2])
RIGHT: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
    "tanh": (torch.tanh, [rand(3, 4)]),
    "product": (lambda x, w: x @ w.T, [rand(5, 6), rand(3, 6)]),
    "a linear function": (lambda x: 3 * x, [rand(5)]),
    "a constant": (lambda x, y: x * x, [rand(3), rand(2)]),
    "a scalar": (lambda x: x.exp().sum(), [rand(5)]),
    "silu, which has no double backward in forward mode": (F.silu, [rand(9)]),
    "zeros": (lambda x: x.exp(), [torch.zeros(4, dtype=torch.float64)]),
    "attention": (plain_attention, [rand(2, 5, 4), rand(2, 5, 4), rand(2, 5, 4)]),
    "cross-entropy": (lambda h: F.cross_entropy(h @ TABLE.T, LABELS), [rand(5, 6)]),
    "our flash_attention": (ops.flash_attention, [rand(1, 2, 5, 4), rand(1, 2, 5, 4), rand(1, 2, 5, 4)]),
    "our rms_norm": (lambda x: ops.rms_norm(x, W[0]), [rand(4, 6)]),
    "our layer_norm": (lambda x: ops.layer_norm(x, W[0], W[1]), [rand(4, 6)]),
    "our silu_mul": (ops.silu_mul, [rand(3, 4), rand(3, 4)]),
    "our frozen_linear": (lambda x: ops.frozen_linear(x, W), [rand(4, 6)]),
    "our lora_linear": (lambda x, a, b: ops.lora_linear(x, W, None, a, b, 1.5), [rand(4, 6), rand(2, 6), rand(7, 2)]),
    "our loss": (lambda h: ops.linear_cross_entropy(h, TABLE, LABELS, softcap=4.0), [rand(5, 6)]),
    "our distance": (lambda p: ops.nearest_embedding(p, TABLE)[1], [rand(4, 6)]),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_functions_pass(name: str) -> None:
    fn, inputs = RIGHT[name]
    report = check_second_order(fn, inputs)
    assert report.ok, str(report)
    assert {v.mode for v in report.verdicts} == {FIRST, REVERSE, FORWARD}
    report.raise_if_wrong()


@ALL_DTYPES
@pytest.mark.parametrize("name", ["tanh", "product", "attention", "our silu_mul", "a linear function"])
def test_right_functions_pass_in_every_type(name: str, dtype: torch.dtype) -> None:
    fn, inputs = RIGHT[name]
    for seed in range(3):
        report = check_second_order(fn, [x.to(dtype) for x in inputs], seed=seed)
        assert report.ok, str(report)


class Square(torch.autograd.Function):
    """x^2 whose backward reads what was saved past autograd: 2 x dy, with x for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0].data * dy


class FusedLoss(torch.autograd.Function):
    """As Liger's fused cross-entropy: the forward forms the gradient, the backward scales it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        with torch.enable_grad():
            x = h.detach().requires_grad_()
            loss = F.cross_entropy(x @ TABLE.T.to(h.dtype), LABELS)
            ctx.save_for_backward(*torch.autograd.grad(loss, x))
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * ctx.saved_tensors[0]


class OnceSquare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * dy


class ConstantAttention(torch.autograd.Function):
    """As jvp-flash-attention: a right backward that takes P, and all that it is computed from, for constants."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        p = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(q, k, v)
        ctx.p = p
        return p @ v

    @staticmethod
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = ctx.saved_tensors
        dp = do @ v.mT
        ds = ctx.p * (dp - (dp * ctx.p).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        return ds @ k, ds.mT @ q, ctx.p.mT @ do


class OneLost(torch.autograd.Function):
    """x y z, whose gradient in y alone takes x for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x, y, z)
        return x * y * z

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, y, z = ctx.saved_tensors
        return y * z * dy, x.detach() * z * dy, x * y * dy


class HalfGradient(torch.autograd.Function):
    """x y whose gradient in y is half of what it should be; its derivative is that of the wrong gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        x, y = ctx.saved_tensors
        return y * dy, 0.5 * x * dy


class Doubled(torch.autograd.Function):
    """3 x whose double backward is twice as large as it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 3 * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return 3 * dy + 3 * (dy - dy.detach())


class Overwriting(torch.autograd.Function):
    """x^2 whose backward leaves the gradient in the memory of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x
        return x * x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return ctx.x.data.mul_(2).mul_(dy)


@ALL_DTYPES
def test_a_saved_tensor_read_past_autograd_is_a_missing_derivative(dtype: torch.dtype) -> None:
    def square(x: Tensor) -> Tensor:
        return Square.apply(x)

    report = check_second_order(square, [rand(5, 6, dtype=dtype)])
    assert verdicts(report, REVERSE) == {("x", "x"): "missing"}, str(report)
    assert verdicts(report, FIRST) == {("x", ""): "right"}
    assert verdicts(report, FORWARD) == {("x", "x"): "unsupported"}
    with pytest.raises(SecondOrderError, match="square: d2/dx dx is missing: the gradient of x takes x for a constant"):
        report.raise_if_wrong()


def test_a_gradient_formed_in_the_forward_is_a_missing_derivative() -> None:
    report = check_second_order(FusedLoss.apply, [rand(5, 6)])
    assert verdicts(report, REVERSE) == {("x0", "x0"): "missing"}, str(report)


def test_once_differentiable_is_no_protection() -> None:
    """torch.autograd.grad goes around its error, and returns nothing for x."""
    report = check_second_order(OnceSquare.apply, [rand(3)])
    assert verdicts(report, REVERSE) == {("x0", "x0"): "missing"}, str(report)


def test_a_derivative_that_is_refused_is_told() -> None:
    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(ops.relu(x).sin().sum(), x, create_graph=True)[0]

    with pytest.raises(SecondOrderError, match="d2/dx dx raises: RuntimeError: the third derivative of an op is not"):
        check_second_order(gradient, [rand(4)]).raise_if_wrong()


@ALL_DTYPES
def test_attention_with_constant_probabilities_lost_what_runs_through_them(dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ConstantAttention.apply(q, k, v)

    report = check_second_order(attention, [rand(2, 5, 4, dtype=dtype) for _ in range(3)])
    assert set(verdicts(report, FIRST).values()) == {"right"}
    found = verdicts(report, REVERSE)
    lost = {pair for pair, verdict in found.items() if verdict == "missing"}
    assert lost == {("q", "q"), ("k", "k"), ("v", "q"), ("v", "k")}, str(report)
    assert found["q", "k"] == found["k", "q"] == "wrong"  # only the part through P is missing
    assert found["v", "v"] == found["q", "v"] == found["k", "v"] == "right"


def test_one_lost_input_of_three_is_named() -> None:
    def product(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        return OneLost.apply(x, y, z)

    report = check_second_order(product, [rand(4) for _ in range(3)])
    assert {pair for pair, v in verdicts(report, REVERSE).items() if v != "right"} == {("y", "x")}, str(report)
    with pytest.raises(SecondOrderError, match=r"^product: d2/dy dx is missing: [^;]*$"):
        report.raise_if_wrong()


def test_a_wrong_first_derivative_is_told_apart_from_the_second() -> None:
    report = check_second_order(HalfGradient.apply, [rand(4), rand(4)])
    assert verdicts(report, FIRST) == {("x0", ""): "right", ("x1", ""): "wrong"}
    with pytest.raises(SecondOrderError, match=r"d/dx1 is wrong: 0\.5 times what it should be"):
        report.raise_if_wrong()
    assert "d/dx1" in str(report)


def test_a_gradient_that_is_cut_off_is_missing_altogether() -> None:
    class Cut(torch.autograd.Function):
        """A product whose gradient hangs on nothing, as after a raw kernel that reads dy's memory."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
            x, y = (t.detach() for t in ctx.saved_tensors)
            return y * dy.detach(), x * dy.detach()

    report = check_second_order(Cut.apply, [rand(4), rand(4)])
    assert set(verdicts(report, REVERSE).values()) == {"missing"}, str(report)


def test_a_factor_is_told() -> None:
    with pytest.raises(SecondOrderError, match="2 times what it should be"):
        check_second_order(Doubled.apply, [rand(4)]).raise_if_wrong()


def test_an_input_that_is_overwritten_is_told_and_the_callers_is_left_alone() -> None:
    x = rand(4)
    before = x.clone()
    with pytest.raises(SecondOrderError, match="writes into it"):
        check_second_order(Overwriting.apply, [x]).raise_if_wrong()
    assert torch.equal(x, before)


def test_a_function_that_is_not_deterministic_is_told() -> None:
    report = check_second_order(lambda x: F.dropout(x, 0.5) ** 2, [rand(50)])
    assert not report.ok and report.noise > 0.1 and "not deterministic" in str(report)
    with pytest.raises(SecondOrderError, match="two equal calls differ"):
        report.raise_if_wrong()


def test_16_bit_weights_inside_are_no_obstacle() -> None:
    """The differences are then taken in 16 bits."""
    w = W.bfloat16()
    assert check_second_order(lambda x: (x @ w.T).tanh(), [rand(4, 6, dtype=torch.bfloat16)], tolerance=0.2).ok


def test_a_little_noise_as_of_atomics_passes_and_is_told() -> None:
    calls = iter(range(10**6))

    def noisy(x: Tensor) -> Tensor:
        return x**3 * (1 + 1e-9 * (next(calls) % 7))

    report = check_second_order(noisy, [rand(6)])
    assert report.ok and 0 < report.noise < 1e-7, str(report)


def test_a_function_that_fails_is_told() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("no such kernel")

    with pytest.raises(SecondOrderError, match="d/dx raises: RuntimeError: no such kernel"):
        check_second_order(broken, [rand(3)]).raise_if_wrong()


def test_kinks_are_not_taken_for_errors() -> None:
    """float64 has steps small enough to miss them; float32 may have to say that it cannot tell."""
    assert check_second_order(F.relu, [rand(2000)]).ok
    low = check_second_order(F.relu, [rand(2000, dtype=torch.float32)])
    assert {v.verdict for v in low.verdicts} <= {"right", "unclear"}, str(low)


def test_other_arguments_are_passed_on() -> None:
    def take(x: Tensor, index: Tensor, scale: float) -> Tensor:
        return scale * x[index].sin()

    report = check_second_order(take, [rand(5), torch.tensor([0, 3]), 2.0])
    assert report.ok and {v.first for v in report.verdicts} == {"x"}


def test_the_same_seed_gives_the_same_report() -> None:
    first, again, other = (check_second_order(torch.tanh, [W], seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_names() -> None:
    assert names_of(lambda a, b: a, 2) == ["a", "b"]
    assert names_of(lambda *x: x, 2) == ["x0", "x1"]
    assert names_of(torch.exp, 1) == ["x0"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_second_order(torch.tanh, [torch.tensor([1])]), "no floating tensor"),
        (lambda: check_second_order(torch.add, [W, W.float()]), r"inputs\[1\] is torch.float32"),
        (lambda: check_second_order(torch.tanh, [W], directions=0), "directions=0"),
        (lambda: check_second_order(torch.tanh, [W.to(torch.float8_e5m2)]), "float8"),
    ],
)
def test_bad_arguments_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
