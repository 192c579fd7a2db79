"""The selection stage: full set -> the kept samples, and everybody's scores.

<folder>/ids.txt          the kept, one a line; can be given back as `select.ids`
<folder>/scores.parquet   id, source, score and kept, a row a sample
<folder>/scores.svg       the scores of the kept and of the others
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..artifacts import file_digest, open_stage, write_atomic
from ..config import AIMED, SelectConfig
from ..examples import Example, digest
from ..plots import draw_histogram, standalone
from ..student import model_digest
from ..training import data_settings, model_settings
from . import LEARNED, check, select
from .method import Context, Selected


def run(folder: Path, pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> list[str]:
    """The kept ids, in the set's order. Bad input raises before anything is written."""
    if not (folder / "manifest.json").exists():
        check(pool, config, context)
    settings, inputs = key(pool, config, seed, context)
    with open_stage(folder, settings, inputs) as stage:
        if not stage.finished:
            found = select(pool, config, seed, context)
            write_atomic(folder / "scores.parquet", score_table(pool, found))
            write_atomic(folder / "scores.svg", standalone(score_plot(pool, found)).encode())
            write_atomic(folder / "ids.txt", "".join(f"{name}\n" for name in found.ids).encode())
    return (folder / "ids.txt").read_text(encoding="utf-8").splitlines()


def key(
    pool: Sequence[Example], config: SelectConfig, seed: int, context: Context
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the result depends on: the settings of the method, and digests."""
    settings: dict[str, Any] = {"method": config.method, "fraction": config.fraction, "seed": seed}
    inputs = {"examples": digest(pool)}
    if config.ids:  # the list's content is what counts, not where it lies
        inputs["ids"] = file_digest(Path(config.ids).expanduser())
    if config.method in AIMED:
        settings["target"] = config.target
        inputs["target"] = digest(context.target)
    if config.method in LEARNED:
        settings |= {"model": model_settings(context.model), "data": data_settings(context.data)}
        settings[config.method] = asdict(getattr(config, config.method))
        inputs["model"] = model_digest(context.model.path)
    return settings, inputs


def score_table(pool: Sequence[Example], found: Selected) -> bytes:
    import pyarrow  # slow to import, and needed only from here
    from pyarrow import parquet

    kept = set(found.ids)
    table = pyarrow.table(
        {
            "id": [e.id for e in pool],
            "source": [e.source for e in pool],
            "score": pyarrow.array(found.scores, pyarrow.float64()),
            "kept": [e.id in kept for e in pool],
        }
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def score_plot(pool: Sequence[Example], found: Selected) -> str:
    kept = set(found.ids)
    groups: dict[str, list[float]] = {"all": found.scores, "kept": []}
    groups["kept"] = [score for e, score in zip(pool, found.scores, strict=True) if e.id in kept]
    return draw_histogram("selection", "score", groups)
