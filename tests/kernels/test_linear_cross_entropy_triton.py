"""The kernels against float64 and against PyTorch's own error, and what a GPU cannot be asked on the CPU's terms."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nacd_kernels import bare_tangents, linear_cross_entropy
from tests.kernels.numerics import DEVICE, assert_as_good_as_torch, draw

pytest.importorskip("triton")

from nacd_kernels import linear_cross_entropy_triton as kernels

D = 24
SIZES = [(1, 1000), (63, 129), (65, 1), (129, 63)]
OPTIONS: dict[str, dict[str, Any]] = {
    "bias": {"bias": 1},
    "softcap": {"softcap": 2.0},
    "retain": {"retain": True},
    "all": {"bias": 1, "softcap": 3.0, "retain": True},
}


def small_blocks(vocabulary: int, dtype: torch.dtype) -> dict[str, int]:
    return {"BLOCK": 256, "SPAN": -(-vocabulary // 256) * 256, "num_warps": 8}


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, with several chunks and blocks a row."""
    monkeypatch.setenv("NACD_KERNELS", "triton")
    monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", 20_000)
    monkeypatch.setattr(kernels, "config", small_blocks)


def problem(rows: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(rows)
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    labels[torch.arange(rows) % 5 > 0] = -100  # a program does a row, so that a few tell as much as many
    return draw(rows, D, seed=1), draw(vocabulary, D, seed=2, scale=0.3), labels.to(DEVICE)


class Both:
    """Our op and PyTorch's composition as functions of h, in whatever type h comes."""

    def __init__(self, rows: int, vocabulary: int, options: dict[str, Any]):
        self.h, self.w, self.labels = problem(rows, vocabulary)
        self.options = dict(options)
        if "bias" in options:
            self.options["bias"] = draw(vocabulary, seed=3)

    def ours(self, h: Tensor) -> Tensor:
        low: dict[str, Any] = {k: v.to(h.dtype) if isinstance(v, Tensor) else v for k, v in self.options.items()}
        return linear_cross_entropy(h, self.w.to(h.dtype), self.labels, **low).reshape(1)

    def plain(self, h: Tensor) -> Tensor:
        bias, softcap = self.options.get("bias"), self.options.get("softcap")
        z = F.linear(h, self.w.to(h.dtype), None if bias is None else bias.to(h.dtype))
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return F.cross_entropy(z if z.dtype == torch.float64 else z.float(), self.labels).reshape(1)


def check(rows: int, vocabulary: int, options: dict, dtype: torch.dtype, joint: bool) -> None:
    both = Both(rows, vocabulary, options)
    with bare_tangents() if joint else nullcontext():
        largest = float((both.h @ both.w.T).abs().max())  # of the logits, and about that of their tangents
        assert_as_good_as_torch(both.ours, both.plain, [both.h], dtype, summands=largest)


@pytest.mark.parametrize(("rows", "vocabulary"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_as_good_as_torch(rows: int, vocabulary: int, dtype: torch.dtype, joint: bool) -> None:
    check(rows, vocabulary, {}, dtype, joint)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_every_option_is_as_good_as_torch(options: dict, dtype: torch.dtype, joint: bool) -> None:
    check(21, 300, options, dtype, joint)


def test_results_are_the_same_on_every_run() -> None:
    both = Both(9, 129, OPTIONS["all"])
    runs = []
    for _ in range(2):
        h = both.h.float().requires_grad_()
        loss = both.ours(h).sum()
        (g,) = torch.autograd.grad(loss.square(), h, create_graph=True)
        runs.append([loss.detach(), g.detach(), torch.autograd.grad(g.sin().sum(), h)[0]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("options", [{}, {"softcap": 5.0}], ids=["plain", "softcap"])
def test_chunks_and_blocks_of_any_size_give_the_same(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, labels = problem(16, 100)
    want = None
    for elements, block in ((100, 32), (250, 64), (10**6, 128)):
        monkeypatch.setattr(kernels, "CHUNK_ELEMENTS", elements)
        size = {"BLOCK": block, "SPAN": -(-100 // block) * block, "num_warps": 8}
        monkeypatch.setattr(kernels, "config", lambda vocabulary, dtype, size=size: size)
        x = h.float().requires_grad_()
        (g,) = torch.autograd.grad(linear_cross_entropy(x, w.float(), labels, **options), x, create_graph=True)
        found = torch.cat([g.detach(), torch.autograd.grad(g.square().sum(), x)[0]])
        want = found if want is None else want
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("label", [100, -1, 2**40])
def test_a_label_outside_the_vocabulary_gives_nan_and_reads_nothing(label: int) -> None:
    h, w, labels = problem(5, 100)
    x = h.float().requires_grad_()
    loss = linear_cross_entropy(x, w.float(), labels.index_fill(0, torch.tensor([2], device=DEVICE), label))
    (g,) = torch.autograd.grad(loss, x)
    assert loss.isnan() and g[2].isnan().all() and g[0].isfinite().all()


def test_no_supervised_row_and_no_row() -> None:
    for rows in (0, 3):
        h = draw(rows, D, seed=1).float().requires_grad_()
        labels = torch.full((rows,), -100, device=DEVICE)
        loss = linear_cross_entropy(h, draw(50, D, seed=2).float(), labels, retain=True)
        (g,) = torch.autograd.grad(loss, h, create_graph=True)
        assert loss == 0 and not g.any() and not torch.autograd.grad(g.sum(), h)[0].any()


def test_large_logits_overflow_nothing() -> None:
    h, w, labels = problem(5, 100)
    for softcap in (None, 30.0):
        x = (1e3 * h).float().requires_grad_()
        loss = linear_cross_entropy(x, w.float(), labels, softcap=softcap)
        (g,) = torch.autograd.grad(loss, x, create_graph=True)
        assert loss.isfinite() and g.isfinite().all() and torch.autograd.grad(g.sum(), x)[0].isfinite().all()


def test_a_row_of_logits_that_are_minus_infinity_but_one_is_certain() -> None:
    """As for a bias that rules tokens out."""
    h, w, _ = problem(1, 300)
    bias = torch.full((300,), -torch.inf, device=DEVICE)
    bias[290] = 0.0
    loss = linear_cross_entropy(h.float(), w.float(), torch.tensor([290], device=DEVICE), bias=bias)
    assert loss == 0


@pytest.mark.parametrize("vocabulary", [1, 50257, 262144])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_configurations_cover_the_row(vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = kernels.config(vocabulary, dtype)
    assert found["SPAN"] % found["BLOCK"] == 0 and 0 <= found["SPAN"] - vocabulary < found["BLOCK"]
