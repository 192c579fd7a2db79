"""Experts: which steps are kept, what the schedule says, resume after kill -9, bad input."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nacd_fast import experts, losses, store, training
from nacd_fast.config import DataConfig, ExpertConfig, ModelConfig
from nacd_fast.errors import InputError, NonFiniteError
from nacd_fast.examples import Example
from nacd_fast.store import TrajectoryStore
from nacd_fast.student import adapter_state, add_lora, load_model
from tests.tiny import POSITIONS, at_call, kill_self, make_examples, make_model, run_killed, tree_digests

DATA = DataConfig(max_tokens=48)
CONFIG = ExpertConfig(epochs=3, batch=4, lr=1e-2, snapshot_steps=4)
EXAMPLES = make_examples(22)  # 6 steps an epoch, the last one of 2 samples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=make_model(tmp_path_factory.mktemp("llama")), rank=4, device="cpu")


def run(
    folder: Path,
    model: ModelConfig,
    config: ExpertConfig = CONFIG,
    examples: list[Example] = EXAMPLES,
    seed: int = 0,
    data: DataConfig = DATA,
) -> Path:
    return experts.run(folder, model, data, config, examples, seed)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> Path:
    """An expert that nothing interrupted."""
    return run(tmp_path_factory.mktemp("whole") / "expert0", model)


def test_outputs(whole: Path, model: ModelConfig) -> None:
    trajectory = TrajectoryStore(whole / experts.TRAJECTORY)
    assert trajectory.steps == [0, 4, 6, 8, 12, 16, 18]
    schedule = json.loads((whole / "schedule.json").read_text())
    assert schedule["steps_per_epoch"] == 6 and schedule["total_steps"] == 18 and len(schedule["losses"]) == 18
    assert sum(schedule["losses"][-6:]) < sum(schedule["losses"][:6])
    names = {p.name for p in whole.iterdir()}
    assert names == {"config.json", "manifest.json", "schedule.json", "timing.json", "trajectory.nacd"}
    initial = adapter_state(add_lora(load_model(model.path)[0], model, seed=0))
    for name, value in trajectory.read(0).items():
        assert torch.equal(value, initial[name])
        assert ".lora_B." not in name or not value.any()
    assert any(value.any() for name, value in trajectory.read(4).items() if ".lora_B." in name)


@pytest.mark.parametrize(
    ("change", "steps", "total"),
    [
        ({"snapshot_steps": 0}, [0, 6, 12, 18], 18),
        ({"max_steps": 9}, [0, 4, 6, 8], 9),
        ({"max_steps": 99, "epochs": 1, "snapshot_steps": 5}, [0, 5, 6], 6),
        ({"optimizer": "sgd", "max_steps": 4}, [0, 4], 4),
    ],
)
def test_schedule(tmp_path: Path, model: ModelConfig, change: dict[str, Any], steps: list[int], total: int) -> None:
    folder = run(tmp_path / "expert0", model, replace(CONFIG, **change))
    assert TrajectoryStore(folder / experts.TRAJECTORY).steps == steps
    assert json.loads((folder / "schedule.json").read_text())["total_steps"] == total


def test_max_steps_is_a_prefix_and_seeds_differ(tmp_path: Path, model: ModelConfig, whole: Path) -> None:
    short = run(tmp_path / "short", model, replace(CONFIG, max_steps=6))
    other = run(tmp_path / "other", model, replace(CONFIG, max_steps=6), seed=1)
    states = [TrajectoryStore(folder / experts.TRAJECTORY).read_pair(0, 6) for folder in (whole, short, other)]
    for i in (0, 1):
        assert all(torch.equal(value, states[1][i][name]) for name, value in states[0][i].items())
        assert not all(torch.equal(value, states[2][i][name]) for name, value in states[0][i].items())


def test_a_finished_expert_is_reused(whole: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "fresh_student", kill_self)
    before = tree_digests(whole)
    assert run(whole, replace(model, device="cuda"), replace(CONFIG, count=5)) == whole  # these change nothing in it
    assert tree_digests(whole) == before
    with pytest.raises(InputError, match=r"made with other settings \(config.experts.lr=0.5, was 0.01\)"):
        run(whole, model, replace(CONFIG, lr=0.5))
    with pytest.raises(InputError, match=r"made with other settings \(inputs.train="):
        run(whole, model, examples=EXAMPLES[:-1])


def test_another_model_in_the_same_folder(tmp_path: Path) -> None:
    model = ModelConfig(path=make_model(tmp_path / "model"), rank=4, device="cpu")
    folder = run(tmp_path / "expert0", model, replace(CONFIG, max_steps=1))
    make_model(tmp_path / "model", scale=0.1)
    with pytest.raises(InputError, match=r"made with other settings \(inputs.model="):
        run(folder, model, replace(CONFIG, max_steps=1))


def test_steps() -> None:
    assert [experts.steps_per_epoch(samples, 4) for samples in (4, 5, 8)] == [1, 2, 2]
    assert [experts.total_steps(replace(CONFIG, max_steps=most), 6) for most in (0, 9, 99)] == [18, 9, 18]


# Killed and run again


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in a step": lambda m: m.setattr(
        training, "token_losses", at_call(random.Random(0).randrange(2, 18), losses.token_losses)
    ),
    "after a snapshot": lambda m: m.setattr(experts.Snapshots, "after", after_snapshot(experts.Snapshots.after, 8)),
    "in a snapshot": lambda m: m.setattr(store.writer, "write_frame", at_call(4, store.writer.write_frame)),
    "in a checkpoint": lambda m: m.setattr(training, "mark", at_call(10, training.mark)),
    "between model and optimizer": lambda m: m.setattr(
        training.AdapterTrainer,
        "_save_optimizer_and_scheduler",
        at_call(8, training.AdapterTrainer._save_optimizer_and_scheduler),
    ),
    "at the start": lambda m: m.setattr(training, "make_optimizer", kill_self),
    "at the end": lambda m: m.setattr(experts, "write_json", kill_self),
}


def after_snapshot(function: Callable[..., Any], step: int) -> Callable[..., Any]:
    def after(self: experts.Snapshots, now: int) -> None:
        function(self, now)
        if now == step:
            kill_self()

    return after


@pytest.mark.parametrize(
    ("place", "every"), [*((place, 0.0) for place in KILLS), ("in a step", 20.0), ("at the end", 20.0)]
)
def test_killed_and_run_again(
    tmp_path: Path, model: ModelConfig, whole: Path, place: str, every: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "expert0"
    monkeypatch.setattr(training, "SAVE_SECONDS", every)

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            KILLS[place](patch)
            run(folder, model)

    run_killed(work)
    assert not (folder / "manifest.json").exists()
    assert bool(training.checkpoints(folder / "work")) == (every == 0.0 and place != "at the start")
    run(folder, model)
    assert tree_digests(folder) == tree_digests(whole)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": EXAMPLES[:3]}, "the full set has 3 samples, fewer than experts.batch=4"),
        (
            {
                "examples": [
                    *EXAMPLES[:5],
                    replace(
                        EXAMPLES[5],
                        id="long",
                        messages=(
                            {"role": "user", "content": "river " * 90},
                            {"role": "assistant", "content": "stone"},
                        ),
                    ),
                ],
                "data": DataConfig(max_tokens=POSITIONS + 9),
            },
            f"sample 'long': k=0 prompt tokens and {POSITIONS + 9} of its own, the model takes at most {POSITIONS} in",
        ),
    ],
)
def test_bad_input_leaves_nothing(tmp_path: Path, model: ModelConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(tmp_path / "expert0", model, **change)
    assert message in str(caught.value)
    assert not (tmp_path / "expert0").exists()


def test_a_resume_without_its_open_snapshots(
    tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "expert0"
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            KILLS["after a snapshot"](patch)
            run(folder, model)

    run_killed(work)
    (folder / "trajectory.nacd.open").unlink()  # as if the folder had been copied without it
    before = tree_digests(folder / "work")
    with pytest.raises(InputError) as caught:
        run(folder, model)
    assert str(caught.value) == (
        f"{folder}/trajectory.nacd: no snapshots of steps 0, 4, 6, which were made before step 7, where training would "
        f"go on: bring trajectory.nacd.open back from where the folder was copied from, or delete {folder}"
    )
    assert tree_digests(folder / "work") == before


def test_a_rate_that_blows_up(tmp_path: Path, model: ModelConfig) -> None:
    config = replace(CONFIG, optimizer="sgd", lr=1e30)
    with pytest.raises(NonFiniteError, match=r"^step 2: loss nan.*samples of the batch: x0-\d+, .*checkpoint-1$"):
        run(tmp_path / "expert0", model, config)
    assert not (tmp_path / "expert0" / "manifest.json").exists()
    assert training.last_checkpoint(tmp_path / "expert0" / "work") is not None
