"""rms_norm and layer_norm: float64 against plain PyTorch in every mode, the kernels' numbers, degenerate rows."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from nacd_kernels import bare_tangents, layer_norm, rms_norm
from nacd_kernels.twice import Maybe
from tests.kernels.modes import LAYOUTS, MODES, assert_same_derivatives, derivatives, laid_out
from tests.kernels.numerics import DEVICE, assert_as_good_as_torch, draw

EPS = 1e-5


def plain_rms(x: Tensor, w: Maybe, offset: float) -> Tensor:
    """As transformers' Gemma has it: in float32 to the end."""
    wide = x if x.dtype == torch.float64 else x.float()
    n = wide * (wide.square().mean(-1, keepdim=True) + EPS).rsqrt()
    return (n if w is None else n * (w.to(wide.dtype) + offset)).to(x.dtype)


def plain_layer(x: Tensor, w: Maybe, b: Maybe) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], w, b, EPS)


class Case:
    """Ours and PyTorch's as functions of x, with a gain and a shift of x's width and type."""

    def __init__(self, kind: str, w: bool, b: bool = False, offset: float = 0.0):
        self.kind, self.w, self.b, self.offset = kind, w, b, offset

    def affine(self, x: Tensor) -> tuple[Maybe, Maybe]:
        wanted = ((self.w, 11), (self.b, 12))
        weight, bias = (draw(x.shape[-1], seed=seed).to(x) if there else None for there, seed in wanted)
        return weight, bias

    def ours(self, x: Tensor) -> Tensor:
        w, b = self.affine(x)
        return layer_norm(x, w, b, EPS) if self.kind == "layer" else rms_norm(x, w, EPS, self.offset)

    def plain(self, x: Tensor) -> Tensor:
        w, b = self.affine(x)
        return plain_layer(x, w, b) if self.kind == "layer" else plain_rms(x, w, self.offset)


CASES = {
    "rms": Case("rms", w=True),
    "rms, offset": Case("rms", w=True, offset=1.0),
    "rms, no gain": Case("rms", w=False),
    "layer": Case("layer", w=True, b=True),
    "layer, no shift": Case("layer", w=True),
    "layer, no gain": Case("layer", w=False),
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def choose(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("NACD_KERNELS", backend)


@EVERY
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(3, 1), (63,), (2, 2, 65), (5, 129)])
def test_both_derivatives_equal_plain_pytorch(case: Case, mode: str, shape: tuple[int, ...]) -> None:
    assert_same_derivatives(case.ours, case.plain, [draw(*shape, seed=1)], mode, tolerance=1e-10)


@EVERY
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    x = draw(3, 5, seed=1).requires_grad_()
    assert gradcheck(case.ours, x, check_forward_ad=True)
    assert gradgradcheck(case.ours, x)


@EVERY
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(case: Case, mode: str, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(4, 6, seed=1)
    ours, plain = laid_out(case.ours, layout), laid_out(case.plain, layout)
    assert_same_derivatives(ours, plain, [x], mode)
    choose("triton", monkeypatch)
    assert_same_derivatives(ours, plain, [x.float()], mode, tolerance=5e-5)


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_as_good_as_torch(
    case: Case, backend: str, dtype: torch.dtype, joint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(backend, monkeypatch)
    with bare_tangents() if joint else nullcontext():
        for D in (63, 65, 129):
            assert_as_good_as_torch(case.ours, case.plain, [draw(8, D, seed=D)], dtype)


@BACKENDS
def test_a_row_of_one_number(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is its own mean, and but for eps its own deviation: everything cancels but rms_norm's sign."""
    choose(backend, monkeypatch)
    x = torch.tensor([[2.0], [-3.0]], device=DEVICE)
    for case in CASES.values():
        for mode in MODES:
            ours = derivatives(case.ours, [x], [torch.ones_like(x)], mode)
            exact = derivatives(case.plain, [x.double()], [torch.ones_like(x).double()], "reverse")
            for a, b in zip(ours, exact, strict=True):
                torch.testing.assert_close(a.double(), b, rtol=1e-6, atol=3e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_without_deviation(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """n is 0, so the map is x / sqrt(eps) there, less its mean for LayerNorm, and its curvature 0."""
    choose(backend, monkeypatch)
    v, eps = draw(2, 64, seed=3), 1e-2
    v -= v.mean(-1, keepdim=True)
    direction = v.to(dtype)
    rows = {"rms": torch.zeros(2, 64), "layer": torch.tensor([[3.0], [-1e4]]).expand(2, 64)}
    for kind, row in rows.items():
        x = row.to(DEVICE, dtype).clone().requires_grad_()
        y = rms_norm(x, None, eps) if kind == "rms" else layer_norm(x, None, None, eps)
        (g,) = torch.autograd.grad(y, x, direction, create_graph=True)
        (h,) = torch.autograd.grad(g, x, direction)
        assert not y.any()
        torch.testing.assert_close(g, (10 * direction).to(dtype), rtol=4 * torch.finfo(dtype).eps, atol=0.01)
        assert h.abs().max() <= 1e-3 * g.abs().max()


@EVERY
@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_large_rows_do_not_overflow(
    case: Case, backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norm of 1e4 x is that of x, though the squares pass float16's largest number."""
    choose(backend, monkeypatch)
    small, large = draw(3, 65, seed=1).to(dtype), (1e4 * draw(3, 65, seed=1)).to(dtype)
    outs = [derivatives(case.ours, [x], [draw(3, 65, seed=2).to(dtype)], "joint") for x in (small, large)]
    assert all(t.isfinite().all() for t in outs[1])
    torch.testing.assert_close(outs[1][0], outs[0][0], rtol=0.02, atol=0.02)
    torch.testing.assert_close(1e4 * outs[1][2].float(), outs[0][2].float(), rtol=0.1, atol=0.1)


@EVERY
@BACKENDS
def test_mixed_types_and_empty(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 gain on 16-bit rows; no rows at all."""
    choose(backend, monkeypatch)
    x = draw(3, 65, seed=1)
    w = draw(65, seed=2).float()
    y = rms_norm(x.bfloat16(), w, EPS)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), plain_rms(x, w, 0.0), rtol=0.01, atol=0.01)
    none = torch.zeros(0, 65, device=DEVICE)
    assert derivatives(case.ours, [none], [none], "joint")[0].shape == (0, 65)


def test_statistics_are_a_number_or_two_a_row() -> None:
    """The graph of a norm keeps x and r (and the mean), not a normalised copy of x."""
    x = draw(8, 64, seed=1).requires_grad_()
    kept: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        rms_norm(x, None)
        layer_norm(x, None, None)
    distinct = {t.data_ptr(): t.numel() for t in kept}
    assert sorted(distinct.values()) == [8, 8, 8, x.numel()]


def test_rows_that_the_kernels_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 8193, device=DEVICE)
    choose("triton", monkeypatch)
    with pytest.raises(ValueError, match="x has 8193 features, and the kernels take up to 8192"):
        rms_norm(x, None)
    choose("reference", monkeypatch)
    assert rms_norm(x, None).shape == x.shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rms_norm(torch.zeros(2, 5), torch.ones(6)), r"w must be \[5\]"),
        (lambda: layer_norm(torch.zeros(2, 5), torch.ones(5), torch.ones(1)), r"b must be \[5\]"),
        (lambda: rms_norm(torch.zeros(2, 5), torch.ones(5, requires_grad=True)), "w requires a gradient"),
        (lambda: rms_norm(torch.zeros(2, 0), None), "with D > 0"),
        (lambda: rms_norm(torch.tensor(1.0), None), "with D > 0"),
    ],
)
def test_bad_arguments_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
