"""Every op in float64: first and second derivatives in all three modes against plain PyTorch and finite differences."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F

from nacd_kernels import (
    flash_attention,
    frozen_linear,
    layer_norm,
    linear_cross_entropy,
    lora_linear,
    relu,
    rms_norm,
    silu_mul,
)

GENERATOR = torch.Generator().manual_seed(0)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def plain_lora(x: Tensor, a: Tensor, b: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, w, bias) + 1.7 * (x @ a.T) @ b.T


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    s = q @ k.mT * q.shape[-1] ** -0.5
    return s.masked_fill(torch.ones(s.shape[-2:], dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


def plain_rms(x: Tensor, w: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w


W, BIAS, GAIN, SHIFT, TABLE = rand(7, 5), rand(7), rand(6), rand(6), rand(11, 6)
LABELS = torch.tensor([3, -100, 0, 10, -100])

CASES: dict[str, tuple[Callable, Callable, list[Tensor]]] = {
    "lora_linear": (
        lambda x, a, b: lora_linear(x, W, BIAS, a, b, 1.7),
        lambda x, a, b: plain_lora(x, a, b, W, BIAS),
        [rand(2, 3, 5), rand(2, 5), rand(7, 2)],
    ),
    "lora_linear without bias": (
        lambda x, a, b: lora_linear(x, W, None, a, b, 1.7),
        lambda x, a, b: plain_lora(x, a, b, W, None),
        [rand(4, 5), rand(3, 5), rand(7, 3)],
    ),
    "frozen_linear": (lambda x: frozen_linear(x, W, BIAS), lambda x: F.linear(x, W, BIAS), [rand(2, 3, 5)]),
    "relu": (relu, F.relu, [rand(4, 5)]),
    "flash_attention": (flash_attention, plain_attention, [rand(2, 2, 5, 4), rand(2, 2, 5, 4), rand(2, 2, 5, 4)]),
    "flash_attention, grouped heads": (
        flash_attention,
        plain_attention,
        [rand(1, 4, 5, 3), rand(1, 2, 5, 3), rand(1, 2, 5, 3)],
    ),
    "rms_norm": (lambda x: rms_norm(x, GAIN), lambda x: plain_rms(x, GAIN), [rand(3, 6)]),
    "layer_norm": (lambda x: layer_norm(x, GAIN, SHIFT), lambda x: F.layer_norm(x, (6,), GAIN, SHIFT), [rand(3, 6)]),
    "layer_norm without affine": (lambda x: layer_norm(x, None, None), lambda x: F.layer_norm(x, (6,)), [rand(3, 6)]),
    "silu_mul": (silu_mul, lambda g, u: F.silu(g) * u, [rand(3, 4), rand(3, 4)]),
    "linear_cross_entropy": (
        lambda h: linear_cross_entropy(h, TABLE, LABELS),
        lambda h: F.cross_entropy(h @ TABLE.T, LABELS),
        [rand(5, 6)],
    ),
}
EVERY = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and chunks even at test sizes."""
    # by module name: the package has functions of the same names
    monkeypatch.setattr(sys.modules["nacd_kernels.attention_tiles"], "BLOCK", 2)
    monkeypatch.setattr(sys.modules["nacd_kernels.linear_cross_entropy"], "CHUNK_ELEMENTS", 22)


def leaves(name: str) -> list[Tensor]:
    return [t.clone().requires_grad_() for t in CASES[name][2]]


def scalar(y: Tensor) -> Tensor:
    """A fixed curved function of y, so that second derivatives of the op's surroundings matter too."""
    weights = torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype).view(y.shape)
    return (weights * y + 0.3 * y * y).sum()


def total(tensors: Iterable[Tensor]) -> Any:
    return sum(t.sum() for t in tensors)


@EVERY
def test_value_and_gradient_equal_plain_pytorch(name: str) -> None:
    fast, plain, _ = CASES[name]
    results = []
    for fn in (fast, plain):
        x = leaves(name)
        y = fn(*x)
        results.append([y.detach(), *torch.autograd.grad(scalar(y), x)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@EVERY
def test_gradcheck_and_gradgradcheck(name: str) -> None:
    fast, x = CASES[name][0], leaves(name)
    assert gradcheck(fast, x, check_forward_ad=True)
    assert gradgradcheck(fast, x)


def hessian_vector(fn: Callable, x: list[Tensor], v: list[Tensor | None], mode: str) -> list[Tensor]:
    if mode == "reverse over reverse":
        grads = torch.autograd.grad(scalar(fn(*x)), x, create_graph=True)
        along_v = total(g * t for g, t in zip(grads, v, strict=True) if t is not None)
        return list(torch.autograd.grad(along_v, x))
    with forward_ad.dual_level():
        dual = [t if tangent is None else forward_ad.make_dual(t, tangent) for t, tangent in zip(x, v, strict=True)]
        grads = torch.autograd.grad(scalar(fn(*dual)), dual)
        return [
            torch.zeros_like(t) if (tangent := forward_ad.unpack_dual(g).tangent) is None else tangent
            for g, t in zip(grads, x, strict=True)
        ]


@EVERY
@pytest.mark.parametrize("mode", ["forward over reverse", "reverse over reverse"])
def test_hessian_vector_product_equals_plain_pytorch(name: str, mode: str) -> None:
    """With a tangent on every input, and on each alone (the others' tangents are then missing, not zero)."""
    fast, plain, inputs = CASES[name]
    v = [rand(*t.shape) for t in inputs]
    alone: list[Any] = [[t if i == j else None for j, t in enumerate(v)] for i in range(len(v))]
    for tangents in [v, *alone]:
        ours = hessian_vector(fast, leaves(name), tangents, mode)
        plain_v = [
            torch.zeros_like(t) if tangent is None else tangent for t, tangent in zip(inputs, tangents, strict=True)
        ]
        theirs = hessian_vector(plain, leaves(name), plain_v, "reverse over reverse")
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@EVERY
def test_inputs_are_never_written(name: str) -> None:
    x = leaves(name)
    before = [t.detach().clone() for t in x]
    hessian_vector(CASES[name][0], x, [torch.ones_like(t) for t in x], "forward over reverse")
    assert all(torch.equal(t, old) for t, old in zip(x, before, strict=True))


@EVERY
def test_non_contiguous_inputs(name: str) -> None:
    fast, _, inputs = CASES[name]
    strided = [torch.stack([t, t], -1)[..., 0].requires_grad_() for t in inputs]
    ours = torch.autograd.grad(scalar(fast(*strided)), strided)
    theirs = torch.autograd.grad(scalar(fast(*(x := leaves(name)))), x)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@EVERY
def test_what_is_not_there_raises(name: str) -> None:
    """Third derivatives and reverse-over-forward are refused, never dropped."""
    x = leaves(name)
    grads = torch.autograd.grad(scalar(CASES[name][0](*x)), x, create_graph=True)
    hessian = torch.autograd.grad(total(grads), x, create_graph=True)
    with pytest.raises(RuntimeError, match="the third derivative of an op is not there"):
        torch.autograd.grad(total(hessian), x)
    with forward_ad.dual_level():
        y = CASES[name][0](*(forward_ad.make_dual(t, torch.ones_like(t)) for t in x))
        tangent = forward_ad.unpack_dual(y).tangent
        with pytest.raises(RuntimeError, match="the reverse-over-forward derivative of an op is not there"):
            torch.autograd.grad(tangent.sum(), x)


def test_no_supervised_row_is_a_zero_loss_with_a_zero_gradient() -> None:
    h = rand(3, 6).requires_grad_()
    loss = linear_cross_entropy(h, TABLE, torch.full((3,), -100))
    (g,) = torch.autograd.grad(loss, h)
    assert loss == 0 and not g.any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lora_linear(rand(2, 4), W, None, rand(2, 5), rand(7, 2), 1.0), "w is"),
        (lambda: lora_linear(rand(2, 5), W, None, rand(2, 5), rand(7, 3), 1.0), "b is"),
        (lambda: lora_linear(rand(2, 5), W.float(), None, rand(2, 5), rand(7, 2), 1.0), "float32"),
        (lambda: lora_linear(rand(2, 5), W.clone().requires_grad_(), None, rand(2, 5), rand(7, 2), 1.0), "frozen"),
        (lambda: rms_norm(rand(2, 5), GAIN), r"w must be \[5\]"),
        (lambda: silu_mul(rand(2, 5), rand(2, 4)), "one shape"),
        (lambda: flash_attention(rand(1, 3, 5, 4), rand(1, 2, 5, 4), rand(1, 2, 5, 4)), "multiple"),
        (lambda: linear_cross_entropy(rand(5, 6), TABLE, LABELS[:3]), "labels is"),
    ],
)
def test_bad_arguments_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
