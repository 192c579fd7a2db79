"""Bootstrap intervals cover what they should, repeat, and refuse rows that cannot be paired."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nacd_fast.errors import InputError
from nacd_fast.intervals import Items, paired_difference, read_items, summarise, write_items


def synthetic(generator: np.random.Generator, n: int, shift: float = 0.0, noise: float = 0.5) -> Items:
    """Items whose true NLL is 2 + shift a token and whose true accuracy is 0.6."""
    tokens = generator.integers(1, 20, n)
    nll = (2 + shift) * tokens + noise * tokens * generator.standard_normal(n)
    return Items(tuple(map(str, range(n))), nll, tokens, (generator.random(n) < 0.6).astype(float))


def test_intervals_cover() -> None:
    generator = np.random.default_rng(1)
    scores = [summarise(synthetic(generator, 120), resamples=400) for _ in range(300)]
    for metric, truth in (("nll", 2.0), ("accuracy", 0.6)):
        covered = np.mean([s[f"{metric}_interval"][0] <= truth <= s[f"{metric}_interval"][1] for s in scores])
        assert 0.90 <= covered <= 0.98, f"{metric}: {covered}"


def test_intervals_are_deterministic_and_ordered(monkeypatch: pytest.MonkeyPatch) -> None:
    items = synthetic(np.random.default_rng(2), 50)
    first = summarise(items, resamples=300)
    assert first == summarise(items, resamples=300) != summarise(items, resamples=300, seed=1)
    monkeypatch.setattr("nacd_fast.intervals.DRAW_ELEMENTS", 700)  # blocks of 14 draws
    assert summarise(items, resamples=300) == first


def test_paired_difference_is_narrower_than_the_rows() -> None:
    generator = np.random.default_rng(3)
    b = [synthetic(generator, 300, noise=1.0) for _ in range(3)]
    b = [replace(x, tokens=b[0].tokens, nll_sum=x.nll_sum * b[0].tokens / x.tokens) for x in b]
    a = [replace(x, nll_sum=x.nll_sum - 0.05 * x.tokens + 0.01 * generator.standard_normal(300)) for x in b]
    mean, low, high = paired_difference(a, b, resamples=2000)
    assert low < -0.05 < high < 0 and high - low < 0.01
    nll = [[x.nll_sum.sum() / x.tokens.sum() for x in row] for row in (a, b)]
    assert mean == pytest.approx(np.mean(nll[0]) - np.mean(nll[1]))
    assert paired_difference(a, b, resamples=2000) == (mean, low, high)
    assert paired_difference(b, a, resamples=2000) == pytest.approx((-mean, -high, -low))
    better = [replace(x, correct=np.ones(300)) for x in b]
    difference = paired_difference(better, b, metric="accuracy", resamples=2000)
    assert difference[0] == pytest.approx(1 - np.mean([x.correct.mean() for x in b])) and difference[1] > 0


def test_paired_difference_covers() -> None:
    generator = np.random.default_rng(4)
    hits = 0
    for _ in range(200):
        a = synthetic(generator, 100, shift=-0.1)
        b = replace(a, nll_sum=a.nll_sum + 0.1 * a.tokens + 0.2 * a.tokens * generator.standard_normal(100))
        _, low, high = paired_difference([a], [b], resamples=300)
        hits += low <= -0.1 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_paired_difference_refuses() -> None:
    items = synthetic(np.random.default_rng(5), 10)
    with pytest.raises(InputError, match="different items"):
        paired_difference([items], [replace(items, ids=tuple("abcdefghij"))], resamples=100)
    with pytest.raises(InputError, match="2 and 1 seeds"):
        paired_difference([items, items], [items], resamples=100)
    with pytest.raises(InputError, match="accuracy"):
        paired_difference([replace(items, correct=np.full(10, np.nan))], [items], metric="accuracy", resamples=2000)


def test_items_round_trip(tmp_path: Path) -> None:
    items = replace(synthetic(np.random.default_rng(6), 4), correct=np.array([1.0, 0.0, np.nan, 1.0]))
    write_items(tmp_path / "items.parquet", items)
    back = read_items(tmp_path / "items.parquet")
    assert back.ids == items.ids
    np.testing.assert_array_equal(back.nll_sum, items.nll_sum)
    np.testing.assert_array_equal(back.correct, items.correct)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(InputError, match=r"bad\.parquet: not a table of item scores"):
        read_items(tmp_path / "bad.parquet")
