"""The product: a distilled set, a folder that other tools open as it is.

    <folder>/dataset.parquet       COLUMNS, a row a sample; datasets.load_dataset(folder) reads it
    <folder>/tokens.csv            TOKEN_COLUMNS, a line a pseudo token: what it reads as, and what came next
    <folder>/prompts.safetensors   prompts [n, k, D], for a model with the same embedding table
    <folder>/config.json           how it was made
    <folder>/README.md             the dataset card

It is all that training on the set needs: `load_distilled` here, `nacd transfer` and `nacd export` read nothing else.
n samples, k prompt tokens, D width.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .artifacts import Stage, folder_digest, open_stage, read_json, write_atomic
from .config import ModelConfig
from .decode import Spelling, decode_prompts
from .errors import InputError
from .examples import Example, count_sources, digest
from .forms import read_set
from .licences import licence
from .student import embedding_table, load_model, model_digest
from .training import model_settings

COLUMNS = (
    *("id", "source", "messages", "prompt_text", "survives", "prompt_ids", "prompt_tokens"),
    *("distance", "rank", "margin", "next_tokens"),
)
TOKEN_COLUMNS = (
    *("id", "place", "token_id", "token", "distance", "rank", "margin"),
    *("next_id", "next_token", "next_distance", "survives"),
)
CARD = """---
configs:
- config_name: default
  data_files: dataset.parquet
tags: [dataset-distillation, instruction-tuning]
---

# {n} distilled samples

Each sample of `dataset.parquet` has {k} pseudo tokens learned by trajectory matching (NACD, arXiv 2504.09818) for the
model `{model}`. `prompts.safetensors` holds them as embeddings [{n}, {k}, {width}], to be put in front of the embedded
sample of a model with the same embedding table; `prompt_text` is what they read as, for any other model. {spelled}
`tokens.csv` has a line for each: its token, the distance to it, the runner-up, and how much further that is.

| source | samples | licence |
|---|--:|---|
{sources}

Every sample keeps the licence of its source.

How it was made:

```yaml
{made}
```
"""


@dataclass(frozen=True)
class Distilled:
    """A distilled set: samples (n rows of COLUMNS), their prompts [n, k, D], and how it was made."""

    folder: Path
    samples: datasets.Dataset
    prompts: Tensor
    made: Mapping[str, Any]

    @property
    def texts(self) -> list[str]:
        """What the prompts read as."""
        return list(self.samples["prompt_text"])

    def examples(self) -> list[Example]:
        """The kept samples, without their prompts."""
        return read_set(str(self.folder / "dataset.parquet"), "train")


def load_distilled(folder: str | Path) -> Distilled:
    """The distilled set in `folder`. Raises InputError if it is not one, is unfinished, or a file of it has changed."""
    folder = Path(folder)
    if not (folder / "manifest.json").is_file():
        raise InputError(f"{folder}: no finished distilled set (it has no manifest.json)")
    Stage(folder).check_outputs()
    made = read_json(folder / "config.json").get("config", {})
    try:
        samples = datasets.Dataset.from_parquet(str(folder / "dataset.parquet"), keep_in_memory=True)
        prompts = load_file(folder / "prompts.safetensors")["prompts"]
    except (OSError, KeyError, SafetensorError, pa.ArrowException) as error:
        raise InputError(f"{folder}: not a distilled set ({str(error).splitlines()[0]})") from None
    absent = [name for name in COLUMNS if name not in samples.column_names]
    if absent:
        raise InputError(f"{folder / 'dataset.parquet'}: not a distilled set: it has no column {absent[0]}")
    if len(samples) != len(prompts):
        raise InputError(f"{folder}: {len(prompts)} prompts for {len(samples)} samples: must be one each")
    return Distilled(folder, samples, prompts, made)


def sample_row(example: Example, spelling: Spelling) -> dict[str, Any]:
    """A row of COLUMNS."""
    tokens = spelling.tokens
    return {
        "id": example.id,
        "source": example.source,
        "messages": list(example.messages),
        "prompt_text": spelling.text,
        "survives": spelling.survives,
        "prompt_ids": [token.id for token in tokens],
        "prompt_tokens": [token.text for token in tokens],
        "distance": [token.distance for token in tokens],
        "rank": [token.rank for token in tokens],
        "margin": [token.margin for token in tokens],
        "next_tokens": [token.next_text for token in tokens],
    }


def token_table(examples: Sequence[Example], spellings: Sequence[Spelling]) -> str:
    """TOKEN_COLUMNS as CSV."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(TOKEN_COLUMNS)
    for example, spelling in zip(examples, spellings, strict=True):
        for place, token in enumerate(spelling.tokens):
            taken = (token.id, token.text, token.distance, token.rank, token.margin)
            other = (token.next_id, token.next_text, token.next_distance)
            writer.writerow((example.id, place, *taken, *other, spelling.survives))
    return text.getvalue()


def how_spelled(spellings: Sequence[Spelling]) -> str:
    """What became of tokens that spell no text."""
    moved = sum(any(token.rank for token in spelling.tokens) for spelling in spellings)
    lost = sum(not spelling.survives for spelling in spellings)
    if not moved and not lost:
        return "All of them are the nearest tokens."
    return (
        f"{moved:,} of the prompts took further tokens, as their nearest ones spell no text that survives tokenising"
        + (f", and {lost:,} found none" if lost else "")
        + "."
    )


def card(examples: Sequence[Example], prompts: Tensor, spellings: Sequence[Spelling], made: Mapping[str, Any]) -> str:
    n, k, width = prompts.shape
    counts = count_sources(examples).items()
    return CARD.format(
        n=n,
        k=k,
        width=width,
        model=made["model"]["path"],
        spelled=how_spelled(spellings),
        sources="\n".join(f"| {name.replace('|', '&#124;')} | {count} | {licence(name)} |" for name, count in counts),
        made=yaml.safe_dump(dict(made), sort_keys=False, allow_unicode=True).rstrip(),
    )


def run(
    folder: Path, model: ModelConfig, examples: Sequence[Example], matched: Path, stages: Mapping[str, Path]
) -> Path:
    """Write the distilled set of a finished matching folder; `examples` are its kept samples. Returns `folder`.

    stages: the finished folders whose settings are told as how the set was made, by name.
    """
    prompts = load_file(matched / "prompts.safetensors")["prompts"].contiguous()
    if len(prompts) != len(examples):
        raise InputError(f"{matched}: {len(prompts)} prompts for {len(examples)} kept samples")
    made = {"model": model_settings(model)}
    made |= {name: read_json(stage / "config.json")["config"] for name, stage in stages.items()}
    inputs = {"matching": folder_digest(matched), "kept": digest(examples), "model": model_digest(model.path)}
    with open_stage(folder, made, inputs) as stage:
        if stage.finished:
            return folder
        base, tokenizer = load_model(model.path, model.dtype, model.device)
        spellings = decode_prompts(prompts, embedding_table(base), tokenizer)
        part = stage.work / "dataset.parquet"
        datasets.Dataset.from_list([sample_row(*pair) for pair in zip(examples, spellings, strict=True)]).to_parquet(
            part
        )
        write_atomic(folder / "dataset.parquet", part.read_bytes())
        write_atomic(folder / "tokens.csv", token_table(examples, spellings).encode())
        write_atomic(folder / "prompts.safetensors", save({"prompts": prompts}))
        write_atomic(folder / "README.md", card(examples, prompts, spellings, made).encode())
    return folder
