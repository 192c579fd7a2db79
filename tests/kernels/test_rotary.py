"""rotary_embedding: float64 against plain PyTorch in every mode, transformers' tables, the kernel's numbers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from nacd_kernels import rotary_embedding
from tests.kernels.modes import LAYOUTS, MODES, assert_same_derivatives, derivatives, laid_out
from tests.kernels.numerics import DEVICE, assert_as_good_as_torch, draw

BACKENDS = pytest.mark.parametrize("backend", ["reference", "triton"])


def choose(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("NACD_KERNELS", backend)


def plain(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    R = cos.shape[-1]
    cos, sin = (t.unsqueeze(1) if t.ndim == 3 else t for t in (cos, sin))
    turned, rest = x[..., :R], x[..., R:]
    if interleaved:
        rotated = torch.stack((-turned[..., 1::2], turned[..., ::2]), -1).flatten(-2)
    else:
        rotated = torch.cat((-turned[..., R // 2 :], turned[..., : R // 2]), -1)
    return torch.cat((turned * cos + rotated * sin, rest), -1)


class Case:
    """Ours and PyTorch's as functions of x [2, H, T, d], with tables of random numbers, alike in no two features."""

    def __init__(self, R: int, interleaved: bool, per_sample: bool):
        self.R, self.interleaved, self.per_sample = R, interleaved, per_sample

    def tables(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (*([x.shape[0]] if self.per_sample else []), x.shape[2], self.R)
        return draw(*shape, seed=11).to(x), draw(*shape, seed=12).to(x)

    def ours(self, x: Tensor) -> Tensor:
        return rotary_embedding(x, *self.tables(x), self.interleaved)

    def plain(self, x: Tensor) -> Tensor:
        return plain(x, *self.tables(x), self.interleaved)


CASES = {
    f"{R} of 10{', interleaved' * interleaved}{', by sample' * per_sample}": Case(R, interleaved, per_sample)
    for R in (10, 4)
    for interleaved in (False, True)
    for per_sample in (False, True)
}
EVERY = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


@EVERY
@pytest.mark.parametrize("mode", MODES)
def test_both_derivatives_equal_plain_pytorch(case: Case, mode: str) -> None:
    for T in (1, 7):
        assert_same_derivatives(case.ours, case.plain, [draw(2, 3, T, 10, seed=1)], mode)


@EVERY
def test_gradcheck_and_gradgradcheck(case: Case) -> None:
    x = draw(2, 1, 2, 10, seed=1).requires_grad_()
    assert gradcheck(case.ours, x, check_forward_ad=True)
    assert gradgradcheck(case.ours, x)


@EVERY
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout(case: Case, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = draw(2, 2, 3, 10, seed=1)
    ours, theirs = laid_out(case.ours, layout), laid_out(case.plain, layout)
    for mode in MODES:
        assert_same_derivatives(ours, theirs, [x], mode)
    choose("triton", monkeypatch)
    assert_same_derivatives(ours, theirs, [x.float()], "joint", tolerance=1e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("T", [1, 63, 65, 129])
def test_as_good_as_torch(backend: str, dtype: torch.dtype, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads as models have them: a transposed view."""
    choose(backend, monkeypatch)
    for d, R, interleaved in ((64, 64, False), (80, 32, False), (66, 66, True)):
        case = Case(R, interleaved, per_sample=False)
        x = draw(1, T, 2 if T > 1 else 5, d, seed=1)
        assert_as_good_as_torch(
            lambda x, case=case: case.ours(x.transpose(1, 2)),
            lambda x, case=case: case.plain(x.transpose(1, 2)),
            [x],
            dtype,
        )


@BACKENDS
def test_equals_transformers(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's tables and its function; the result keeps the layout that its attention makes heads of."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    choose(backend, monkeypatch)
    angles = torch.arange(9.0)[:, None] * 10000.0 ** -(torch.arange(0, 8, 2) / 8)
    table = torch.cat((angles, angles), -1)[None].expand(2, 9, 8).to(DEVICE)
    q, k = (draw(2, 9, 3, 8, seed=i).float().transpose(1, 2) for i in (1, 2))
    want = llama.apply_rotary_pos_emb(q, k, table.cos(), table.sin())
    for x, theirs in zip((q, k), want, strict=True):
        ours = rotary_embedding(x, table.cos(), table.sin())
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        assert ours.stride() == x.stride()


@BACKENDS
def test_empty(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    choose(backend, monkeypatch)
    for shape in ((0, 2, 3, 4), (2, 2, 0, 4)):
        x = torch.zeros(shape, device=DEVICE)
        table = torch.zeros(shape[2], 4, device=DEVICE)
        found = derivatives(lambda x, table=table: rotary_embedding(x, table, table), [x], [x], "joint")
        assert found[0].shape == shape


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary_embedding(torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.zeros(3, 4)), "x is"),
        (lambda: rotary_embedding(torch.zeros(1, 2, 3, 4), torch.zeros(2, 4), torch.zeros(2, 4)), "cos is"),
        (lambda: rotary_embedding(torch.zeros(1, 2, 3, 4), torch.zeros(3, 6), torch.zeros(3, 6)), "at most 4"),
        (lambda: rotary_embedding(torch.zeros(1, 2, 3, 4), torch.zeros(3, 3), torch.zeros(3, 3)), "R even"),
        (lambda: rotary_embedding(torch.zeros(1, 2, 3, 4), torch.zeros(3, 4), torch.zeros(3, 2)), "must be one shape"),
        (
            lambda: rotary_embedding(torch.zeros(1, 2, 3, 4), torch.zeros(3, 4), torch.zeros(3, 4, requires_grad=True)),
            "sin requires a gradient",
        ),
    ],
)
def test_bad_arguments_are_named(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
