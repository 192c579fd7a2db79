"""LESS (Xia et al., arXiv 2402.04333): the samples whose training steps lower the target's loss most.

    <store>/warmup/          checkpoint1.safetensors, ..: the adapters after each epoch, with Adam's moments
    <store>/pool/            the pool's features at every checkpoint (features.py)
    <store>/target-<name>/   the target's

With theta_i the i-th checkpoint and eta_i the mean learning rate of its epoch, as a share of the sum, the influence of
a sample z on a task (section 3, equation 4) is

    sum over i of eta_i mean over the task's samples z' of cos(S^T grad l(z', theta_i), S^T Gamma(z, theta_i))

where Gamma is the step that Adam would make next, m / (sqrt(v) + eps) of the moments with z's gradient taken in, each
corrected for its start as Adam does; S is a random projection. A sample's score is its influence on the task that it
helps most. The mean is of cosines, as in the authors' code; the paper's text has the cosine of the mean.

The warm-up and the pool's features serve any target; a finished one is reused. n samples, P adapter parameters.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, get_linear_schedule_with_warmup

from ..artifacts import folder_digest, open_stage, read_json, write_atomic, write_json
from ..config import LessConfig, SelectConfig
from ..data import Encoded, encode_set, pack
from ..examples import Example, digest
from ..progress import progress_bar
from ..student import Student, adapter_parameters, adapter_state, add_lora, load_model, max_positions, model_digest
from ..training import (
    Observer,
    check_batch,
    check_lengths,
    data_settings,
    fresh_student,
    model_settings,
    steps_per_epoch,
    train,
)
from .features import Features, Store
from .gradients import SampleGradients
from .method import Context, Selected, best, check_fit, kept_count, tasks
from .projection import Projection
from .random import draws

RISE = 0.03  # share of the warm-up's steps over which the learning rate rises
ROOM = 2**28  # gradients held at a time, in numbers: 1 GB in float32
SHARD = 256  # samples projected at a time, at most
CHUNK = 4096  # samples whose influence is computed at a time
MOMENTS = ("exp_avg", "exp_avg_sq")


def select(pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> Selected:
    """The samples with the largest influence on the target."""
    less, store = config.less, context.store
    warm_up(store / "warmup", pool, less, seed, context)
    find = Finder(store / "warmup", less, seed, context)
    at_pool = find.features(store / "pool", pool, adam=True, label="pool")
    aim = store / f"target-{digest(context.target)[:12]}"
    at_target = find.features(aim, context.target, adam=False, label="target")
    scores = influence(at_pool, at_target, list(tasks(context.target).values()), find.rates)
    return best(pool, scores, config.fraction)


def check(pool: Sequence[Example], config: LessConfig, context: Context) -> None:
    """The warm-up fills a batch; the model loads, its second derivatives' ops take it, and every sample fits it."""
    warm = kept_count(len(pool), config.warmup_fraction)
    check_batch("the warm-up's set", warm, "less.warmup_batch", config.warmup_batch)
    base, tokenizer = load_model(context.model.path, context.model.dtype, "cpu")
    check_fit([*pool, *context.target], base, tokenizer, context)
    Student(add_lora(base, context.model, seed=0))


# --- the warm-up ------------------------------------------------------------------------------------------------------


class Checkpoints(Observer):
    """Writes the adapters and Adam's moments after every epoch."""

    def __init__(self, folder: Path, model: Any, per_epoch: int):
        self.folder, self.model, self.per_epoch = folder, model, per_epoch

    def after(self, step: int) -> None:
        epoch, rest = divmod(step, self.per_epoch)
        if rest:
            return
        tensors = {f"adapter.{name}": t for name, t in adapter_state(self.model).items()}
        for name, parameter in adapter_parameters(self.model).items():
            state = self.optimizer.state[parameter]
            tensors |= {f"{moment}.{name}": state[moment].detach().float().cpu().contiguous() for moment in MOMENTS}
        write_atomic(self.folder / f"checkpoint{epoch}.safetensors", save(tensors))


def mean_rates(lr: float, steps: int, per_epoch: int) -> list[float]:
    """The mean learning rate of every epoch of the warm-up's schedule."""
    rule = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule = get_linear_schedule_with_warmup(rule, rise_steps(steps), steps)
    rates = []
    for _ in range(steps):
        rates.append(schedule.get_last_lr()[0])
        rule.step()
        schedule.step()
    return [math.fsum(rates[at : at + per_epoch]) / per_epoch for at in range(0, steps, per_epoch)]


def rise_steps(steps: int) -> int:
    return math.ceil(RISE * steps)


def warm_up(folder: Path, pool: Sequence[Example], config: LessConfig, seed: int, context: Context) -> None:
    """Train adapters on a few random samples of the pool."""
    kept = np.argsort(-draws(len(pool), seed), kind="stable")[: kept_count(len(pool), config.warmup_fraction)]
    subset = [pool[i] for i in np.sort(kept)]
    settings = {
        "model": model_settings(context.model),
        "data": data_settings(context.data),
        "warmup": {name: value for name, value in asdict(config).items() if name.startswith("warmup")},
        "seed": seed,
    }
    with open_stage(folder, settings, {"train": digest(subset), "model": model_digest(context.model.path)}) as stage:
        if stage.finished:
            return
        model, samples, tokenizer = fresh_student(context.model, context.data, subset, seed)
        per_epoch = steps_per_epoch(len(subset), config.warmup_batch)
        steps = config.warmup_epochs * per_epoch
        observer = Checkpoints(folder, model, per_epoch)
        losses = train(
            model,
            samples,
            optimizer="adamw",
            lr=config.warmup_lr,
            batch=config.warmup_batch,
            steps=steps,
            seed=seed,
            pad_id=tokenizer.pad_token_id or 0,
            work=stage.work,
            label="LESS warm-up",
            observer=observer,
            rise=rise_steps(steps),
        )
        rule = observer.optimizer.param_groups[0]
        adam = {"betas": list(rule["betas"]), "eps": rule["eps"]}
        rates = mean_rates(config.warmup_lr, steps, per_epoch)
        write_json(
            folder / "schedule.json", {"steps_per_epoch": per_epoch, "rates": rates, "adam": adam, "losses": losses}
        )


# --- the features -----------------------------------------------------------------------------------------------------


def adam_steps(gradients: Tensor, moments: Sequence[Tensor], adam: Mapping[str, Any], steps: int) -> Tensor:
    """In place: what Adam's step `steps` + 1 would be with each of gradients [B, P], over the learning rate."""
    (beta1, beta2), (first, second) = adam["betas"], moments
    for g in gradients:
        m = torch.lerp(first, g, 1 - beta1).div_(1 - beta1 ** (steps + 1))
        v = torch.lerp(second, g * g, 1 - beta2).div_(1 - beta2 ** (steps + 1))
        torch.div(m, v.sqrt_().add_(adam["eps"]), out=g)
    return gradients


class Loaded(NamedTuple):
    """The model with what makes features of it."""

    student: Student
    tokenizer: PreTrainedTokenizerBase
    gradients: SampleGradients
    project: Projection


class Finder:
    """Makes features at the checkpoints of a finished warm-up; the model loads when the first are missing."""

    def __init__(self, warmup: Path, config: LessConfig, seed: int, context: Context):
        self.warmup, self.config, self.seed, self.context = warmup, config, seed, context
        self.schedule = read_json(warmup / "schedule.json")
        self.rates: list[float] = self.schedule["rates"]

    @cached_property
    def model(self) -> Loaded:
        config = self.context.model
        base, tokenizer = load_model(config.path, config.dtype, config.device)
        student = Student(add_lora(base, config, self.seed))
        project = Projection(self.config.dimensions, self.seed, student.device)
        return Loaded(student, tokenizer, SampleGradients(student), project)

    def features(self, folder: Path, examples: Sequence[Example], *, adam: bool, label: str) -> Store:
        """Those of every checkpoint: of Adam's steps, or of the plain gradients."""
        store = Store(folder, len(examples), self.config.dimensions)
        settings = {
            "model": model_settings(self.context.model),
            "data": data_settings(self.context.data),
            "dimensions": self.config.dimensions,
            "batch": self.config.batch,
            "adam": adam,
            "seed": self.seed,
        }
        inputs = {"examples": digest(examples), "warmup": folder_digest(self.warmup)}
        with open_stage(folder, settings, inputs) as stage:
            if stage.finished:
                return store
            student = self.model.student
            rows, ids = encode_set(examples, self.model.tokenizer, self.context.data), [e.id for e in examples]
            check_lengths(ids, rows, [0] * len(rows), max_positions(student.base))
            shard = max(1, min(SHARD, ROOM // sum(shape.numel() for shape in student.shapes.values())))
            with progress_bar(f"LESS {label}", len(rows) * len(self.rates)) as bar:
                for number in range(1, len(self.rates) + 1):
                    store.fill(stage, number, ids, shard, self.at_checkpoint(number, rows, adam), bar)
        return store

    def at_checkpoint(self, number: int, rows: Sequence[Encoded], adam: bool) -> Features:
        """(start, stop) -> features of those samples, at one checkpoint."""
        student, _, gradients, project = self.model
        tensors = load_file(self.warmup / f"checkpoint{number}.safetensors")
        theta, *moments = (student.flatten(named(tensors, kind)) for kind in ("adapter", *MOMENTS))

        def features(start: int, stop: int) -> Tensor:
            out = theta.new_empty(stop - start, len(theta))
            for at in range(start, stop, self.config.batch):
                end = min(stop, at + self.config.batch)
                batch = pack(rows[at:end], 0).to(student.device)
                gradients(theta, batch, out[at - start : end - start])
            if adam:
                adam_steps(out, moments, self.schedule["adam"], number * self.schedule["steps_per_epoch"])
            return project(out)

        return features


def named(tensors: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Those of one kind of a checkpoint, by their parameters' names."""
    return {name.removeprefix(kind + "."): t for name, t in tensors.items() if name.startswith(kind + ".")}


# --- the influence ----------------------------------------------------------------------------------------------------


def influence(pool: Store, target: Store, tasks: Sequence[Sequence[int]], rates: Sequence[float]) -> np.ndarray:
    """Of every sample of the pool on the task that it helps most, float64 [n]."""
    total = torch.zeros(pool.n, len(tasks), dtype=torch.float64)
    for number, rate in enumerate(rates, 1):
        aims = target.unit_rows(number, 0, target.n)
        means = torch.stack([aims[list(places)].mean(0) for places in tasks], 1)
        for start in range(0, pool.n, CHUNK):
            stop = min(pool.n, start + CHUNK)
            total[start:stop] += rate / math.fsum(rates) * (pool.unit_rows(number, start, stop) @ means).double()
    return total.amax(1).numpy()
