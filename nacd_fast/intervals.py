"""Scores by item, and 95 % bootstrap intervals over items: of one row, and of the paired difference of two.

An interval covers the choice of test items, given the trained models; the spread over seeds stands beside it. Intervals
are percentiles, seeded: the same items give the same interval. n: items.
"""

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .artifacts import write_atomic
from .errors import InputError

METRICS = ("nll", "accuracy")
DRAW_ELEMENTS = 2**22  # item indices drawn at once: 32 MiB


@dataclass(frozen=True)
class Items:
    """Scores of n items."""

    ids: tuple[str, ...]
    nll_sum: np.ndarray
    """[n] float64, nats over all supervised tokens of the item."""
    tokens: np.ndarray
    """[n] int64, supervised tokens."""
    correct: np.ndarray
    """[n] float64: 1, 0, or NaN where the item has no choices."""

    def ratio(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Numerator and denominator [n]: the score of a set is the quotient of their sums."""
        if metric == "nll":
            return self.nll_sum, self.tokens.astype(np.float64)
        return np.nan_to_num(self.correct, nan=0.0), (~np.isnan(self.correct)).astype(np.float64)


def write_items(path: Path, items: Items) -> None:
    """A table of id, nll_sum, tokens, correct (null where there are no choices)."""
    correct = [None if np.isnan(c) else bool(c) for c in items.correct]
    table = pa.table(
        {
            "id": pa.array(items.ids, pa.string()),
            "nll_sum": pa.array(items.nll_sum, pa.float64()),
            "tokens": pa.array(items.tokens, pa.int64()),
            "correct": pa.array(correct, pa.bool_()),
        }
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    write_atomic(path, buffer.getvalue())


def read_items(path: Path) -> Items:
    """What write_items wrote. Raises InputError if the file is something else."""
    try:
        table = pq.read_table(path, columns=["id", "nll_sum", "tokens", "correct"])
        correct = [np.nan if c is None else float(c) for c in table["correct"].to_pylist()]
        return Items(
            tuple(table["id"].to_pylist()),
            np.array(table["nll_sum"].to_pylist(), np.float64),
            np.array(table["tokens"].to_pylist(), np.int64),
            np.array(correct, np.float64),
        )
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a table of item scores ({str(error).splitlines()[0]})") from None


def draws(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """`resamples` draws of n items with replacement, in blocks [.., n] of indices; the same for the same n and seed."""
    generator = np.random.default_rng(seed)
    block = max(1, DRAW_ELEMENTS // n)
    for start in range(0, resamples, block):
        yield generator.integers(0, n, size=(min(block, resamples - start), n))


def percentiles(values: Sequence[np.ndarray]) -> tuple[float, float]:
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    return float(low), float(high)


def summarise(items: Items, resamples: int, seed: int = 0) -> dict[str, Any]:
    """{"nll", "nll_interval", "accuracy", "accuracy_interval"} of a set; None where no item has the metric."""
    scores: dict[str, Any] = {}
    for metric in METRICS:
        numerator, denominator = items.ratio(metric)
        keep = denominator > 0
        a, m = numerator[keep], denominator[keep]
        scores[metric] = float(a.sum() / m.sum()) if len(m) else None
        scores[f"{metric}_interval"] = (
            list(percentiles([a[i].sum(1) / m[i].sum(1) for i in draws(len(m), resamples, seed)])) if len(m) else None
        )
    return scores


def paired_difference(
    items_a: Sequence[Items],
    items_b: Sequence[Items],
    *,
    metric: str = "nll",
    resamples: int,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Score of row a less that of row b with its 95 % interval, (mean, low, high), pooled over seeds.

    items_a[s], items_b[s]: the items of both rows for one seed. Every seed uses the same draw of items, so the interval
    is that of the mean over these seeds. Raises InputError if the rows were not scored on the same items.
    """
    if len(items_a) != len(items_b) or not items_a:
        raise InputError(f"paired difference of {len(items_a)} and {len(items_b)} seeds: must be as many, at least one")
    pairs = []
    for a, b in zip(items_a, items_b):
        if not a.ids == b.ids == items_a[0].ids:
            raise InputError(f"paired difference: rows scored on different items ({len(a.ids)} and {len(b.ids)})")
        pairs.append((*a.ratio(metric), *b.ratio(metric)))
    keep = np.all([(m > 0) & (n > 0) for _, m, _, n in pairs], axis=0)
    if not keep.any():
        raise InputError(f"paired difference in {metric}: no item has it in both rows")
    pairs = [(x[keep], m[keep], y[keep], n[keep]) for x, m, y, n in pairs]
    mean = np.mean([x.sum() / m.sum() - y.sum() / n.sum() for x, m, y, n in pairs])
    drawn = [
        np.mean([x[i].sum(1) / m[i].sum(1) - y[i].sum(1) / n[i].sum(1) for x, m, y, n in pairs], axis=0)
        for i in draws(int(keep.sum()), resamples, seed)
    ]
    return float(mean), *percentiles(drawn)
