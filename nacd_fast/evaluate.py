"""One model's scores on the test split: response NLL and choice accuracy.

NLL is in nats per supervised token, summed over the set and divided by its supervised tokens: a long response weighs
more than a short one. Accuracy is the paper's for OPT (section 4.1): every candidate takes the place of the last
response, and the one with the highest *average* log-likelihood per token wins; ties take the lowest index.

Sequences are batched by length and padded on the right; equal ones are scored once. n items, m rows.
"""

import hashlib
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .artifacts import file_digest, open_stage, read_json, write_json
from .config import DataConfig, EvaluateConfig, ModelConfig
from .data import IGNORE, Encoded, encode_set
from .errors import InputError, NonFiniteError
from .examples import Example, choice_examples, digest
from .intervals import Items, summarise, write_items
from .losses import losses_by_length
from .progress import progress_bar
from .student import first_line, load_model, max_positions, model_digest

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True)
class Plan:
    """The distinct sequences to score, and where each item finds its own.

    rows [m]: sequences; owners [m]: id of the first item that needs the row (for messages); response [n]: row of the
    item's own response; candidates [n]: rows of its candidates, empty where it has none.
    """

    rows: list[Encoded]
    owners: list[str]
    response: list[int]
    candidates: list[list[int]]


def last_response(row: Encoded) -> Encoded:
    """The row with only its last run of supervised tokens: a candidate is scored without the turns before it."""
    end = max((i for i, label in enumerate(row.labels) if label != IGNORE), default=-1) + 1
    start = end
    while start > 0 and row.labels[start - 1] != IGNORE:
        start -= 1
    return replace(row, labels=[IGNORE] * start + row.labels[start:])


def plan_rows(test: Sequence[Example], tokenizer: PreTrainedTokenizerBase, data: DataConfig, limit: int) -> Plan:
    """Encode responses and candidates, equal sequences once. Raises InputError beyond `limit` tokens."""
    plan = Plan([], [], [], [])
    index: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def add(row: Encoded, owner: str) -> int:
        if len(row.input_ids) > limit:
            raise InputError(
                f"item {owner!r}: {len(row.input_ids)} tokens, the model takes at most {limit}; lower data.max_tokens"
            )
        if all(label == IGNORE for label in row.labels[1:]):
            raise InputError(f"item {owner!r}: no response token to score")
        key = (tuple(row.input_ids), tuple(row.labels))
        if key not in index:
            index[key] = len(plan.rows)
            plan.rows.append(row)
            plan.owners.append(owner)
        return index[key]

    plan.response.extend(add(row, e.id) for e, row in zip(test, encode_set(test, tokenizer, data)))
    for e in test:
        options = encode_set(choice_examples(e), tokenizer, data) if e.answer is not None else []
        plan.candidates.append([add(last_response(row), e.id) for row in options])
    return plan


def row_nll(
    model: PreTrainedModel | PeftModel, plan: Plan, batch: int, pad_id: int, label: str
) -> tuple[np.ndarray, np.ndarray]:
    """Sum of -log p over supervised tokens [m] float64 and their number [m] int64, for every row of the plan.

    Raises NonFiniteError with the item's id.
    """
    rows = plan.rows
    sums, tokens = np.zeros(len(rows)), np.array([sum(label != IGNORE for label in row.labels[1:]) for row in rows])
    with progress_bar(label, math.ceil(len(rows) / batch)) as bar:
        for chosen, losses, owner in losses_by_length(model, rows, batch, pad_id):
            zeros = torch.zeros(len(chosen), dtype=torch.float64)
            sums[chosen] = zeros.index_add(0, owner.cpu(), losses.cpu().double()).numpy()
            for i in chosen:
                if not np.isfinite(sums[i]):
                    raise NonFiniteError(f"item {plan.owners[i]!r}: its NLL in {label} is {sums[i]}; must be finite")
            bar.advance()
    return sums, tokens


def score(
    model: PreTrainedModel | PeftModel, plan: Plan, test: Sequence[Example], batch: int, pad_id: int, label: str
) -> Items:
    """NLL of every item's response, and whether its right candidate has the highest average log-likelihood."""
    sums, tokens = row_nll(model, plan, batch, pad_id, label)
    correct = np.full(len(test), np.nan)
    for i, (example, candidates) in enumerate(zip(test, plan.candidates)):
        if candidates:
            correct[i] = float(np.argmin(sums[candidates] / tokens[candidates]) == example.answer)
    return Items(tuple(example.id for example in test), sums[plan.response], tokens[plan.response], correct)


def check_input(test: Sequence[Example], adapter: Path | None) -> None:
    if not test:
        raise InputError("the test split is empty: must have at least one item")
    if adapter is None:
        return
    for name in ADAPTER_FILES:
        if not (adapter / name).is_file():
            raise InputError(f"{adapter}: no {name}, not an adapter in peft's format")


def load(model: ModelConfig, adapter: Path | None) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """The base model, with the adapter where there is one."""
    base, tokenizer = load_model(model.path, model.dtype, model.device)
    if adapter is None:
        return base, tokenizer
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")  # peft goes on with random ones
            return PeftModel.from_pretrained(base, str(adapter)), tokenizer
    except (RuntimeError, ValueError, KeyError, UserWarning) as error:
        raise InputError(f"{adapter}: does not fit {model.path} ({first_line(error)})") from None


def run(
    folder: Path,
    model: ModelConfig,
    data: DataConfig,
    config: EvaluateConfig,
    test: Sequence[Example],
    adapter: Path | None,
    label: str,
) -> dict[str, Any]:
    """Score one model on `test`; adapter None is the untrained base. Writes items.parquet and scores.json to `folder`.

    Returns {"nll", "nll_interval", "accuracy", "accuracy_interval"}. A killed attempt is scored anew: a cell is short.
    """
    check_input(test, adapter)
    settings = {
        "model": model.path,
        "dtype": model.dtype,
        "template": data.template,
        "max_tokens": data.max_tokens,
        "batch": config.batch,
        "bootstrap": config.bootstrap,
    }
    inputs = {"test": digest(test)}
    if adapter:
        digests = "".join(file_digest(adapter / name) for name in ADAPTER_FILES)
        inputs["adapter"] = hashlib.sha256(digests.encode()).hexdigest()
    if not (folder / "manifest.json").exists():  # bad input must be found before the folder is made
        student, tokenizer = load(model, adapter)
        plan = plan_rows(test, tokenizer, data, max_positions(student))
    inputs["model"] = model_digest(model.path)
    with open_stage(folder, settings, inputs) as stage:
        if not stage.finished:
            items = score(student, plan, test, config.batch, tokenizer.pad_token_id or 0, label)
            write_items(folder / "items.parquet", items)
            write_json(folder / "scores.json", summarise(items, config.bootstrap))
    return read_json(folder / "scores.json")


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["evaluate", *sys.argv[1:]]))
