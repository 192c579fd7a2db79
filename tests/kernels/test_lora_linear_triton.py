"""The low-rank kernels against float64 and PyTorch's own error, in every combination of tangents, bit for bit again."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nacd_kernels import LoraLayer, bare_tangents, lora_linear, lora_linears, low_rank
from tests.kernels.modes import derivatives
from tests.kernels.numerics import assert_as_good_as_torch, draw

pytest.importorskip("triton")

from nacd_kernels import lora_linear_triton as kernels

D_IN, D_OUT = 40, 35
MIXED = (torch.bfloat16, torch.float32)
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16,) * 2,
    "mixed": (torch.bfloat16, torch.float32),
}


@pytest.fixture(autouse=True)
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels, with k split over several programs at test sizes too."""
    monkeypatch.setenv("NACD_KERNELS", "triton")
    monkeypatch.setattr(kernels, "SPAN", 32)


class Problem:
    """A layer whose x is of one type, as functions of x, A and B, which come in the adapters' type or in float64."""

    def __init__(self, rows: int, rank: int, of_x: torch.dtype, bias: bool = True):
        self.of_x = of_x
        self.w, self.bias = draw(D_OUT, D_IN, seed=4, scale=0.2), draw(D_OUT, seed=5) if bias else None
        self.inputs = [
            draw(rows, D_IN, seed=1),
            draw(rank, D_IN, seed=2, scale=0.2),
            draw(D_OUT, rank, seed=3, scale=0.2),
        ]

    def frozen(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        x = x if x.dtype == torch.float64 else x.to(self.of_x)
        return x, self.w.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)

    def ours(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x, w, bias = self.frozen(x)
        return lora_linear(x, w, bias, a, b, 1.7)

    def plain(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x, w, bias = self.frozen(x)
        low = F.linear(F.linear(x.to(a.dtype), a), b) * 1.7
        return F.linear(x, w, bias) + low.to(x.dtype)


@pytest.mark.parametrize(("rows", "rank"), [(1, 3), (63, 16), (65, 17), (129, 1)])
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_as_good_as_torch(rows: int, rank: int, types: str, joint: bool) -> None:
    of_x, of_factors = TYPES[types]
    problem = Problem(rows, rank, of_x)
    with bare_tangents() if joint else nullcontext():
        assert_as_good_as_torch(problem.ours, problem.plain, problem.inputs, of_factors)


def fused(of: Callable[..., Any], rows: int) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Two layers and one without an adapter, ranks that are no multiple of a tile, as a function of x and factors."""
    sizes = [(33, 5), (24, 0), (31, 17)]
    ws = [draw(d_out, D_IN, seed=10 + i, scale=0.2) for i, (d_out, _) in enumerate(sizes)]
    factors = [
        draw(*shape, seed=20 + i, scale=0.2)
        for i, (d_out, rank) in enumerate(sizes)
        for shape in ((rank, D_IN), (d_out, rank))
        if rank
    ]

    def fn(x: Tensor, *factors: Tensor) -> Tensor:
        queue = iter(factors)
        layers = [
            LoraLayer(w.to(x.dtype), None, next(queue) if rank else None, next(queue) if rank else None, 0.5 + i)
            for i, (w, (_, rank)) in enumerate(zip(ws, sizes, strict=True))
        ]
        return torch.cat(of(x, layers), -1)

    return fn, [draw(rows, D_IN, seed=1), *factors]


def plain_layers(x: Tensor, layers: list[Any]) -> list[Tensor]:
    return [
        F.linear(x, w) if a is None else F.linear(x, w) + scale * F.linear(F.linear(x, a), b)
        for w, _, a, b, scale in layers
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("joint", [False, True], ids=["apart", "joint"])
def test_fused_layers_are_as_good_as_torch(dtype: torch.dtype, joint: bool) -> None:
    (ours, inputs), (plain, _) = fused(lora_linears, 65), fused(plain_layers, 65)
    with bare_tangents() if joint else nullcontext():
        assert_as_good_as_torch(ours, plain, inputs, dtype)


def laid_out(x: Tensor, layout: str) -> Tensor:
    return {"transposed": x.T.contiguous().T, "expanded": x[:1].expand(x.shape), "plain": x}[layout]


@pytest.mark.parametrize("missing", ["", "p", "q", "pq"])
@pytest.mark.parametrize("primal", [True, False])
@pytest.mark.parametrize("shape", [(40, 70, 5), (7, 90, 33), (0, 30, 5), (33, 20, 70)])
def test_pairs_equal_the_reference(shape: tuple[int, int, int], primal: bool, missing: str) -> None:
    """Both products, in every combination of what is asked for and what is there."""
    assert_pairs_equal(shape, primal, missing, "plain")


@pytest.mark.parametrize("layout", ["transposed", "expanded"])
@pytest.mark.parametrize("shape", [(40, 70, 5), (7, 90, 33)])
def test_a_tangent_that_is_laid_out_otherwise(shape: tuple[int, int, int], layout: str) -> None:
    assert_pairs_equal(shape, True, "", layout)


def assert_pairs_equal(shape: tuple[int, int, int], primal: bool, missing: str, layout: str) -> None:
    m, k, n = shape
    p, p_t, q, q_t = (draw(*s, seed=i).float() for i, s in enumerate(((m, k), (m, k), (k, n), (k, n))))
    tangents = None if "p" in missing else p_t, None if "q" in missing else q_t
    args: Any = laid_out(p, layout) if m else p, tangents[0], q, tangents[1], primal, 0.3
    for ours, theirs in zip(kernels.pair(*args), low_rank.pair(*args), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    sums = [[draw(m, n, seed=9).float(), draw(m, n, seed=10).float()] for _ in range(2)]
    for (c, c_t), kit in zip(sums, (kernels.KIT, low_rank.REFERENCE), strict=True):
        kit.add_pair(c, c_t, *args)
    for ours, theirs in zip(*sums, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_every_run_gives_the_same_bits() -> None:
    ours, inputs = fused(lora_linears, 63)
    inputs = [t.float() for t in inputs]
    runs = [derivatives(ours, inputs, [t.flip(0) for t in inputs], "joint") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_k_is_split_into_parts_that_cover_it() -> None:
    for tiles, k, block in [(1, 1, 32), (1, 2048, 32), (17, 2048, 32), (1000, 11008, 32), (3, 520, 32), (0, 64, 32)]:
        parts, span = kernels.split(tiles, k, block)
        assert span % block == 0 and (parts - 1) * span < k <= parts * span
        assert tiles * parts <= 2 * kernels.PROGRAMS or parts == 1
    assert kernels.split(17, 2048, 32)[0] > 8


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [16, 128, 256])
def test_llama_shapes_on_a_gpu(rank: int) -> None:
    """The compiled kernels where k is split, tiles are whole and the rank takes several."""
    x, a, b = draw(1028, 4096, seed=1), draw(rank, 4096, seed=2, scale=0.02), draw(11008, rank, seed=3, scale=0.02)
    w = draw(11008, 4096, seed=4, scale=0.02)

    def ours(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return lora_linear(x, w.to(x.dtype), None, a, b, 2.0)

    def plain(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, w.to(x.dtype)) + 2.0 * F.linear(F.linear(x, a), b)

    with bare_tangents():
        assert_as_good_as_torch(ours, plain, [x, a, b], torch.bfloat16)
