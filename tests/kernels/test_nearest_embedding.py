"""The index is that of the exact distances, always, by the reference's chunks and by the kernel's tiles."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nacd_kernels import nearest_candidates, nearest_embedding
from nacd_kernels import nearest_embedding_triton as kernels
from tests.kernels import interpreter  # noqa: F401  repairs what the interpreter does otherwise than a GPU

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
BACKENDS = ("reference", "triton")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NACD_KERNELS", request.param)
    return request.param


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pairs each call of exact_squares measured."""
    counts: list[int] = []
    exact_squares = nearest_candidates.exact_squares

    def counting(p: Tensor, table: Tensor, query: Tensor, row: Tensor) -> Tensor:
        counts.append(row.numel())
        return exact_squares(p, table, query, row)

    monkeypatch.setattr(nearest_candidates, "exact_squares", counting)
    return counts


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def brute_force(p: Tensor, table: Tensor, banned: Tensor | None = None, k: int = 1) -> Tensor:
    """By distance in float64, then by index."""
    squares = (p.double()[:, None] - table.double()[None]).square().sum(-1)
    if banned is not None:
        squares = squares.masked_fill(banned, torch.inf)
    index = squares.argsort(dim=-1, stable=True)[:, :k]
    return index[:, 0] if k == 1 else index


def assert_exact(p: Tensor, table: Tensor, banned: Tensor | None = None, k: int = 1) -> None:
    index, distance = nearest_embedding(p, table, banned=banned, k=k)
    want = brute_force(p, table, banned, k)
    assert torch.equal(index, want)
    difference = (p.double()[:, None] if k > 1 else p.double()) - table.double()[want]
    assert distance.dtype == p.dtype and torch.equal(distance, difference.square().sum(-1).sqrt().to(p.dtype))


@given(
    seed=st.integers(0, 2**31),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e5]),
    spread=st.sampled_from([0.0, 1e-6, 1e-3, 1.0]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    k=st.integers(1, 5),
    backend=st.sampled_from(BACKENDS),
)
@settings(max_examples=120, deadline=None)
def test_index_equals_float64_brute_force(
    seed: int, offset: float, spread: float, dtypes: tuple[torch.dtype, torch.dtype], k: int, backend: str
) -> None:
    """Tables of near-ties and duplicates far from the origin, where float32 scores cancel."""
    offset = min(offset, 3e4) if torch.float16 in dtypes else offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NACD_KERNELS", backend if dtypes[0] != torch.float64 else "auto")
        table = (offset + spread * rand(70, 6, seed=seed)).to(dtypes[1])
        table[40] = table[7]
        p = (offset + spread * rand(9, 6, seed=seed + 1)).to(dtypes[0])
        p[3] = table[40]
        banned = rand(70, seed=seed + 2) < -0.5
        for mask in (None, banned):
            assert_exact(p, table, mask, k)


@pytest.mark.parametrize("spread", [1.0, 1e-4], ids=["spread", "close to one another"])
def test_a_million_queries(spread: float) -> None:
    table = 1 + spread * rand(97, 8)
    p = 1 + spread * rand(1_000_000, 8, seed=1)
    index, _ = nearest_embedding(p, table)
    wrong = sum(int((i != brute_force(q, table)).sum()) for q, i in zip(p.split(20_000), index.split(20_000)))
    assert wrong == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "V", "D"), [(1, 1, 1), (63, 65, 129), (65, 129, 63), (129, 300, 65), (3, 1000, 257)])
def test_ragged_sizes(P: int, V: int, D: int, dtype: torch.dtype, backend: str) -> None:
    assert_exact(rand(P, D).to(dtype), rand(V, D, seed=1).to(dtype), k=min(V, 3))


def test_neighbours_one_ulp_apart(backend: str) -> None:
    """Rows that differ from one another in the last bit of one feature, queries between them."""
    row = 1 + rand(64).abs()
    table = row.repeat(64, 1)
    table[torch.arange(64), torch.arange(64)] = torch.nextafter(row, torch.tensor(torch.inf))
    assert_exact(torch.cat([table, row[None]]), table.flip(0), k=2)


def test_rows_far_from_the_origin(backend: str, measured: list[int]) -> None:
    """float32 scores leave every row in doubt; a product in float64 leaves few, and few are measured."""
    table, p = 1e4 + rand(300, 32), 1e4 + rand(70, 32, seed=1)
    assert_exact(p, table)
    assert 70 <= sum(measured) < 70 * 8


def test_few_rows_are_measured_where_scores_tell(backend: str, measured: list[int]) -> None:
    assert_exact(rand(200, 64), rand(1000, 64, seed=1))
    assert 200 <= sum(measured) < 200 * 16


def test_duplicates_take_the_lowest_index_and_a_row_itself_has_distance_zero(backend: str) -> None:
    table = rand(5, 4).repeat(200, 1)
    index, distance = nearest_embedding(table, table)
    assert torch.equal(index, torch.arange(5).repeat(200)) and not distance.any()


def test_zero_vectors_and_values_too_small_or_large_to_square(backend: str) -> None:
    for scale in (0.0, 1e-30, 1e25):
        assert_exact(scale * rand(9, 7), scale * rand(40, 7, seed=1))
    assert_exact(torch.zeros(2, 3), torch.zeros(70, 3))


def test_a_query_too_large_for_the_type_of_the_table(backend: str) -> None:
    assert_exact(1e6 * rand(5, 8), rand(50, 8, seed=1).half())


def test_queries_that_the_type_of_the_table_rounds(backend: str) -> None:
    """Which row is nearest turns on what bfloat16 takes from the query."""
    assert_exact(1 + 3e-3 * rand(300, 16), (1 + 3e-2 * rand(900, 16, seed=1)).bfloat16())


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_in_less_than_float32(precision: str) -> None:
    """With an error bound for the precision that PyTorch was told to multiply in."""
    torch.set_float32_matmul_precision(precision)
    try:
        assert_exact(rand(300, 32), rand(500, 32, seed=1))
    finally:
        torch.set_float32_matmul_precision("highest")


def test_batches_and_strides(backend: str) -> None:
    p, table = rand(2, 3, 160).transpose(0, 1), rand(40, 320, seed=1)[:, ::2]
    for k in (1, 2):
        index, distance = nearest_embedding(p, table, k=k)
        flat = nearest_embedding(p.reshape(6, 160), table.contiguous(), k=k)
        assert index.shape == distance.shape == ((3, 2) if k == 1 else (3, 2, 2))
        assert torch.equal(index.flatten(), flat[0].flatten()) and torch.equal(distance.flatten(), flat[1].flatten())


def test_no_queries(backend: str) -> None:
    index, distance = nearest_embedding(torch.zeros(0, 3), torch.zeros(4, 3))
    assert index.shape == distance.shape == (0,) and index.dtype == torch.int64


# --- memory, and the lengths that are kept ---------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most bytes of a tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [t.numel() * t.element_size() for t in tree_leaves(made) if isinstance(t, Tensor)]
        self.bytes = max([self.bytes, *sizes])
        return made


@pytest.mark.parametrize("kind", ["random", "far", "duplicates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_large(kind: str, dtype: torch.dtype) -> None:
    p, table = rand(3000, 64).to(dtype), rand(5000, 64, seed=1).to(dtype)
    if kind == "far":
        p, table = p + 1000, table + 1000
    if kind == "duplicates":
        table[:] = table[0]
    with Largest() as largest:
        nearest_embedding(p[: 100 if kind == "duplicates" else None], table)
    assert largest.bytes <= 8 * 2**20


def test_lengths_are_kept_until_the_table_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[int] = []
    squared_lengths = nearest_candidates.squared_lengths

    def counting(x: Tensor) -> Tensor:
        tables.append(len(x))
        return squared_lengths(x)

    module = nearest_embedding.__globals__
    monkeypatch.setitem(module, "squared_lengths", counting)
    p, table = rand(3, 4), rand(50, 4, seed=1)

    def read() -> int:
        tables.clear()
        assert_exact(p, table)
        return tables.count(50)

    assert read() == 1 and read() == 0
    table[7] = p[1]
    assert read() == 1 and read() == 0
    table.mul_(-1)
    assert read() == 1
    table.data = -table.data
    assert read() == 1
    with torch.inference_mode():
        table = table.clone()
        assert read() == 1 and read() == 1


# --- the distance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3])
def test_distance_is_differentiable_twice_and_flat_at_a_row(k: int) -> None:
    table = rand(11, 3).double()
    p = rand(4, 3, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: nearest_embedding(x, table, k=k)[1], p, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: nearest_embedding(x, table, k=k)[1], p)
    at_row = table[:2].clone().requires_grad_()
    (grad,) = torch.autograd.grad(nearest_embedding(at_row, table)[1].sum(), at_row)
    assert not grad.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_distance_is_the_same_with_and_without_a_graph(dtype: torch.dtype) -> None:
    p, table = rand(9, 33).to(dtype), rand(40, 33, seed=1).to(dtype)
    distance = nearest_embedding(p.clone().requires_grad_(), table, k=2)[1]
    assert distance.requires_grad and torch.equal(distance, nearest_embedding(p, table, k=2)[1])


# --- bad arguments ----------------------------------------------------------------------------------------------------


def bad() -> Iterator[tuple[dict[str, Any], str]]:
    p, table = torch.zeros(2, 3), torch.zeros(4, 3)
    yield dict(p=p, table=torch.zeros(4, 2)), r"must be \[\.\.\., D\] and \[V, D\]"
    yield dict(p=torch.tensor([[0.0, 0, 0], [0, torch.nan, 0]]), table=table), "p has NaN.*row 1"
    yield dict(p=torch.tensor([[torch.inf, 0, 0]]), table=table), "p has NaN, infinite.*row 0"
    yield dict(p=p, table=torch.tensor([[0.0], [torch.inf]]).expand(2, 3)), "table row 1 holds NaN, infinite"
    yield dict(p=p, table=table, banned=torch.ones(4, dtype=torch.bool)), "every row of table is banned"
    yield dict(p=p, table=table[:0]), "every row of table is banned"
    yield dict(p=p, table=table, banned=torch.ones(3, dtype=torch.bool)), r"must be bool \[4\]"
    yield dict(p=p, table=table, banned=torch.ones(4)), r"banned is torch.float32"
    yield dict(p=p, table=table, k=5), "k=5: must be from 1 to the 4 rows"
    yield dict(p=p, table=table, k=0), "k=0: must be from 1"
    yield dict(p=p.long(), table=table), "p is torch.int64: must be a float"
    yield dict(p=p, table=table.long()), "table is torch.int64: must be a float"
    yield dict(p=p, table=table.to("meta")), "table is on meta, p on cpu"


@pytest.mark.parametrize(("arguments", "message"), list(bad()))
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str, backend: str) -> None:
    with pytest.raises(ValueError, match=message):
        nearest_embedding(**arguments)


# --- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("P", "V", "D"), [(1, 63, 1), (63, 65, 129), (129, 300, 65)])
def test_minima_of_tiles(P: int, V: int, D: int, dtype: torch.dtype) -> None:
    p, table = rand(P, D).to(dtype), rand(V, D, seed=1).to(dtype)
    half = (table.double().square().sum(-1) / 2).float()
    half[5] = torch.inf
    low, at, second, size = kernels.tile_minima(p, table, half)
    scores = half.double() - p.double() @ table.double().T
    for tile in range(low.shape[1]):
        part = scores[:, tile * size : (tile + 1) * size]
        two = part.sort(-1).values[:, :2].clamp(max=kernels.HUGE)
        torch.testing.assert_close(low[:, tile].double(), two[:, 0], rtol=1e-5, atol=1e-4)
        if two.shape[1] == 2:
            torch.testing.assert_close(second[:, tile].double(), two[:, 1], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(scores.gather(1, at[:, tile, None].long())[:, 0], two[:, 0], rtol=1e-5, atol=1e-4)
