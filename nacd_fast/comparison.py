"""Scores of a run -> the comparison table, the paired claims, the verdict in plain words. Numbers become text here.

A row is one method on one model; it has a cell for every seed. Rows on the other model begin with `transfer_`. A claim
sets a row against another on the same test items: better is a lower held-out NLL in the mean over seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .artifacts import read_json
from .errors import InputError
from .intervals import paired_difference, read_items

Cell = Mapping[str, Any]
"""An entry of scores.json: row, method, model, fraction, seed, nll, nll_interval, accuracy, accuracy_interval."""
Cells = Mapping[str, Mapping[int, Cell]]
"""Row -> seed -> cell."""

TRANSFER = "transfer_"
NBSP = "\u00a0"  # keeps a number and its sign on one line
LABELS = {
    "baseline": "Baseline",
    "full": "FULL",
    "random": "Random",
    "nacd_embeddings": "NACD, embeddings",
    "nacd_decoded": "NACD, decoded",
}
SELECTIONS = {
    "stratified": "Stratified",
    "bm25": "BM25",
    "dsir": "DSIR",
    "less": "LESS",
    "dq": "DQ",
    "ids": "Listed",
}
ORDER = [*LABELS, *(TRANSFER + row for row in LABELS)]
CLAIMS = {  # row: (set against, subject in the verdict, whether that is one thing)
    "full": ("random", "Training on the full set", True),
    "nacd_embeddings": ("random", "The NACD embeddings", False),
    "nacd_decoded": ("random", "The same prompts decoded to text", False),
    TRANSFER + "nacd_decoded": (TRANSFER + "random", "On {model}, another model, the decoded prompts", False),
}


def read_cells(path: Path) -> Cells:
    """The rows of scores.json, in the order of the paper's tables. Raises InputError naming a row without scores."""
    found: dict[str, dict[int, Cell]] = {}
    rows = read_json(path)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{path}: must be a list of rows, at least one")
    for place, cell in enumerate(rows, 1):
        try:
            seed = int(cell["seed"] or 0)
            found.setdefault(str(cell["row"]), {})[seed] = {
                "method": "",
                "model": "",
                "accuracy": None,
                "accuracy_interval": None,
                "nll_interval": None,
                **cell,
                "seed": seed,
                "nll": float(cell["nll"]),
                "fraction": float(cell["fraction"]),
            }
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}, row {place}: must have row, seed, fraction and nll ({error!r})") from None
    order = sorted(found, key=lambda row: ORDER.index(row) if row in ORDER else len(ORDER))
    return {row: dict(sorted(found[row].items())) for row in order}


# Numbers as text


def number(value: float, digits: int = 3, *, sign: bool = False) -> str:
    """Fixed point with a real minus; what rounds to zero has no sign."""
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.lstrip("+-") if float(text) == 0 else text.replace("-", "−")


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation over seeds (n - 1); the mean alone for one seed."""
    mean = number(float(np.mean(values)), digits)
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else mean


def interval(bounds: Sequence[float] | None, digits: int = 3, *, sign: bool = False) -> str:
    return "–" if bounds is None else " to ".join(number(bound, digits, sign=sign) for bound in bounds)


def percent(fraction: float) -> str:
    return f"{100 * fraction:.3g}{NBSP}%"


# The table


def label(cells: Cells, row: str) -> str:
    """What a row is called; the raw subset, whose row is `random`, by the method that selected it."""
    method = first(cells, row)["method"]
    name = row.removeprefix(TRANSFER)
    return (SELECTIONS.get(method) if name == "random" else None) or LABELS.get(name) or method or row


def first(cells: Cells, row: str) -> Cell:
    return next(iter(cells[row].values()))


def values(cells: Cells, row: str, metric: str) -> list[float]:
    return [float(cell[metric]) for cell in cells.get(row, {}).values() if cell[metric] is not None]


def gap_closed(cells: Cells, row: str) -> float | None:
    """(random - row) / (random - FULL) in percent, of the mean NLLs; None where FULL is not better than random."""
    prefix = TRANSFER if row.startswith(TRANSFER) else ""
    random, full, mine = (values(cells, name, "nll") for name in (prefix + "random", prefix + "full", row))
    if not (random and full and mine) or np.mean(full) >= np.mean(random):
        return None
    return float(100 * (np.mean(random) - np.mean(mine)) / (np.mean(random) - np.mean(full)))


def table(cells: Cells) -> list[dict[str, Any]]:
    """The rows by model: [{"model", "transfer", "rows": [{"label", "percent", "nll", "accuracy", "gap", "seeds"}]}]."""
    groups: dict[tuple[bool, str], list[str]] = {}
    for row in cells:
        groups.setdefault((row.startswith(TRANSFER), str(first(cells, row)["model"])), []).append(row)
    return [
        {"model": model, "transfer": transfer, "rows": table_rows(cells, rows)}
        for (transfer, model), rows in groups.items()
    ]


def table_rows(cells: Cells, rows: Sequence[str]) -> list[dict[str, Any]]:
    small = [row for row in rows if 0 < first(cells, row)["fraction"] < 1]
    best_nll = best(small, lambda row: values(cells, row, "nll"))
    best_accuracy = best(small, lambda row: [-a for a in values(cells, row, "accuracy")])
    found = []
    for row in rows:
        accuracy, gap = [100 * a for a in values(cells, row, "accuracy")], gap_closed(cells, row)
        found.append(
            {
                "row": row,
                "label": label(cells, row),
                "percent": percent(first(cells, row)["fraction"]),
                "nll": spread(values(cells, row, "nll"), 3),
                "nll_best": row == best_nll,
                "accuracy": spread(accuracy, 1) if accuracy else "–",
                "accuracy_best": row == best_accuracy,
                "gap": "–" if gap is None or row.endswith("baseline") else f"{number(gap, 1)}{NBSP}%",
                "seeds": len(cells[row]),
            }
        )
    return found


def best(rows: Sequence[str], scores: Callable[[str], list[float]]) -> str | None:
    """The row with the lowest mean of several; None where there is nothing to compare."""
    means = {row: float(np.mean(scores(row))) for row in rows if scores(row)}
    return min(means, key=means.__getitem__) if len(means) > 1 else None


# The claims


@dataclass(frozen=True)
class Claim:
    """One row set against another, by seeds that both have (a row with one seed stands against every seed)."""

    row: str
    against: str
    model: str
    nll: tuple[float, float]
    """Mean NLL of the row and of the other, over the paired seeds."""
    wins: int
    """Seeds in which the row is better."""
    seeds: int
    nll_interval: tuple[float, float] | None
    """Of the difference, paired by item, pooled over seeds; None where item scores are missing."""
    accuracy: float | None
    accuracy_interval: tuple[float, float] | None

    @property
    def difference(self) -> float:
        return self.nll[0] - self.nll[1]

    @property
    def outcome(self) -> str:
        """`holds`, `unsure` (better in the mean, but the interval includes no difference) or `failed`."""
        if not self.difference < 0:
            return "failed"
        return "unsure" if self.nll_interval and self.nll_interval[1] >= 0 else "holds"


def claims(cells: Cells, scores: Path, resamples: int) -> list[Claim]:
    """Every claim whose two rows were scored. scores: the folder of scores/<row>/seed<s>/items.parquet."""
    return [
        compare(cells, row, against, scores, resamples)
        for row, (against, _, _) in CLAIMS.items()
        if row in cells and against in cells and paired_seeds(cells, row, against)
    ]


def paired_seeds(cells: Cells, row: str, against: str) -> list[tuple[int, int]]:
    a, b = list(cells[row]), list(cells[against])
    if len(a) == 1 or len(b) == 1:
        return [(x, y) for x in a for y in b]
    return [(seed, seed) for seed in a if seed in b]


def compare(cells: Cells, row: str, against: str, scores: Path, resamples: int) -> Claim:
    pairs = paired_seeds(cells, row, against)
    mine = [cells[row][a] for a, _ in pairs]
    other = [cells[against][b] for _, b in pairs]
    files = [
        [scores / name / f"seed{seed}" / "items.parquet" for seed in seeds]
        for name, seeds in ((row, [a for a, _ in pairs]), (against, [b for _, b in pairs]))
    ]
    accuracy = [
        a["accuracy"] - b["accuracy"]
        for a, b in zip(mine, other)
        if a["accuracy"] is not None and b["accuracy"] is not None
    ]
    intervals: dict[str, tuple[float, float]] = {}
    if all(file.is_file() for side in files for file in side):
        items = [[read_items(file) for file in side] for side in files]
        for metric in ("nll", "accuracy") if accuracy else ("nll",):
            _, *bounds = paired_difference(*items, metric=metric, resamples=resamples)
            intervals[metric] = (bounds[0], bounds[1])
    return Claim(
        row,
        against,
        str(mine[0]["model"]),
        (float(np.mean([a["nll"] for a in mine])), float(np.mean([b["nll"] for b in other]))),
        sum(a["nll"] < b["nll"] for a, b in zip(mine, other)),
        len(pairs),
        intervals.get("nll"),
        float(np.mean(accuracy)) if accuracy else None,
        intervals.get("accuracy"),
    )


# The verdict


def headline(found: Sequence[Claim]) -> str:
    main = next((claim for claim in found if claim.row == "nacd_embeddings"), None)
    if main is None:
        return "No verdict yet"
    return {
        "holds": "NACD embeddings beat the raw subset",
        "failed": "NACD embeddings do not beat the raw subset",
        "unsure": "NACD embeddings lead the raw subset, within the noise",
    }[main.outcome]


def verdict(cells: Cells, found: Sequence[Claim], selection: str) -> str:
    """A paragraph, one sentence or two a claim; selection: how the raw subset was chosen."""
    if not found:
        return "The rows that a verdict needs are not scored yet."
    return " ".join(sentence(cells, claim, f" ({selection})" if claim is found[0] else "") for claim in found)


def sentence(cells: Cells, claim: Claim, selection: str) -> str:
    _, subject, single = CLAIMS[claim.row]
    share = percent(first(cells, claim.against)["fraction"])
    verb = {"holds": "beat", "unsure": "beat", "failed": "do not beat"}[claim.outcome]
    if single:
        verb = {"beat": "beats", "do not beat": "does not beat"}[verb]
    seeds = f"{claim.seeds} {'seed' if claim.seeds == 1 else 'seeds'}"
    bounds = f", 95{NBSP}% interval {interval(claim.nll_interval, sign=True)}" if claim.nll_interval else ""
    text = (
        f"{subject.format(model=claim.model)} {verb} the raw {share}{selection}"
        f"{' in the mean, but not beyond doubt' if claim.outcome == 'unsure' else ''}: held-out NLL "
        f"{number(claim.nll[0])} against {number(claim.nll[1])}, better in {claim.wins} of {seeds} "
        f"(paired difference {number(claim.difference, sign=True)}{bounds})"
    )
    if claim.outcome == "failed":
        return text + "; this claim failed."
    gap = gap_closed(cells, claim.row)
    if gap is None or claim.row.endswith("full"):
        return text + "."
    return text + f", which closes {number(gap, 1)}{NBSP}% of the gap to the full set."
