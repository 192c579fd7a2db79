"""Tuning: prompts by both routes, the best epoch, adapters that peft reads, resume after kill -9, bad input."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from nacd_fast import store, training, tune
from nacd_fast.config import DataConfig, ModelConfig, TuneConfig
from nacd_fast.data import encode_set
from nacd_fast.errors import InputError, NonFiniteError
from nacd_fast.examples import Example
from nacd_fast.losses import mean_nll
from nacd_fast.student import adapter_state, load_model
from tests.tiny import POSITIONS, WIDTH, WORDS, at_call, kill_self, make_examples, make_model, run_killed, tree_digests

DATA = DataConfig(max_tokens=48)
CONFIG = TuneConfig(batch=4, lr=1e-2)
TRAIN, HELD_OUT = make_examples(10), make_examples(9, seed=1)  # 3 steps an epoch
EPOCHS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig(path=make_model(tmp_path_factory.mktemp("opt"), "opt"), rank=4, device="cpu")


def run(
    folder: Path,
    model: ModelConfig,
    prompts: Tensor | Sequence[str] | None = None,
    *,
    train: Sequence[Example] = TRAIN,
    validation: Sequence[Example] = HELD_OUT,
    data: DataConfig = DATA,
    **change: Any,
) -> Path:
    settings: dict[str, Any] = {"epochs": EPOCHS, "label": "test", **change}
    return tune.run(folder, model, data, CONFIG, train, validation, 0, prompts=prompts, **settings)


def some_prompts() -> Tensor:
    return 0.2 * torch.randn(len(TRAIN), 3, WIDTH, generator=torch.Generator().manual_seed(0))


def log(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "log.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> Path:
    """A run with prompts that nothing interrupted."""
    return run(tmp_path_factory.mktemp("whole") / "seed0", model, some_prompts())


def test_outputs(whole: Path, model: ModelConfig) -> None:
    assert {p.name for p in whole.iterdir()} == {"config.json", "manifest.json", "timing.json", "log.json", "adapter"}
    assert {p.name for p in (whole / "adapter").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    record = log(whole)
    assert record["steps_per_epoch"] == 3 and [e["epoch"] for e in record["epochs"]] == [1, 2, 3]
    nll = [e["validation_nll"] for e in record["epochs"]]
    assert record["best_epoch"] == nll.index(min(nll)) + 1

    base, tokenizer = load_model(model.path)
    tuned = PeftModel.from_pretrained(base, str(whole / "adapter"))
    rows = encode_set(HELD_OUT, tokenizer, DATA)
    assert mean_nll(tuned, rows, 32, 0) == pytest.approx(min(nll), abs=1e-6)


def test_the_adapter_names_the_model_as_it_was_given(
    tmp_path: Path, model: ModelConfig, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(model.path).parent)
    folder = run(tmp_path / "seed0", replace(model, path=Path(model.path).name), epochs=1)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == Path(model.path).name
    assert config["target_modules"] == sorted(config["target_modules"]) and config["inference_mode"] is True
    assert "/" not in json.dumps(config)


@pytest.mark.parametrize(("values", "best"), [([3.0, 1.0, 2.0], 2), ([2.0, 2.0, 3.0], 1), ([3.0, 2.0, 1.0], 3)])
def test_the_best_epoch_is_kept(
    tmp_path: Path, model: ModelConfig, values: list[float], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    states: list[dict[str, Tensor]] = []

    def judge(student: PeftModel, *args: Any) -> float:
        states.append(adapter_state(student))
        return values[len(states) - 1]

    monkeypatch.setattr(tune, "mean_nll", judge)
    folder = run(tmp_path / "seed0", model)
    assert log(folder)["best_epoch"] == best and len(states) == EPOCHS
    assert [e["validation_nll"] for e in log(folder)["epochs"]] == values
    kept = adapter_state(PeftModel.from_pretrained(load_model(model.path)[0], str(folder / "adapter")))
    assert all(torch.equal(value, states[best - 1][name]) for name, value in kept.items())


def test_epochs_are_what_the_caller_says(tmp_path: Path, model: ModelConfig) -> None:
    assert len(log(run(tmp_path / "seed0", model, epochs=5))["epochs"]) == 5 != CONFIG.epochs


# Prompts


def test_decoded_prompts_are_like_embeddings_of_their_tokens(tmp_path: Path, model: ModelConfig) -> None:
    base, tokenizer = load_model(model.path)
    pairs = {f" {a} {b}": tokenizer(f" {a} {b}", add_special_tokens=False)["input_ids"] for a in WORDS for b in WORDS}
    pairs = {text: row for text, row in pairs.items() if len(row) == 2}  # one length, for the tensor
    texts = [*pairs][: len(TRAIN)]
    ids = [pairs[text] for text in texts]
    assert len(texts) == len(TRAIN)
    table: Any = base.get_input_embeddings()
    embedded = run(tmp_path / "embedded", model, table(torch.tensor(ids)).detach())
    decoded = run(tmp_path / "decoded", model, texts)
    plain = run(tmp_path / "plain", model)
    assert tree_digests(embedded / "adapter") == tree_digests(decoded / "adapter") != tree_digests(plain / "adapter")
    assert log(embedded) == log(decoded) != log(plain)


def test_decoded_prompts_are_text(model: ModelConfig) -> None:
    tokenizer = load_model(model.path)[1]
    rows = encode_set(TRAIN[:3], tokenizer, DATA)
    special = tokenizer.eos_token
    longer = tune.put_in_front([f"a{special}b", "", "the"], rows, tokenizer)
    for new, row in zip(longer, rows, strict=True):
        k = len(new.input_ids) - len(row.input_ids)
        assert new.input_ids[k:] == row.input_ids and new.labels == [-100] * k + row.labels
        assert tokenizer.eos_token_id not in new.input_ids[:k]
    assert longer[1] == rows[1]


def test_each_prompt_goes_with_its_sample(tmp_path: Path, model: ModelConfig, whole: Path) -> None:
    folder = run(tmp_path / "seed0", model, some_prompts().flip(0))
    assert abs(log(folder)["epochs"][0]["train_loss"] - log(whole)["epochs"][0]["train_loss"]) > 1e-3


def test_validation_sees_no_prompts(tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def judge(student: PeftModel, rows: Any, *args: Any) -> float:
        seen.append(rows)
        return 1.0

    monkeypatch.setattr(tune, "mean_nll", judge)
    run(tmp_path / "seed0", model, ["the river"] * len(TRAIN), epochs=1)
    assert seen == [encode_set(HELD_OUT, load_model(model.path)[1], DATA)]


# Reused, or not


def test_a_finished_run_is_reused(whole: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "load_model", kill_self)
    before = tree_digests(whole)
    assert run(whole, model, some_prompts(), label="another name") == whole
    assert tree_digests(whole) == before
    changes: list[tuple[dict[str, Any], str]] = [
        ({"prompts": 2 * some_prompts()}, "inputs.prompts"),
        ({"prompts": None}, "inputs.prompts"),
        ({"prompts": ["a"] * 10}, "inputs.prompts"),
        ({"epochs": 2}, "config.tune.epochs=2, was 3"),
        ({"validation": HELD_OUT[1:]}, "inputs.validation"),
        ({"inputs": {"matching": "x"}}, "inputs.matching"),
    ]
    for change, what in changes:
        with pytest.raises(InputError, match="made with other settings") as caught:
            run(whole, model, **{"prompts": some_prompts(), **change})
        assert what in str(caught.value)


def test_another_model_in_the_same_folder(tmp_path: Path) -> None:
    model = ModelConfig(path=make_model(tmp_path / "model"), rank=4, device="cpu")
    folder = run(tmp_path / "seed0", model, epochs=1)
    make_model(tmp_path / "model", scale=0.1)
    with pytest.raises(InputError, match=r"made with other settings \(inputs.model="):
        run(folder, model, epochs=1)


# Killed and run again


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "in a step": lambda m: m.setattr(training, "make_optimizer", kill_in_step(7)),
    "in the validation": lambda m: m.setattr(tune, "mean_nll", at_call(1, mean_nll)),
    "between state and record of an epoch": lambda m: m.setattr(
        store.TrajectoryWriter, "append", after_call(1, store.TrajectoryWriter.append)
    ),
    "in a checkpoint": lambda m: m.setattr(training, "mark", at_call(5, training.mark)),
    "before the best is exported": lambda m: m.setattr(tune, "export_adapter", kill_self),
    "between adapter and log": lambda m: m.setattr(tune, "export_adapter", after_call(0, tune.export_adapter)),
}


def after_call(number: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, with kill -9 at the end of the call of that number (from 0)."""
    count = [number]

    def call(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        if count[0] == 0:
            kill_self()
        count[0] -= 1

    return call


def kill_in_step(number: int) -> Callable[..., Any]:
    """Kill between the gradient and the update."""
    make = training.make_optimizer

    def made(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = make(*args, **kwargs)
        optimizer.register_step_pre_hook(at_call(number, lambda *args: None))
        return optimizer

    return made


@pytest.mark.parametrize("place", KILLS)
def test_killed_and_run_again(
    tmp_path: Path, model: ModelConfig, whole: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "seed0"
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def work() -> None:
        with pytest.MonkeyPatch.context() as patch:
            KILLS[place](patch)
            run(folder, model, some_prompts())

    run_killed(work)
    assert not (folder / "manifest.json").exists() and training.checkpoints(folder / "work")
    run(folder, model, some_prompts())
    assert tree_digests(folder) == tree_digests(whole)


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": TRAIN[:3]}, "the set to tune on has 3 samples, fewer than tune.batch=4"),
        ({"validation": []}, "the validation split is empty"),
        ({"prompts": some_prompts()[:9]}, "9 prompts for 10 samples: must be one each"),
        ({"prompts": ["a"] * 11}, "11 prompts for 10 samples: must be one each"),
        ({"prompts": torch.zeros(10, 0, WIDTH)}, f"prompts of shape [10, 0, 32]: must be [10, k >= 1, {WIDTH}]"),
        ({"prompts": torch.zeros(10, 2, 48)}, f"prompts of shape [10, 2, 48]: must be [10, k >= 1, {WIDTH}]"),
        ({"prompts": torch.zeros(10, WIDTH)}, "prompts of shape [10, 32]"),
        ({"prompts": some_prompts().index_fill(0, torch.tensor([4]), torch.nan)}, "prompt 4 holds NaN or infinity"),
        ({"prompts": torch.zeros(10, POSITIONS, WIDTH)}, f"k={POSITIONS} prompt tokens and"),
        ({"prompts": ["a b c " * 60] * 10}, f"the model takes at most {POSITIONS} in all"),
        (
            {
                "validation": [
                    replace(
                        HELD_OUT[0],
                        id="long",
                        messages=(
                            {"role": "user", "content": "river " * 90},
                            {"role": "assistant", "content": "stone"},
                        ),
                    )
                ],
                "data": DataConfig(max_tokens=99),
            },
            "sample 'long': k=0 prompt tokens and 99 of its own",
        ),
    ],
)
def test_bad_input_leaves_nothing(tmp_path: Path, model: ModelConfig, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        run(tmp_path / "seed0", model, **change)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_validation_that_is_not_a_number(tmp_path: Path, model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([2.0, float("nan")])
    monkeypatch.setattr(tune, "mean_nll", lambda *args: next(values))
    with pytest.raises(NonFiniteError, match=r"the validation NLL after epoch 2 \(step 6\) is nan"):
        run(tmp_path / "seed0", model)
    assert not (tmp_path / "seed0" / "manifest.json").exists()
