"""The distilled set: prompt embeddings read back as the nearest tokens, and their text, beside the kept samples.

    <folder>/prompts.safetensors   prompts [n, k, D]: for a model with the same embedding table
    <folder>/dataset.parquet       id, source, messages, prompt_ids, prompt_text, distance: for any other model
    <folder>/config.json           how it was made
    <folder>/README.md             a dataset card; datasets.load_dataset(folder) reads the folder as it is

Special, added, unused and padded rows of the table are never taken. Source: section 3.3 of the paper.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from nacd_kernels import nearest_embedding

from .artifacts import folder_digest, open_stage, write_atomic
from .config import ModelConfig
from .data import Example, count_sources, digest
from .errors import InputError
from .student import embedding_table, load_model, model_digest

CARD = """---
configs:
- config_name: default
  data_files: dataset.parquet
tags: [dataset-distillation, instruction-tuning]
---

# {n} distilled samples

Each sample of `dataset.parquet` has {k} pseudo tokens learned by trajectory matching (NACD, arXiv 2504.09818) for the
model `{model}`. `prompts.safetensors` holds them as embeddings [{n}, {k}, {width}], to be put in front of the embedded
sample of a model with the same embedding table; `prompt_text` is the text of the nearest tokens, for any other model.

| source | samples |
|---|---|
{sources}

Every sample keeps the licence of its source.
"""


def banned_ids(tokenizer: PreTrainedTokenizerBase, rows: int) -> Tensor:
    """bool [rows]: rows of the embedding table that are no ordinary token: special, added, or beyond the tokenizer."""
    banned = torch.zeros(rows, dtype=torch.bool)
    banned[len(tokenizer) :] = True
    names = tokenizer.convert_ids_to_tokens(list(range(min(len(tokenizer), rows))))
    unused = [i for i, name in enumerate(names) if name is None]
    for i in {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder, *unused}:
        if i < rows:
            banned[i] = True
    return banned


def decode_prompts(
    prompts: Tensor, table: Tensor, tokenizer: PreTrainedTokenizerBase
) -> tuple[Tensor, Tensor, list[str]]:
    """Nearest token ids [n, k], their distances [n, k], and each prompt's text. prompts [n, k, D], table [V, D]."""
    n, k, width = prompts.shape
    if width != table.shape[1]:
        raise InputError(
            f"the prompts have width {width}, the model's embeddings {table.shape[1]}: they were made for another model"
        )
    banned = banned_ids(tokenizer, table.shape[0]).to(table.device)
    index, distance = nearest_embedding(prompts.to(table.device).reshape(n * k, width), table, banned=banned)
    index = index.view(n, k).cpu()
    texts = [
        tokenizer.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in index.tolist()
    ]
    return index, distance.view(n, k).cpu(), texts


def read_prompts(folder: Path, *, decoded: bool) -> Tensor | list[str]:
    """The prompts of a distilled set, in the order of its samples: their texts, or their embeddings [n, k, D]."""
    if decoded:
        return list(datasets.Dataset.from_parquet(str(folder / "dataset.parquet"), keep_in_memory=True)["prompt_text"])
    return load_file(folder / "prompts.safetensors")["prompts"]


def run(folder: Path, model: ModelConfig, examples: Sequence[Example], matched: Path) -> Path:
    """Write the distilled set of a finished matching folder; `examples` are its kept samples. Returns `folder`."""
    prompts = load_file(matched / "prompts.safetensors")["prompts"]
    if len(prompts) != len(examples):
        raise InputError(f"{matched}: {len(prompts)} prompts for {len(examples)} kept samples")
    inputs = {"matching": folder_digest(matched), "kept": digest(examples), "model": model_digest(model.path)}
    with open_stage(folder, {"model": model.path, "dtype": model.dtype}, inputs) as stage:
        if stage.finished:
            return folder
        base, tokenizer = load_model(model.path, model.dtype, model.device)
        ids, distances, texts = decode_prompts(prompts, embedding_table(base), tokenizer)
        table = datasets.Dataset.from_list(
            [
                {
                    "id": e.id,
                    "source": e.source,
                    "messages": list(e.messages),
                    "prompt_ids": i,
                    "prompt_text": t,
                    "distance": d,
                }
                for e, i, t, d in zip(examples, ids.tolist(), texts, distances.tolist(), strict=True)
            ]
        )
        part = stage.work / "dataset.parquet"
        table.to_parquet(part)
        write_atomic(folder / "dataset.parquet", part.read_bytes())
        write_atomic(folder / "prompts.safetensors", save({"prompts": prompts.contiguous()}))
        sources = "\n".join(f"| {name} | {count} |" for name, count in count_sources(examples).items())
        card = CARD.format(
            n=len(prompts), k=prompts.shape[1], width=prompts.shape[2], model=model.path, sources=sources
        )
        write_atomic(folder / "README.md", card.encode())
    return folder


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["decode", *sys.argv[1:]]))
