"""The nearest rows of an embedding table to each query, exactly, and their distances.

    index_i = argmin_v ||p_i - t_v||        distance_i = ||p_i - t_index||

Scores |t_v|^2 / 2 - p t_v from a matrix product rank the rows as the distances do, up to a proven error. Whatever that
leaves in doubt, rarely more than the k rows wanted, is measured again in float64 (`nearest_candidates.py`): the index
is that of the exact distances, and ties take the lowest. A table's squared lengths are kept until it changes.

The distance is differentiable twice, and 0 in value and gradient where p is a row; the index is not differentiable.
Source: section 3.3 and equation 3 of the NACD paper, arXiv 2504.09818.

P queries, V rows, D features, k neighbours. Memory O(P) beside the results: never [P, V], nor a copy of the table.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .checks import check
from .dispatch import KERNEL_DTYPES, use_triton
from .nearest_candidates import NUMBERS, Nearest, scan, squared_lengths
from .twice import wants_gradient

QUERIES = 4096  # at a time


class Lengths(NamedTuple):
    """Squared lengths of a table's rows, float64 [V], and the state of the table that they are of."""

    squares: Tensor
    state: tuple[int, int, torch.Size, torch.dtype]


_lengths = WeakTensorKeyDictionary()


def lengths_of(table: Tensor) -> Tensor:
    """Squared lengths of the rows, float64 [V]; once for a table, until it is written to.

    A write through `table.data` is one that PyTorch does not tell of.
    """
    if table.is_inference():  # no version counter
        return checked_lengths(table)
    state = (table._version, table.data_ptr(), table.shape, table.dtype)
    known = _lengths.get(table)
    if known is None or known.state != state:
        known = Lengths(checked_lengths(table), state)
        _lengths[table] = known
    return known.squares


def checked_lengths(table: Tensor) -> Tensor:
    squares = squared_lengths(table.detach())
    bad = (~squares.isfinite()).nonzero()
    check(bad.numel() == 0, f"table row {int(bad[0]) if len(bad) else 0} holds NaN, infinite or far too large values")
    return squares


def nearest_embedding(p: Tensor, table: Tensor, *, banned: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor]:
    """The k rows of `table` nearest to each p by L2 distance, and those distances.

    p [..., D], table [V, D]: float, of any two dtypes, one device; banned [V] bool marks rows never taken. Returns
    index int64 (ties take the lowest) and distance in p's dtype, both [...] for k = 1, else [..., k], nearest first.
    The distance is differentiable in p, not in the table.

    Raises ValueError on shapes, dtypes or devices that do not fit, on NaN or infinite values, and where fewer than k
    rows may be taken.
    """
    check(
        p.ndim >= 1 and table.ndim == 2 and p.shape[-1] == table.shape[1],
        f"p is {tuple(p.shape)}, table {tuple(table.shape)}: must be [..., D] and [V, D]",
    )
    for name, x in (("p", p), ("table", table)):
        check(x.is_floating_point(), f"{name} is {x.dtype}: must be a float dtype")
    check(table.device == p.device, f"table is on {table.device}, p on {p.device}")
    left = table.shape[0]
    if banned is not None:
        check(
            banned.dtype == torch.bool and tuple(banned.shape) == (table.shape[0],) and banned.device == p.device,
            f"banned is {banned.dtype} {tuple(banned.shape)} on {banned.device}: must be bool [{table.shape[0]}] on "
            f"{p.device}",
        )
        left -= int(banned.count_nonzero())
    check(left > 0, "every row of table is banned")
    check(1 <= k <= left, f"k={k}: must be from 1 to the {left} rows that may be taken")
    with torch.no_grad():
        index, squares = search(p.detach().reshape(-1, p.shape[-1]), table.detach(), lengths_of(table), banned, k)
    shape = (*p.shape[:-1], k) if k > 1 else p.shape[:-1]
    index = index.view(shape)
    if not wants_gradient(p):
        return index, squares.sqrt_().to(p.dtype).view(shape)
    return index, distance_to(p[..., None, :] if k > 1 else p, table.detach()[index])


def search(p: Tensor, table: Tensor, squares: Tensor, banned: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Index and squared distance [P, k] of queries p [P, D]; squares [V] are the rows' squared lengths."""
    half = squares / 2
    if banned is not None:
        squares, half = squares.masked_fill(banned, 0), half.masked_fill(banned, torch.inf)
    largest = float(squares.max())
    size = QUERIES if p.dtype.itemsize >= 4 else min(QUERIES, max(1, 4 * NUMBERS // max(1, p.shape[1])))
    index = torch.empty(p.shape[0], k, dtype=torch.int64, device=p.device)
    found_squares = torch.empty(p.shape[0], k, dtype=torch.float64, device=p.device)
    for start in range(0, p.shape[0], size):
        some = slice(start, start + size)
        p_squares = squared_lengths(p[some])
        bad = (~p_squares.isfinite()).nonzero()
        check(
            bad.numel() == 0,
            f"p has NaN, infinite or far too large values in row {start + int(bad[0]) if len(bad) else 0}",
        )
        found = Nearest(p[some], table, k)
        scan_of(p, table)(p[some], table, half, p_squares, largest, found)
        index[some], found_squares[some] = found.found()
    return index, found_squares


def scan_of(p: Tensor, table: Tensor) -> Callable[..., None]:
    if use_triton(p) and table.dtype in KERNEL_DTYPES:
        from .nearest_embedding_triton import scan as scan_triton  # Triton is needed only from here

        return scan_triton
    return scan


def distance_to(p: Tensor, rows: Tensor) -> Tensor:
    """||p - rows|| over the last axis in p's dtype, computed in float64; gradient 0 where it is 0."""
    squares = (p.double() - rows.double()).square().sum(-1)
    there = squares > 0
    return torch.where(there, torch.where(there, squares, 1.0).sqrt(), 0.0).to(p.dtype)
