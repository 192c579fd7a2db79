"""Instruction tuning of a fresh student on a few samples, with or without learned prompts in front of them.

    <folder>/adapter/    the adapters of the best epoch in peft's format
    <folder>/log.json    {"epochs": [{"epoch", "train_loss", "validation_nll"}], "best_epoch", "steps_per_epoch"}

Every row of the comparison is trained by this file: AdamW, the same rate, batch and number of epochs, and the epoch
with the lowest validation NLL per token is kept (the untrained state is no candidate; ties take the earliest).
Validation samples get no prompts, as nothing that the model is asked later will have one.
"""

import hashlib
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .artifacts import Stage, open_stage, read_json, write_atomic, write_json
from .config import DataConfig, ModelConfig, TuneConfig
from .data import IGNORE, Encoded, encode_set
from .decode import ids_of
from .errors import InputError, NonFiniteError
from .examples import Example, digest
from .losses import mean_nll
from .store import TrajectoryStore, TrajectoryWriter
from .student import adapter_state, add_lora, load_adapter_state, load_model, max_positions, model_digest
from .training import (
    Observer,
    Samples,
    check_batch,
    check_lengths,
    data_settings,
    model_settings,
    save_adapter,
    steps_per_epoch,
    train,
)

Prompts = Tensor | Sequence[str] | None
VALIDATION_BATCH = 32


# --- prompts ----------------------------------------------------------------------------------------------------------


def check_prompts(prompts: Prompts, samples: int, width: int) -> None:
    """Raise InputError unless there is one prompt a sample; embeddings [n, k, D] are finite, k >= 1 and D = width."""
    if prompts is None:
        return
    if len(prompts) != samples:
        raise InputError(f"{len(prompts)} prompts for {samples} samples: must be one each")
    if isinstance(prompts, Tensor):
        if prompts.ndim != 3 or prompts.shape[1] < 1 or prompts.shape[2] != width:
            raise InputError(f"prompts of shape {list(prompts.shape)}: must be [{samples}, k >= 1, {width}]")
        if not prompts.isfinite().all():
            row = int((~prompts.isfinite()).flatten(1).any(1).nonzero()[0])
            raise InputError(f"prompt {row} holds NaN or infinity: must be finite")


def prompt_digest(prompts: Prompts) -> str:
    total = hashlib.sha256()
    if isinstance(prompts, Tensor):
        total.update(repr(list(prompts.shape)).encode() + prompts.detach().float().cpu().contiguous().numpy().tobytes())
    else:
        total.update(repr(None if prompts is None else list(prompts)).encode())
    return total.hexdigest()


def put_in_front(texts: Sequence[str], rows: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """The rows behind their prompts' tokens, without a loss on them.

    A prompt is tokenised by itself, so that no token grows across the border; what it spells is text, no special token.
    """
    prompts = ids_of(texts, tokenizer)
    return [Encoded([*p, *row.input_ids], [IGNORE] * len(p) + row.labels) for p, row in zip(prompts, rows, strict=True)]


def prepare(
    train_set: Sequence[Example], rows: list[Encoded], prompts: Prompts, tokenizer: PreTrainedTokenizerBase, limit: int
) -> Samples:
    """The training samples with their prompts. Raises InputError beyond the model's `limit` positions."""
    ids = [e.id for e in train_set]
    if prompts is None or isinstance(prompts, Tensor):
        check_lengths(ids, rows, [0 if prompts is None else prompts.shape[1]] * len(rows), limit)
        return Samples(ids, rows, None if prompts is None else prompts.detach().float().cpu())
    whole = put_in_front(prompts, rows, tokenizer)
    check_lengths(ids, rows, [len(w.input_ids) - len(r.input_ids) for w, r in zip(whole, rows, strict=True)], limit)
    return Samples(ids, whole)


# --- epochs -----------------------------------------------------------------------------------------------------------


class Validation(Observer):
    """After each epoch: the validation NLL, and the adapters kept in `work` until the best epoch is known."""

    def __init__(
        self,
        work: Path,
        writer: TrajectoryWriter,
        model: PeftModel,
        rows: Sequence[Encoded],
        per_epoch: int,
        pad_id: int,
    ):
        self.writer, self.model, self.rows, self.per_epoch, self.pad_id = writer, model, rows, per_epoch, pad_id
        self.path = work / "validation.json"
        self.nll: list[float] = read_json(self.path) if self.path.exists() else []

    def begin(self, step: int) -> None:
        epoch = step // self.per_epoch
        self.nll = self.nll[:epoch]
        self.writer.truncate(epoch)

    def after(self, step: int) -> None:
        epoch, rest = divmod(step, self.per_epoch)
        if rest:
            return
        nll = mean_nll(self.model, self.rows, VALIDATION_BATCH, self.pad_id)
        if not math.isfinite(nll):
            raise NonFiniteError(f"the validation NLL after epoch {epoch} (step {step}) is {nll}, must be finite")
        self.nll.append(nll)
        self.writer.append(epoch, adapter_state(self.model))
        write_json(self.path, self.nll)


def export_adapter(model: PeftModel, path: str, work: Path, folder: Path) -> None:
    """The adapters in peft's format; `path` is the base model's name as the user gave it, not where it was found."""
    save_adapter(model, work / "adapter")
    config = read_json(work / "adapter" / "adapter_config.json")
    config["base_model_name_or_path"] = path
    config["target_modules"] = sorted(config["target_modules"])  # a set: its order changes from process to process
    write_json(folder / "adapter_config.json", config)
    write_atomic(folder / "adapter_model.safetensors", (work / "adapter" / "adapter_model.safetensors").read_bytes())


def finish(stage: Stage, model: PeftModel, path: str, losses: list[float], validation: Validation) -> None:
    """Write the best epoch's adapters and the log."""
    nll, per_epoch = validation.nll, validation.per_epoch
    best = min(range(len(nll)), key=nll.__getitem__) + 1
    with TrajectoryStore(validation.writer.path) as trajectory:
        load_adapter_state(model, trajectory.read(best))
    export_adapter(model, path, stage.work, stage.folder / "adapter")
    train_loss = [math.fsum(losses[e * per_epoch : (e + 1) * per_epoch]) / per_epoch for e in range(len(nll))]
    epochs = [{"epoch": e + 1, "train_loss": train_loss[e], "validation_nll": nll[e]} for e in range(len(nll))]
    write_json(stage.folder / "log.json", {"epochs": epochs, "best_epoch": best, "steps_per_epoch": per_epoch})


def settings(model: ModelConfig, data: DataConfig, config: TuneConfig, epochs: int, seed: int) -> dict[str, Any]:
    return {
        "model": model_settings(model),
        "data": data_settings(data),
        "seed": seed,
        "tune": {"epochs": epochs, "batch": config.batch, "lr": config.lr},
    }


def run(
    folder: Path,
    model: ModelConfig,
    data: DataConfig,
    config: TuneConfig,
    train_set: Sequence[Example],
    validation: Sequence[Example],
    seed: int,
    *,
    epochs: int,
    prompts: Prompts = None,
    inputs: Mapping[str, str] | None = None,
    label: str,
) -> Path:
    """Tune fresh adapters on `train_set` and keep the best epoch. Returns `folder`.

    prompts: embeddings [n, k, D], or n texts; the i-th goes in front of train_set[i]. inputs: digests of what the
    samples and prompts came from. seed draws the adapters and the order of samples. label is for the progress bar.
    """
    check_batch("the set to tune on", len(train_set), "tune.batch", config.batch)
    if not validation:
        raise InputError("the validation split is empty: must have at least one sample, to choose the epoch by")
    per_epoch = steps_per_epoch(len(train_set), config.batch)
    if not (folder / "manifest.json").exists():  # bad input must be found before the folder is made
        base, tokenizer = load_model(model.path, model.dtype, model.device)
        embeddings: Any = base.get_input_embeddings()
        check_prompts(prompts, len(train_set), embeddings.weight.shape[1])
        samples = prepare(train_set, encode_set(train_set, tokenizer, data), prompts, tokenizer, max_positions(base))
        held_out = encode_set(validation, tokenizer, data)
        check_lengths([e.id for e in validation], held_out, [0] * len(held_out), max_positions(base))
        student = add_lora(base, model, seed)
    digests = {
        "model": model_digest(model.path),
        "train": digest(train_set),
        "validation": digest(validation),
        "prompts": prompt_digest(prompts),
    }
    with open_stage(folder, settings(model, data, config, epochs, seed), {**(inputs or {}), **digests}) as stage:
        if stage.finished:
            return folder
        pad_id = tokenizer.pad_token_id or 0
        with TrajectoryWriter(stage.work / "epochs.nacd") as writer:
            observer = Validation(stage.work, writer, student, held_out, per_epoch, pad_id)
            losses = train(
                student,
                samples,
                optimizer="adamw",
                lr=config.lr,
                batch=config.batch,
                steps=epochs * per_epoch,
                seed=seed,
                pad_id=pad_id,
                work=stage.work,
                label=f"tune {label}",
                observer=observer,
            )
        finish(stage, student, model.path, losses, observer)
    return folder


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["tune", *sys.argv[1:]]))
