"""A finished selection as tables: where the kept samples come from, their scores, and what other methods kept."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pyarrow import parquet
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..artifacts import read_json
from ..examples import Example, full_text
from ..licences import licence

SOURCES = 15  # in the table; the others are counted together
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SHOWN = 5  # samples at each end
CHARACTERS = 70  # of a sample


def show(folder: Path, pool: Sequence[Example], console: Console | None = None) -> None:
    """Print the tables of the selection in `folder`, which is compared with those beside it of the same pool."""
    rows = parquet.read_table(folder / "scores.parquet").to_pydict()
    scores, kept = np.array(rows["score"]), np.array(rows["kept"])
    console = console or Console()
    for table in (sources(pool, kept), quantiles(scores, kept), overlaps(folder, kept), ends(pool, scores, kept)):
        if table.row_count:
            console.print(table)


def new_table(title: str, *columns: str) -> Table:
    """The first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    return table


def sources(pool: Sequence[Example], kept: np.ndarray) -> Table:
    counts = Counter(e.source for e in pool)
    chosen = Counter(e.source for e, keep in zip(pool, kept, strict=True) if keep)
    table = new_table(f"{kept.sum():,} of {len(pool):,} samples kept", "source", "pool", "kept", "share", "licence")
    names = sorted(counts, key=lambda name: (-chosen[name], -counts[name], name))
    for name in names[:SOURCES]:
        share = f"{chosen[name] / counts[name]:.1%}"
        table.add_row(Text(name), f"{counts[name]:,}", f"{chosen[name]:,}", share, licence(name))
    if names[SOURCES:]:
        others = sum(counts[name] for name in names[SOURCES:]), sum(chosen[name] for name in names[SOURCES:])
        label = f"{len(names) - SOURCES} others"
        table.add_row(label, f"{others[0]:,}", f"{others[1]:,}", f"{others[1] / others[0]:.1%}", "")
    return table


def quantiles(scores: np.ndarray, kept: np.ndarray) -> Table:
    table = new_table("Scores", "quantile", *(f"{q:.0%}" for q in QUANTILES))
    for name, values in (("all", scores), ("kept", scores[kept])):
        table.add_row(name, *(f"{value:.3g}" for value in np.quantile(values, QUANTILES)))
    return table


def overlaps(folder: Path, kept: np.ndarray) -> Table:
    """With every finished selection of the same pool in a folder beside this one."""
    table = new_table("Kept by others too", "selection", "kept", "in both", "by chance")
    mine = read_json(folder / "config.json")["inputs"]["examples"]
    for path in sorted(folder.parent.glob("*/scores.parquet")):
        other = path.parent
        if other.resolve() == folder.resolve() or not (other / "manifest.json").exists():
            continue
        if read_json(other / "config.json")["inputs"].get("examples") == mine:
            theirs = np.array(parquet.read_table(path, columns=["kept"])["kept"])
            expected = kept.sum() * theirs.sum() / len(kept)
            table.add_row(Text(other.name), f"{theirs.sum():,}", f"{(kept & theirs).sum():,}", f"{expected:.1f}")
    return table


def ends(pool: Sequence[Example], scores: np.ndarray, kept: np.ndarray) -> Table:
    table = Table(title="Highest and lowest scores", title_justify="left")
    table.add_column("score", justify="right")
    for name in ("kept", "source", "text"):
        table.add_column(name, overflow="fold")
    order = np.argsort(-scores, kind="stable")
    chosen = order if len(order) <= 2 * SHOWN else np.concatenate([order[:SHOWN], order[-SHOWN:]])
    for i in chosen:
        words = " ".join(full_text(pool[i]).split())
        shown = words if len(words) <= CHARACTERS else words[: CHARACTERS - 2] + " …"
        table.add_row(f"{scores[i]:.4g}", "yes" if kept[i] else "", Text(pool[i].source), Text(shown))
    return table
