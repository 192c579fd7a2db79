"""First-order training of the adapters, for the experts and for the tuning, on transformers.Trainer.

The loss of a batch is the mean of -log p over its supervised tokens (equation 1's l). Optimiser: AdamW without weight
decay or plain SGD, constant learning rate, no warm-up, no clipping, no dropout: what `unroll.py` unrolls.

- *Order.* Which rows form step s is a function of (seed, s) alone, see `Batches`. The Trainer sees one epoch whose
  items are the batches of all of ours, so that going on at step s needs no random state.
- *Resume.* Every SAVE_SECONDS the Trainer writes a checkpoint below `work`; then a marker file with the SHA-256 of
  every file in it. A checkpoint that a kill tore, or that was changed, has no fitting marker and is deleted. The
  Trainer reads its .pt files with weights_only.
- *Non-finite numbers.* The loss and the gradient's norm are looked at in each step, before the update: one transfer
  from the device. The state before the bad step is saved as a checkpoint.

Sizes: D hidden, k prompt tokens, n samples.
"""

import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerControl, TrainerState

from .artifacts import file_digest, read_json, write_json
from .config import DataConfig, ModelConfig
from .data import Encoded, collate, encode_set
from .errors import InputError, NonFiniteError
from .examples import Example
from .losses import base_model, token_losses
from .progress import Bar, progress_bar
from .student import adapter_parameters, add_lora, load_model, max_positions

SAVE_SECONDS = 20.0  # between two resumable states
SHOW_SECONDS = 0.25  # between two updates of the progress bar: reading the peak memory costs as much as a tiny step
MARKER = "complete.json"

OptimizerName = Literal["adamw", "sgd"]


# --- what a stage's result depends on ---------------------------------------------------------------------------------


def model_settings(model: ModelConfig) -> dict[str, Any]:
    """All but the device: a result made on another one is as good."""
    return {name: value for name, value in asdict(model).items() if name != "device"}


def data_settings(data: DataConfig) -> dict[str, Any]:
    """How a sample becomes tokens; which samples there are is in their digest."""
    return {"template": data.template, "max_tokens": data.max_tokens}


# --- samples ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """n samples to train on; prompts [n, k, D] float32, or None, stand in front of the embedded rows."""

    ids: list[str]
    rows: list[Encoded]
    prompts: Tensor | None = None


def check_lengths(ids: Sequence[str], rows: Sequence[Encoded], k: Sequence[int], limit: int) -> None:
    """Raise InputError if a sample behind its k prompt tokens is longer than the model's `limit` positions."""
    for name, row, tokens in zip(ids, rows, k, strict=True):
        if tokens + len(row.input_ids) > limit:
            raise InputError(
                f"sample {name!r}: k={tokens} prompt tokens and {len(row.input_ids)} of its own, the "
                f"model takes at most {limit} in all; lower data.max_tokens"
            )


def fresh_student(
    model: ModelConfig, data: DataConfig, examples: Sequence[Example], seed: int
) -> tuple[PeftModel, Samples, PreTrainedTokenizerBase]:
    """A model with adapters drawn from `seed`, and the samples as its tokens. Raises InputError if one does not fit."""
    base, tokenizer = load_model(model.path, model.dtype, model.device)
    samples = Samples([e.id for e in examples], encode_set(examples, tokenizer, data))
    check_lengths(samples.ids, samples.rows, [0] * len(examples), max_positions(base))
    return add_lora(base, model, seed), samples, tokenizer


def check_batch(name: str, samples: int, setting: str, batch: int) -> None:
    """Raise InputError if a set is smaller than one batch."""
    if samples < batch:
        raise InputError(f"{name} has {samples} samples, fewer than {setting}={batch}: must fill one batch")


def steps_per_epoch(samples: int, batch: int) -> int:
    """Optimiser steps that take every sample once; the last batch may be smaller."""
    return math.ceil(samples / batch)


class Batches(Dataset):
    """The batches of a whole training, by step from 0. The last one of an epoch may be smaller.

    Epoch e takes the rows in the order that the generator of [seed, e] draws.
    """

    def __init__(self, samples: Samples, batch: int, steps: int, seed: int, pad_id: int):
        self.samples, self.batch, self.steps, self.seed, self.pad_id = samples, batch, steps, seed, pad_id
        self.per_epoch = steps_per_epoch(len(samples.rows), batch)
        self.epoch, self.order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.steps

    def indices(self, step: int) -> list[int]:
        """Rows of the batch of `step`."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self.order = np.random.default_rng([self.seed, epoch]).permutation(len(self.samples.rows))
        return self.order[place * self.batch : (place + 1) * self.batch].tolist()

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        indices = self.indices(step)
        tensors = collate([self.samples.rows[i] for i in indices], self.pad_id)
        if self.samples.prompts is not None:
            tensors["prompts"] = self.samples.prompts[indices]
        return tensors


# --- checkpoints ------------------------------------------------------------------------------------------------------


def mark(checkpoint: Path, losses: list[float]) -> None:
    """Declare a checkpoint whole."""
    digests = {p.name: file_digest(p) for p in sorted(checkpoint.iterdir())}
    write_json(checkpoint / MARKER, {"files": digests, "losses": losses})


def is_whole(checkpoint: Path) -> bool:
    try:
        files = read_json(checkpoint / MARKER)["files"]
        return all(file_digest(checkpoint / name) == digest for name, digest in files.items())
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return False


def checkpoints(work: Path) -> list[Path]:
    """Checkpoint folders below `work`, the latest first, whole or not."""
    return sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.removeprefix("checkpoint-")), reverse=True)


def last_checkpoint(work: Path) -> Path | None:
    """The latest whole checkpoint; all others are deleted."""
    last = next(filter(is_whole, checkpoints(work)), None)
    for path in checkpoints(work):
        if path != last:
            shutil.rmtree(path)
    return last


def save_adapter(model: PeftModel, folder: Path) -> None:
    """The adapters in peft's format, without asking the hub whether the base model has other embeddings."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


# --- the trainer ------------------------------------------------------------------------------------------------------


class Observer:
    """What a stage does beside the steps."""

    optimizer: torch.optim.Optimizer
    """The rule whose steps are made; `train` puts it here."""

    def begin(self, step: int) -> None:
        """Training starts at `step`: 0, or that of the checkpoint it goes on from. Later results must be dropped."""

    def after(self, step: int) -> None:
        """`step` steps have been made."""


class Follow(TrainerCallback):
    """Calls the observer, shows the progress, asks for checkpoints and marks them."""

    def __init__(self, observer: Observer, bar: Bar, losses: list[float]):
        self.observer, self.bar, self.losses = observer, bar, losses
        self.saved = self.shown = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.observer.after(state.global_step)
        now = time.monotonic()
        if now - self.shown >= SHOW_SECONDS or state.global_step == state.max_steps:
            self.bar.advance(state.global_step - self.bar.done, loss=self.losses[-1])
            self.shown = now
        if now - self.saved >= SAVE_SECONDS:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        work = Path(str(args.output_dir))
        mark(work / f"checkpoint-{state.global_step}", self.losses)
        for path in checkpoints(work)[1:]:
            shutil.rmtree(path)
        self.saved = time.monotonic()


class AdapterTrainer(Trainer):
    """Trainer with our loss and order, and without what costs more than a step of a tiny model."""

    def __init__(self, model: PeftModel, batches: Batches, losses: list[float], **kwargs: Any):
        super().__init__(model=model, train_dataset=batches, **kwargs)
        self.student, self.batches, self.losses = model, batches, losses
        self.base = base_model(model)
        self.parameters = list(adapter_parameters(model).values())
        self.model_accepts_loss_kwargs = False  # the loss is a mean already: no counting of tokens
        self.remove_callback(PrinterCallback)

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=1, collate_fn=lambda items: items[0])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        return token_losses(self.base, **inputs).mean()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One gradient, in eval mode. Raises NonFiniteError before anything is updated."""
        loss = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        loss = loss.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        numbers = torch.stack([loss, norm.to(loss)]).tolist()
        if not all(map(math.isfinite, numbers)):
            self.stop_at(*numbers)
        self.losses.append(numbers[0])
        return loss

    def stop_at(self, loss: float, norm: float) -> None:
        step = self.state.global_step
        kept = "no step was made before"
        if step > 0:
            self._save_checkpoint(self.student, trial=None)
            self.callback_handler.on_save(self.args, self.state, self.control)
            kept = f"the state before it is in {self.args.output_dir}/checkpoint-{step}"
        ids = [self.batches.samples.ids[i] for i in self.batches.indices(step)]
        raise NonFiniteError(
            f"step {step + 1}: loss {loss} and gradient norm {norm} must be finite; samples of the "
            f"batch: {', '.join(ids)}; {kept}"
        )

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # Trainer's count walks all modules in every step

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> None:
        return None  # Trainer would compute it a second time, only to log it

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        save_adapter(self.student, Path(str(output_dir or self.args.output_dir)))


def make_optimizer(name: OptimizerName, parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Fused kernels: PyTorch's default on CPUs goes parameter by parameter."""
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, fused=True)
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True)


def make_arguments(
    work: Path, device: torch.device, steps: int, seed: int, rise: int | None = None
) -> TrainingArguments:
    """One process, one device, nothing printed, nothing reported, nothing in the background.

    rise: the learning rate rises over so many steps and then falls to 0, both linearly; None: it is constant.
    """
    if device.type == "cuda" and device.index not in (None, 0):
        raise InputError(
            f"model.device={str(device)!r}: must be cuda:0, the only one that the Trainer uses; choose "
            "another GPU with CUDA_VISIBLE_DEVICES"
        )
    arguments = TrainingArguments(
        output_dir=str(work),
        use_cpu=device.type == "cpu",
        max_steps=steps,
        per_device_train_batch_size=1,
        seed=seed,
        lr_scheduler_type="constant" if rise is None else "linear",
        warmup_steps=rise or 0,
        max_grad_norm=0.0,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # else Trainer splits batches over all visible GPUs
    return arguments


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """On a GPU: kernels that give the same bits each time, where PyTorch has them."""
    before = torch.are_deterministic_algorithms_enabled()
    if device.type == "cuda":
        torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def train(
    model: PeftModel,
    samples: Samples,
    *,
    optimizer: OptimizerName,
    lr: float,
    batch: int,
    steps: int,
    seed: int,
    pad_id: int,
    work: Path,
    label: str,
    observer: Observer,
    rise: int | None = None,
) -> list[float]:
    """Make `steps` optimiser steps on the adapters, from the last checkpoint below `work` if there is one.

    Calls observer.begin once and observer.after after each step; the model then holds that step's adapters. Returns the
    loss of every step from the first, before its update. rise: as in `make_arguments`. Raises NonFiniteError with the
    step and the samples' ids.
    """
    checkpoint = last_checkpoint(work)
    losses: list[float] = read_json(checkpoint / MARKER)["losses"] if checkpoint else []
    arguments = make_arguments(work, model.device, steps, seed, rise)
    batches = Batches(samples, batch, steps, seed, pad_id)
    rule = make_optimizer(optimizer, list(adapter_parameters(model).values()), lr)
    observer.optimizer = rule
    observer.begin(len(losses))
    with progress_bar(label, steps, len(losses)) as bar, deterministic(model.device):
        trainer = AdapterTrainer(
            model, batches, losses, args=arguments, optimizers=(rule, None), callbacks=[Follow(observer, bar, losses)]
        )
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return losses
