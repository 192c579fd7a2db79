"""Limits are checked where a setting is made; the defaults are the paper's."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nacd_fast.config import (
    DataConfig,
    DqConfig,
    EvaluateConfig,
    ExpertConfig,
    LessConfig,
    MatchConfig,
    ModelConfig,
    RunConfig,
    SelectConfig,
    TuneConfig,
)
from nacd_fast.errors import InputError


def test_defaults_are_the_papers() -> None:
    """Section 4.1: N = 6, M = one epoch, S = 3000, k = 2, T^m = 2, beta = 100; batches 16, 8, 8; 5 %."""
    config = RunConfig()
    match = config.match
    assert (match.inner_steps, match.span_steps, match.iterations, match.prompt_tokens) == (6, 0, 3000, 2)
    assert (match.max_start_epoch, match.beta, match.prompt_init, match.update) == (2, 100, "mean", "sgd")
    assert (config.experts.batch, match.batch, config.tune.batch, config.select.fraction) == (16, 8, 8, 0.05)
    assert config.experts.snapshot_steps == 0  # every epoch


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(rank=0), "model.rank=0: must be from 1 to 256"),
        (lambda: ModelConfig(lora_alpha=0), "model.lora_alpha=0"),
        (lambda: ModelConfig(targets=()), "model.targets"),
        (lambda: DataConfig(max_tokens=7), "data.max_tokens=7: must be at least 8"),
        (
            lambda: DataConfig(train="mine.jsonl"),
            "data.validation='demo': must be given together with data.train='mine.jsonl', not the demo's",
        ),
        (lambda: DataConfig(train="a", validation="b"), "data.test='demo': must be given together with data.train='a'"),
        (lambda: DataConfig(test="c"), "data.train='demo': must be given together with data.test='c'"),
        (lambda: SelectConfig(fraction=1.1), "select.fraction=1.1"),
        (lambda: SelectConfig(method="ids"), "select.ids=''"),
        (lambda: SelectConfig(ids="x"), "select.ids='x'"),
        (lambda: ExpertConfig(count=0), "experts.count=0"),
        (lambda: ExpertConfig(epochs=0), "experts.epochs=0"),
        (lambda: ExpertConfig(batch=0), "experts.batch=0"),
        (lambda: ExpertConfig(lr=0), "experts.lr=0"),
        (lambda: ExpertConfig(snapshot_steps=-1), "experts.snapshot_steps=-1"),
        (lambda: ExpertConfig(max_steps=-1), "experts.max_steps=-1"),
        (lambda: MatchConfig(prompt_tokens=0), "match.prompt_tokens=0: must be at least 1"),
        (lambda: MatchConfig(span_steps=-1), "match.span_steps=-1"),
        (lambda: MatchConfig(retain_steps=-1), "match.retain_steps=-1"),
        (lambda: MatchConfig(prompt_lr=0), "match.prompt_lr=0"),
        (lambda: MatchConfig(alpha=11), r"match.alpha=11: must be in \(0, alpha_max=10.0\]"),
        (lambda: MatchConfig(alpha_lr=-1), "match.alpha_lr=-1"),
        (lambda: MatchConfig(beta=-1), "match.beta=-1"),
        (lambda: TuneConfig(epochs=0), "tune.epochs=0"),
        (lambda: TuneConfig(lr=0), "tune.lr=0"),
        (lambda: EvaluateConfig(batch=0), "evaluate.batch=0"),
        (lambda: EvaluateConfig(bootstrap=10), "evaluate.bootstrap=10"),
        (lambda: RunConfig(seeds=()), r"seeds=\(\)"),
        (lambda: RunConfig(seeds=(1, 1)), "without repetition"),
        (lambda: RunConfig(seeds=(0, -1)), r"seeds=\(0, -1\): must be from 0 to 2\*\*32 - 1 each"),
        (lambda: RunConfig(seeds=(2**32,)), r"seeds=\(4294967296,\): must be from 0"),
    ],
)
def test_limits_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_the_last_seed_is_allowed() -> None:
    assert RunConfig(seeds=(0, 2**32 - 1)).seeds[1] == 2**32 - 1


def test_one_file_is_not_two_splits(tmp_path: Path) -> None:
    path, other = tmp_path / "set.jsonl", tmp_path / "other.jsonl"
    path.touch()
    again = tmp_path / "again.jsonl"
    again.symlink_to(path)
    for same in (str(path), f"{tmp_path}/../{tmp_path.name}/set.jsonl", str(again)):
        with pytest.raises(InputError, match=r"data\.test='.*': must be another file than data\.train"):
            DataConfig(train=str(path), validation=str(other), test=same)
    DataConfig(train=str(path), validation=str(other), test=str(tmp_path))


def test_nothing_is_selected_for_the_test_split(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.jsonl" for name in ("train", "validation", "test")]
    paths[2].touch()
    data = DataConfig(train=str(paths[0]), validation=str(paths[1]), test=str(paths[2]))
    with pytest.raises(InputError, match=r"select\.target='.*': must be another file than data\.test"):
        RunConfig(data=data, select=SelectConfig(method="bm25", target=f"{tmp_path}/./test.jsonl"))
    RunConfig(data=data, select=SelectConfig(method="bm25", target=str(paths[1])))


@pytest.mark.parametrize(
    ("config", "values", "says"),
    [
        (LessConfig, {"dimensions": 100}, "less.dimensions=100: must be a multiple of 64"),
        (LessConfig, {"warmup_fraction": 0.0}, r"less.warmup_fraction=0.0: must be in \(0, 1\]"),
        (LessConfig, {"warmup_lr": 0.0}, "less.warmup_lr=0.0: must be positive"),
        (LessConfig, {"warmup_epochs": 0}, "less.warmup_epochs=0: must be at least 1"),
        (LessConfig, {"batch": 0}, "less.batch=0: must be at least 1"),
        (DqConfig, {"bins": 0}, "dq.bins=0: must be at least 1"),
        (DqConfig, {"bins": 9, "block": 8}, "dq.bins=9: must be at most block=8"),
    ],
)
def test_selection_limits(config: type, values: dict[str, float], says: str) -> None:
    with pytest.raises(InputError, match=says):
        config(**values)


def test_a_folder_or_a_hub_set_has_all_splits(tmp_path: Path) -> None:
    for source in (str(tmp_path), "org/set"):
        assert DataConfig(train=source, validation=source, test=source).test == source
