"""Claims and their words, the gap, and which row is best."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacd_fast import comparison
from nacd_fast.artifacts import write_json
from nacd_fast.intervals import Items, summarise, write_items


def cell(row: str, seed: int | None, nll: float, fraction: float = 0.05, accuracy: float = 0.5) -> dict[str, Any]:
    return {
        "row": row,
        "method": row,
        "model": "m",
        "fraction": fraction,
        "seed": seed,
        "nll": nll,
        "accuracy": accuracy,
    }


def read(tmp_path: Path, *cells: dict[str, Any]) -> comparison.Cells:
    write_json(tmp_path / "scores.json", list(cells))
    return comparison.read_cells(tmp_path / "scores.json")


def test_rows_and_seeds_are_in_order(tmp_path: Path) -> None:
    cells = read(
        tmp_path,
        cell("less", 0, 1),
        cell("transfer_random", 1, 1),
        cell("random", 1, 2),
        cell("random", 0, 3),
        cell("baseline", None, 4, 0.0),
    )
    assert list(cells) == ["baseline", "random", "transfer_random", "less"]
    assert list(cells["random"]) == [0, 1] and list(cells["baseline"]) == [0]
    assert comparison.label(cells, "less") == "less"


def test_gap_closed(tmp_path: Path) -> None:
    cells = read(
        tmp_path,
        cell("full", 0, 2.0, 1.0),
        cell("random", 0, 4.0),
        cell("nacd_embeddings", 0, 3.5),
        cell("nacd_decoded", 0, 4.1),
    )
    assert comparison.gap_closed(cells, "nacd_embeddings") == pytest.approx(25)
    assert comparison.gap_closed(cells, "nacd_decoded") == pytest.approx(-5)
    worse = read(tmp_path, cell("full", 0, 4.5, 1.0), cell("random", 0, 4.0), cell("nacd_embeddings", 0, 3.5))
    assert comparison.gap_closed(worse, "nacd_embeddings") is None


def test_best_is_among_rows_on_part_of_the_data(tmp_path: Path) -> None:
    cells = read(
        tmp_path, cell("full", 0, 2.0, 1.0, 0.9), cell("random", 0, 4.0, accuracy=0.6), cell("nacd_decoded", 0, 3.5)
    )
    rows = {row["row"]: row for row in comparison.table(cells)[0]["rows"]}
    assert [name for name, row in rows.items() if row["nll_best"]] == ["nacd_decoded"]
    assert [name for name, row in rows.items() if row["accuracy_best"]] == ["random"]


@pytest.mark.parametrize(
    ("shift", "noise", "outcome", "words"),
    [
        (-0.2, 0.1, "holds", "The NACD embeddings beat the raw"),
        (-0.005, 1.0, "unsure", "in the mean, but not beyond doubt"),
        (0.2, 0.1, "failed", "do not beat"),
        (0.0, 0.0, "failed", "do not beat"),
    ],
)
def test_outcomes(tmp_path: Path, shift: float, noise: float, outcome: str, words: str) -> None:
    generator = np.random.default_rng(0)
    tokens = np.full(100, 4)
    rows = []
    for seed in (0, 1):
        base = generator.normal(3, 0.5, 100)
        bumps = noise * generator.standard_normal(100)
        bumps -= bumps.mean()
        for row, per_token in (("random", base), ("nacd_embeddings", base + shift + bumps)):
            correct = (generator.random(100) < 0.5).astype(float)
            items = Items(tuple(map(str, range(100))), per_token * tokens, tokens, correct)
            write_items(tmp_path / "scores" / row / f"seed{seed}" / "items.parquet", items)
            rows.append({**cell(row, seed, 0), **summarise(items, 200)})
    cells = read(tmp_path, *rows)
    (claim,) = comparison.claims(cells, tmp_path / "scores", 200)
    assert claim.outcome == outcome and claim.seeds == 2 and claim.wins == (2 if shift < 0 else 0)
    assert claim.difference == pytest.approx(shift, abs=1e-9)
    assert claim.accuracy is not None and claim.accuracy_interval is not None
    verdict = comparison.verdict(cells, [claim], "random")
    assert words in verdict and ("this claim failed" in verdict) == (outcome == "failed")
    heads = {"holds": "embeddings beat the", "unsure": "within the noise", "failed": "do not beat"}
    assert heads[outcome] in comparison.headline([claim])


def test_row_with_one_seed_stands_against_all(tmp_path: Path) -> None:
    cells = read(tmp_path, cell("full", 0, 2.0, 1.0), *(cell("random", s, 4.0 + s) for s in range(3)))
    (claim,) = comparison.claims(cells, tmp_path / "scores", 200)
    assert claim.seeds == 3 and claim.wins == 3 and claim.nll == (2.0, 5.0) and claim.nll_interval is None
    cells = read(tmp_path, *(cell("full", s, 2.0, 1.0) for s in (1, 2)), *(cell("random", s, 4.0) for s in (0, 1)))
    assert comparison.claims(cells, tmp_path / "scores", 200)[0].seeds == 1


def test_numbers() -> None:
    assert comparison.number(-0.0744) == "−0.074" and comparison.number(0.0744, sign=True) == "+0.074"
    assert comparison.number(-0.0004, sign=True) == comparison.number(0.0004, sign=True) == "0.000"
    assert comparison.spread([1.0, 2.0], 2) == "1.50 ± 0.71" and comparison.spread([1.0], 2) == "1.00"
    assert comparison.interval([-1.0, 2.0], 1, sign=True) == "−1.0 to +2.0" and comparison.interval(None) == "–"
    assert comparison.percent(0.05) == "5\u00a0%"


@pytest.mark.parametrize("method, name", [("random", "Random"), ("less", "LESS"), ("bm25", "BM25"), ("ids", "Listed")])
def test_the_raw_subset_is_called_by_what_selected_it(method: str, name: str) -> None:
    cells: comparison.Cells = {row: {0: {"method": method}} for row in ("random", "transfer_random")}
    assert [comparison.label(cells, row) for row in cells] == [name, name]
    assert comparison.label({"full": {0: {"method": "full"}}}, "full") == "FULL"
