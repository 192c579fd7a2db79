"""The command line: settings, help, the plan, and what bad input gets: one sentence, status 2, nothing written."""

import errno
import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import nacd_fast
from nacd_fast import cli
from nacd_fast.config import RunConfig, SelectionConfig, TransferConfig
from tests.job import make_job
from tests.tiny import tree_digests


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(tmp_path_factory.mktemp("job"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edited(recipe: Path, here: Path, find: str, put: str) -> str:
    """The recipe with one piece replaced, as a new file outside the working folder's view of outputs."""
    text = recipe.read_text()
    assert find in text
    path = here.parent / f"{here.name}.yaml"
    path.write_text(text.replace(find, put))
    return str(path)


def data_with(recipe: Path, here: Path, lines: list[str]) -> str:
    """The recipe on a training file of these lines."""
    data = here.parent / f"{here.name}-data"
    shutil.copytree(recipe.parent / "data", data)
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    return edited(recipe, here, str(recipe.parent / "data"), str(data))


def refused(arguments: list[str], here: Path, capsys: pytest.CaptureFixture) -> str:
    """The one sentence on stderr of a command that must fail with status 2 and write nothing."""
    before = sorted(here.rglob("*")), tree_digests(here)
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("nacd: ")]
    assert len(lines) == 1 and "Traceback" not in captured.err
    assert (sorted(here.rglob("*")), tree_digests(here)) == before
    return lines[0]


GOOD = json.dumps({"prompt": "why is it", "completion": "a dog"})


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"prompt": "the", '], "line 2: malformed JSON"),
        ([GOOD, GOOD, json.dumps({"prompt": "the", "completion": " "})], "line 3"),
        ([GOOD, GOOD.replace("dog", "cat")], "the full set has 2 samples, fewer than experts.batch=4"),
        ([GOOD, GOOD], "the full set has 1 samples, fewer than experts.batch=4"),  # a copy counts once
        ([json.dumps({"question": "the"})], "line 1"),
    ],
)
def test_bad_data(recipe: Path, here: Path, capsys: pytest.CaptureFixture, lines: list[str], message: str) -> None:
    assert message in refused(["distill", "--config", data_with(recipe, here, lines)], here, capsys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--match.prompt_tokens", "0"], "match.prompt_tokens=0: must be at least 1"),
        (
            ["--match.max_start_epoch", "2"],
            "match.max_start_epoch=2 with a span of 2 steps reaches step 6, beyond the experts' last snapshot at 4",
        ),
        (["--match.prompt_tokens", "60"], "k=60 prompt tokens"),
        (["--match.batch", "6"], "fewer than match.batch=6"),
        (["--select.fraction", "0"], "select.fraction=0.0: must be in (0, 1]"),
        (["--data.train", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
        (["--model.path", "nowhere"], "nowhere: "),
        (["--model.targets", "[none]"], "has none of these linear layers"),
        (["--match.inner_step", "3"], "inner_step"),
        (["--match.inner_steps", "three"], "match.inner_steps"),
        (["--experts.optimizer", "lion"], "experts.optimizer"),
        (["--seeds", "[1, 1]"], "without repetition"),
        (["--seeds", "[-1]"], "seeds=(-1,): must be from 0 to 2**32 - 1 each"),
        (["--data.validation", "demo"], "data.validation='demo': must be given together with data.train='"),
        (["--model.device", "gpu"], "model.device='gpu': must be one of auto, cpu"),
    ],
)
def test_bad_settings(
    recipe: Path, here: Path, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    assert message in refused(["distill", "--config", str(recipe), *arguments], here, capsys)


def test_unknown_field_in_the_config(recipe: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    assert "iteration" in refused(
        ["distill", "--config", edited(recipe, here, "iterations: 6", "iteration: 6")], here, capsys
    )


def test_only_the_training_set_is_given(here: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in ([], ["--config", "demo"], ["--config=demo"]):
        message = refused(["distill", *arguments, "--data.train", "mine.jsonl"], here, capsys)
        assert "data.validation='demo': must be given together with data.train='mine.jsonl'" in message


def test_one_file_for_two_splits(recipe: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    path = str(recipe.parent / "data/test.jsonl")
    arguments = ["--config", str(recipe), "--data.train", path, "--data.validation", path]
    assert "must be another file than data.train" in refused(["distill", *arguments], here, capsys)


@pytest.mark.parametrize("arguments", [["--config", "demo"], ["--config=demo"]])
def test_a_recipe_is_found_by_its_name(arguments: list[str]) -> None:
    config, _, _ = cli.parse("distill", [*arguments, "--match.iterations", "7"])
    assert isinstance(config, RunConfig)
    assert (config.match.iterations, config.match.span_steps) == (7, 24)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"out: run\n# \xff", "not UTF-8 (invalid start byte at byte 11)"),
        (b"seeds: [1", "malformed YAML (while parsing a flow sequence"),
        (b"out: a: b", "malformed YAML (mapping values are not allowed here"),
        (b"out: \x00", "malformed YAML (unacceptable character"),
        (b"", "must hold settings by name, not NoneType"),
        (b"- 1", "must hold settings by name, not list"),
        (b"data: mine.jsonl", "data='mine.jsonl': must be settings by name"),
        (b"data:", "data=None: must be settings by name"),
    ],
)
def test_a_broken_recipe(content: bytes, message: str, here: Path, capsys: pytest.CaptureFixture) -> None:
    Path("mine.yaml").write_bytes(content)
    assert f"nacd: mine.yaml: {message}" in refused(["distill", "--config", "mine.yaml"], here, capsys)


def test_report_of_a_folder_without_scores(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert "no scores.json" in refused(["report", "--out", "empty"], here, capsys)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # runpy: they are imported already
@pytest.mark.parametrize(
    "module", ["selection", "experts", "matching", "decode", "tune", "evaluate", "report", "distill", "transfer"]
)
def test_every_stage_runs_as_a_module(
    module: str, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--config", "nope"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"nacd_fast.{module}", run_name="__main__")
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("nacd: --config nope: no such file")


def test_unknown_recipe(here: Path, capsys: pytest.CaptureFixture) -> None:
    assert "no recipe of that name (recipes: " in refused(["distill", "--config", "nope"], here, capsys)


def test_model_without_a_tokenizer(recipe: Path, here: Path, capsys: pytest.CaptureFixture) -> None:
    bare = here.parent / f"{here.name}-bare"
    shutil.copytree(recipe.parent / "model", bare)
    for path in bare.glob("token*"):
        path.unlink()
    assert f"{bare}: no tokenizer" in refused(
        ["distill", "--config", str(recipe), "--model.path", str(bare)], here, capsys
    )


def test_non_finite_loss_stops_and_keeps_the_last_good_state(
    recipe: Path, here: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["experts", "--config", str(recipe), "--experts.lr", "1e30"]) == 2
    error = capsys.readouterr().err
    assert "nacd: step 2: loss nan" in error and "samples of the batch: x0-" in error
    assert not (here / "run/experts/expert0/manifest.json").exists()
    assert list((here / "run/experts/expert0/work").glob("checkpoint-1/adapter_model.safetensors"))


def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    recipe: Path, here: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = os.fsync

    def full(file: int) -> None:
        if list(here.glob("run/selection/seed1/config.json*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert cli.main(["experts", "--config", str(recipe)]) == 2
    error = capsys.readouterr().err
    assert error == "nacd: experts: No space left on device\n"
    assert (here / "run/selection/seed0/manifest.json").exists()
    assert cli.main(["experts", "--config", str(recipe)]) == 0
    assert (here / "run/selection/seed1/manifest.json").exists()


def test_other_settings_in_a_finished_folder_are_refused(
    recipe: Path, here: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["experts", "--config", str(recipe)]) == 0
    message = refused(["experts", "--config", str(recipe), "--select.fraction", "0.5"], here, capsys)
    assert "made with other settings (config.fraction=0.5, was 0.3)" in message


def leaf_names(cls: Any, prefix: str = "") -> list[str]:
    found = []
    for field in fields(cls):
        if is_dataclass(field.type):
            found += leaf_names(field.type, f"{prefix}{field.name}.")
        else:
            found.append(prefix + field.name)
    return found


@pytest.mark.parametrize(
    ("module", "settings", "meaning"),
    [
        ("distill", RunConfig, "S, updates of the prompts. (type: int, default: 3000)"),
        ("selection", SelectionConfig, "Features a gradient is projected to. (type: int, default: 8192)"),
        ("transfer", TransferConfig, "Draws the adapters and the order of the samples. (type: int, default: 0)"),
    ],
)
def test_help_shows_every_field_with_its_meaning_and_default(module: str, settings: type, meaning: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", f"nacd_fast.{module}", "--help"], capture_output=True, text=True, check=True
    )
    text = " ".join(done.stdout.split())
    for name in leaf_names(settings):
        assert f"--{name} " in text
    assert meaning in text and text.count("type: ") >= len(leaf_names(settings))


def test_importing_the_command_line_loads_no_torch() -> None:
    code = "import sys, nacd_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_dry_run_prints_the_resolved_settings_and_the_plan(
    recipe: Path, here: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.main(["distill", "--config", str(recipe), "--match.inner_steps", "3", "--dry-run"]) == 0
    settings, plan = capsys.readouterr().out.split("\n\n", 1)
    assert yaml.safe_load(settings)["match"]["inner_steps"] == 3
    assert "full set 16 samples, kept 5" in plan and "S = 6 iterations of N = 3 steps of 2 each" in plan
    assert not list(here.iterdir())


def test_version(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"nacd {nacd_fast.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["disti"]])
def test_without_a_command_it_says_how_to_call_it(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(arguments) == 2
    assert "usage: nacd COMMAND" in capsys.readouterr().err
