"""relu, gelu, silu_mul, gelu_mul: float64 against plain PyTorch in every mode, the kernels' numbers, the extremes."""

import sys
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from nacd_kernels import bare_tangents, gelu, gelu_mul, relu, silu_mul
from tests.kernels.modes import LAYOUTS, MODES, assert_same_derivatives, derivatives, laid_out
from tests.kernels.numerics import DEVICE, assert_as_good_as_torch, draw

CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "relu": (relu, F.relu, 1),
    "gelu": (gelu, F.gelu, 1),
    "gelu tanh": (lambda x: gelu(x, "tanh"), lambda x: F.gelu(x, approximate="tanh"), 1),
    "silu_mul": (silu_mul, lambda g, u: F.silu(g) * u, 2),
    "gelu_mul": (gelu_mul, lambda g, u: F.gelu(g) * u, 2),
    "gelu_mul tanh": (lambda g, u: gelu_mul(g, u, "tanh"), lambda g, u: F.gelu(g, approximate="tanh") * u, 2),
}
EVERY = pytest.mark.parametrize("name", CASES)
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several pieces even at test sizes."""
    monkeypatch.setattr(sys.modules["nacd_kernels.pieces"], "ELEMENTS", 40)


def choose(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("NACD_KERNELS", backend)


def inputs_of(name: str, *shape: int) -> list[Tensor]:
    return [draw(*shape, seed=i, scale=1.5) for i in range(CASES[name][2])]


@EVERY
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 63, 65, 129])
def test_both_derivatives_equal_plain_pytorch(name: str, mode: str, size: int) -> None:
    fast, plain, _ = CASES[name]
    assert_same_derivatives(fast, plain, inputs_of(name, size), mode)


@EVERY
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    x = [t.requires_grad_() for t in inputs_of(name, 3, 5)]
    assert gradcheck(CASES[name][0], x, check_forward_ad=True)
    assert gradgradcheck(CASES[name][0], x)


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_any_layout(name: str, mode: str) -> None:
    fast, plain, _ = CASES[name]
    for layout in LAYOUTS:
        assert_same_derivatives(laid_out(fast, layout), laid_out(plain, layout), inputs_of(name, 7, 9), mode)


@EVERY
@BACKENDS
def test_empty(name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(backend, monkeypatch)
    x = [torch.zeros(0, 3, device=DEVICE) for _ in inputs_of(name, 1)]
    assert derivatives(CASES[name][0], x, x, "joint")[0].shape == (0, 3)


@pytest.mark.parametrize("only", [0, 1], ids=["gate", "up"])
@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_factor_that_needs_no_gradient(only: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(backend, monkeypatch)
    fixed = draw(65, seed=3).float()

    def with_fixed(op: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: op(x, fixed) if only == 0 else op(fixed, x)

    x, v = draw(65, seed=4).float(), draw(65, seed=5).float()
    for mode in MODES:
        ours = derivatives(with_fixed(silu_mul), [x], [v], mode)
        theirs = derivatives(with_fixed(lambda g, u: F.silu(g) * u), [x], [v], "reverse")
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_as_good_as_torch(
    name: str, backend: str, dtype: torch.dtype, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows, enough of them that the largest errors are not luck; and one number."""
    choose(backend, monkeypatch)
    fast, plain, _ = CASES[name]
    with bare_tangents() if joint else nullcontext():
        for shape in ((31, 63), (31, 65), (31, 129)):
            assert_as_good_as_torch(fast, plain, inputs_of(name, *shape), dtype)
        assert_as_good_as_torch(fast, plain, inputs_of(name, 1), dtype, summands=8.0)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_far_from_zero_slopes_are_0_or_1_and_curvature_0(
    kind: str, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(backend, monkeypatch)
    largest = torch.finfo(dtype).max / 2
    x = torch.tensor([-30.0, 30.0, -1e4, 1e4, -largest, largest], dtype=torch.float64).to(DEVICE, dtype)
    one = torch.ones_like(x)
    op = {"silu": lambda g: silu_mul(g, one), "gelu": gelu, "gelu tanh": lambda g: gelu(g, "tanh")}[kind]
    leaf = x.clone().requires_grad_()
    y = op(leaf)
    (slope,) = torch.autograd.grad(y, leaf, one, create_graph=True)
    (curvature,) = torch.autograd.grad(slope, leaf, one)
    assert torch.allclose(y, x.clamp(min=0), rtol=1e-6, atol=1e-10)
    assert torch.allclose(slope, (x > 0).to(dtype), atol=1e-6)
    assert torch.allclose(curvature, torch.zeros_like(x), atol=1e-6)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_relu_is_flat_at_zero_and_keeps_nan(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(backend, monkeypatch)
    x = torch.tensor([0.0, -0.0, float("nan"), 2.0], device=DEVICE).requires_grad_()
    y = relu(x)
    (g,) = torch.autograd.grad(y, x, torch.ones_like(x))
    torch.testing.assert_close(y, F.relu(x), equal_nan=True)
    torch.testing.assert_close(g, torch.autograd.grad(F.relu(x), x, torch.ones_like(x))[0])


@EVERY
def test_kernels_take_any_layout(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose("triton", monkeypatch)
    fast, plain, _ = CASES[name]
    x = [t.float() for t in inputs_of(name, 7, 9)]
    for layout in LAYOUTS:
        for mode in MODES:
            assert_same_derivatives(laid_out(fast, layout), laid_out(plain, layout), x, mode, tolerance=2e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: silu_mul(torch.zeros(2, 5), torch.zeros(2, 4)), "gate is"),
        (lambda: gelu_mul(torch.zeros(2), torch.zeros(2).double()), "up is torch.float64"),
        (lambda: gelu_mul(torch.zeros(2), torch.zeros(2), "sigmoid"), "approximate='sigmoid': must be none or tanh"),
        (lambda: gelu(torch.zeros(2), "fast"), "approximate='fast'"),
    ],
)
def test_bad_arguments_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
