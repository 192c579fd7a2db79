"""A whole job of seconds: a tiny model, its sibling as the transfer model, and a few sentences."""

import json
from collections.abc import Sequence
from pathlib import Path

from nacd_fast.examples import Example
from tests.tiny import make_examples, make_model

SETTINGS = """\
out: run
seeds: [0, 1]
transfer: {sibling}
model: {{path: {model}, rank: 2, lora_alpha: 4, device: cpu}}
data: {{train: {data}, validation: {data}, test: {data}}}
select: {{fraction: 0.3}}
experts: {{count: 2, epochs: 1, batch: 4, optimizer: sgd, lr: 0.1, snapshot_steps: 2}}
match: {{iterations: 6, inner_steps: 2, span_steps: 2, max_start_epoch: 1, batch: 2, beta: 0.1, save_every: 2}}
tune: {{epochs: 2, full_epochs: 1, batch: 4, lr: 0.01}}
evaluate: {{batch: 8, bootstrap: 100}}
"""


def write_set(path: Path, examples: Sequence[Example]) -> None:
    rows = [
        {
            "id": e.id,
            "source": e.source,
            "messages": list(e.messages),
            "choices": [e.messages[-1]["content"], "no stone"],
            "answer": 0,
        }
        for e in examples
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_job(folder: Path) -> Path:
    """Models, data and settings in `folder`; returns the path of the settings."""
    data = folder / "data"
    data.mkdir()
    for seed, (split, size) in enumerate({"train": 16, "validation": 5, "test": 6}.items()):
        write_set(data / f"{split}.jsonl", make_examples(size, seed))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        SETTINGS.format(model=make_model(folder / "model"), sibling=make_model(folder / "sibling", "opt"), data=data)
    )
    return recipe
