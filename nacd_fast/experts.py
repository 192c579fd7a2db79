"""Experts: LoRA trained on the full set, whose weight trajectories are to be matched.

    <folder>/trajectory.nacd  a TrajectoryStore: the adapters at step 0, at each epoch's end, each snapshot_steps
    <folder>/schedule.json    {"steps_per_epoch", "total_steps", "losses": [of each step, before its update]}

Equation 2's theta^{t + M} against theta^t: snapshots are named by optimiser steps, so that spans can be shorter than an
epoch. At step 0 every B is 0, and A is drawn from the expert's seed.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel

from .artifacts import open_stage, write_json
from .config import DataConfig, ExpertConfig, ModelConfig
from .errors import InputError
from .examples import Example, digest
from .store import TrajectoryWriter
from .student import adapter_state, model_digest
from .training import Observer, check_batch, data_settings, fresh_student, model_settings, train
from .training import steps_per_epoch as steps_per_epoch  # of an expert, for the stages that read its trajectory

TRAJECTORY = "trajectory.nacd"  # in an expert's folder
SHOWN = 8  # steps in a message


class Snapshots(Observer):
    """Stores the adapters at the steps that are due."""

    def __init__(self, writer: TrajectoryWriter, model: PeftModel, periods: Sequence[int]):
        self.writer, self.model, self.periods = writer, model, periods

    def begin(self, step: int) -> None:
        """Raises InputError where a snapshot is missing that was made before the checkpoint at `step`."""
        stored, path = set(self.writer.steps), self.writer.path
        missing = [str(n) for n in range(step + 1) if step > 0 and self.due(n) and n not in stored]
        if missing:
            shown = ", ".join(missing[:SHOWN]) + (f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else "")
            raise InputError(
                f"{path}: no snapshots of steps {shown}, which were made before step {step}, where training would go "
                f"on: bring {path.name}.open back from where the folder was copied from, or delete {path.parent}"
            )
        self.writer.truncate(step if step > 0 else -1)
        if step == 0:
            self.writer.append(0, adapter_state(self.model))

    def after(self, step: int) -> None:
        if self.due(step):
            self.writer.append(step, adapter_state(self.model))

    def due(self, step: int) -> bool:
        return any(step % period == 0 for period in self.periods)


def total_steps(config: ExpertConfig, per_epoch: int) -> int:
    steps = config.epochs * per_epoch
    return min(steps, config.max_steps) if config.max_steps else steps


def settings(model: ModelConfig, data: DataConfig, config: ExpertConfig, seed: int) -> dict[str, Any]:
    """What determines the trajectory: neither the device nor the number of other experts does."""
    chosen = asdict(config)
    del chosen["count"]
    return {"model": model_settings(model), "data": data_settings(data), "experts": chosen, "seed": seed}


def run(
    folder: Path, model: ModelConfig, data: DataConfig, config: ExpertConfig, examples: Sequence[Example], seed: int
) -> Path:
    """Train one expert on `examples`; `seed` draws its adapters and its order of samples. Returns `folder`."""
    check_batch("the full set", len(examples), "experts.batch", config.batch)
    per_epoch = steps_per_epoch(len(examples), config.batch)
    steps = total_steps(config, per_epoch)
    if not (folder / "manifest.json").exists():  # bad input must be found before the folder is made
        student, samples, tokenizer = fresh_student(model, data, examples, seed)
    with open_stage(
        folder, settings(model, data, config, seed), {"train": digest(examples), "model": model_digest(model.path)}
    ) as stage:
        if stage.finished:
            return folder
        with TrajectoryWriter(folder / TRAJECTORY) as writer:
            periods = [per_epoch, *filter(None, [config.snapshot_steps])]
            losses = train(
                student,
                samples,
                optimizer=config.optimizer,
                lr=config.lr,
                batch=config.batch,
                steps=steps,
                seed=seed,
                pad_id=tokenizer.pad_token_id or 0,
                work=stage.work,
                label=f"expert {seed}",
                observer=Snapshots(writer, student, periods),
            )
        write_json(folder / "schedule.json", {"steps_per_epoch": per_epoch, "total_steps": steps, "losses": losses})
    return folder


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["experts", *sys.argv[1:]]))
