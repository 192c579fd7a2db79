"""The index is that of the exact distances, always."""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nacd_kernels import nearest_embedding


def brute_force(p: Tensor, table: Tensor, banned: Tensor | None = None) -> Tensor:
    squares = (p.double()[:, None] - table.double()[None]).square().sum(-1)
    return (squares if banned is None else squares.masked_fill(banned, torch.inf)).argmin(-1)


@given(
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e5]),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
@settings(max_examples=80, deadline=None)
def test_index_equals_float64_brute_force(seed: int, offset: float, spread: float, dtype: torch.dtype) -> None:
    """Tables of near-ties and duplicates far from the origin, where float32 scores cancel."""
    g = torch.Generator().manual_seed(seed)
    table = (offset + spread * torch.randn(70, 6, generator=g)).to(dtype)
    table[40] = table[7]
    p = (offset + spread * torch.randn(9, 6, generator=g)).to(dtype)
    p[3] = table[40]
    banned = torch.rand(70, generator=g) < 0.3
    for mask in (None, banned):
        assert torch.equal(nearest_embedding(p, table, banned=mask)[0], brute_force(p, table, mask))


def test_duplicates_take_the_lowest_index_and_a_row_itself_has_distance_zero() -> None:
    table = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).repeat(20, 1)
    index, distance = nearest_embedding(table, table)
    assert torch.equal(index, torch.arange(5).repeat(20)) and not distance.any()


def test_queries_in_chunks_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    p, table = torch.randn(17, 8, generator=g), torch.randn(33, 8, generator=g)
    monkeypatch.setattr(sys.modules["nacd_kernels.nearest_embedding"], "CHUNK_ELEMENTS", 100)
    assert torch.equal(nearest_embedding(p, table)[0], brute_force(p, table))


def test_distance_is_differentiable_twice_and_flat_at_a_row() -> None:
    g = torch.Generator().manual_seed(2)
    table = torch.randn(11, 3, generator=g, dtype=torch.float64)
    p = torch.randn(4, 3, generator=g, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: nearest_embedding(x, table)[1], p)
    assert torch.autograd.gradgradcheck(lambda x: nearest_embedding(x, table)[1], p)
    at_row = table[:2].clone().requires_grad_()
    (grad,) = torch.autograd.grad(nearest_embedding(at_row, table)[1].sum(), at_row)
    assert not grad.any()


@pytest.mark.parametrize(
    ("p", "table", "banned", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 2), None, r"must be \[P, D\] and \[V, D\]"),
        (torch.tensor([[torch.nan, 0.0]]), torch.zeros(4, 2), None, "NaN"),
        (torch.zeros(1, 2), torch.zeros(4, 2), torch.ones(4, dtype=torch.bool), "every row"),
        (torch.zeros(1, 2), torch.zeros(4, 2), torch.ones(3, dtype=torch.bool), r"bool \[4\]"),
    ],
)
def test_bad_arguments_are_named(p: Tensor, table: Tensor, banned: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_embedding(p, table, banned=banned)
