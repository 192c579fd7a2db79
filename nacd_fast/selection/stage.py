"""The selection stage: full set -> ids.txt (the kept, one a line), scores.parquet (id, source, score, kept of all)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..artifacts import file_digest, open_stage, write_atomic
from ..config import SelectConfig
from ..data import Example, digest
from . import select


def run(folder: Path, examples: Sequence[Example], config: SelectConfig, seed: int) -> list[str]:
    """The kept ids, in the set's order. ids.txt can be given back as `select.ids`."""
    ids, scores = select(examples, config, seed)  # bad input raises here, before anything is written
    settings = {**asdict(config), "seed": seed}
    inputs = {"examples": digest(examples)}
    if settings.pop("ids"):  # the list's content is what counts, not where it lies
        inputs["ids"] = file_digest(Path(config.ids).expanduser())
    with open_stage(folder, settings, inputs) as stage:
        if not stage.finished:
            write_atomic(folder / "ids.txt", "".join(f"{name}\n" for name in ids).encode())
            write_atomic(folder / "scores.parquet", score_table(examples, ids, scores))
    return ids


def score_table(examples: Sequence[Example], ids: Sequence[str], scores: Sequence[float]) -> bytes:
    import pyarrow  # slow to import, and needed only from here
    from pyarrow import parquet

    kept = set(ids)
    table = pyarrow.table(
        {
            "id": [e.id for e in examples],
            "source": [e.source for e in examples],
            "score": pyarrow.array(scores, pyarrow.float64()),
            "kept": [e.id in kept for e in examples],
        }
    )
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink)
    return sink.getvalue().to_pybytes()
