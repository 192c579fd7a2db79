"""The whole job on a tiny model: every artifact is there, reused, and opened by other tools as it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nacd_fast import cli, load_distilled
from nacd_fast.artifacts import read_json
from nacd_fast.student import load_tokenizer
from tests.job import make_job
from tests.tiny import tree_digests


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run folder."""
    folder = tmp_path_factory.mktemp("job")
    recipe = make_job(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main(["distill", "--config", str(recipe)]) == 0
    return folder / "run"


def test_scores_has_a_row_for_every_method_and_seed(job: Path) -> None:
    scores = read_json(job / "scores.json")
    assert {(s["row"], s["seed"]) for s in scores} == {
        ("baseline", 0),
        ("transfer_baseline", 0),
        *(
            (row, seed)
            for row in ("full", "random", "nacd_embeddings", "nacd_decoded", "transfer_random", "transfer_nacd_decoded")
            for seed in (0, 1)
        ),
    }
    for s in scores:
        assert {"method", "fraction", "seed", "nll", "accuracy"} <= s.keys()
        assert s["nll_interval"][0] <= s["nll"] <= s["nll_interval"][1] and 0 <= s["accuracy"] <= 1
        assert s["fraction"] == {"baseline": 0.0, "full": 1.0}.get(s["method"], 5 / 16)


def test_the_distilled_set_is_of_the_kept_samples(job: Path) -> None:
    for seed in (0, 1):
        found = load_distilled(job / "distilled" / f"seed{seed}")
        assert found.prompts.shape == (len(found.samples), 2, 32) and len(found.samples) == 5
        special = set(load_tokenizer("demo").all_special_ids)
        assert not special & {i for ids in found.samples["prompt_ids"] for i in ids}
        assert (job / "selection" / f"seed{seed}" / "ids.txt").read_text().split() == list(found.samples["id"])
        made = found.made
        assert (made["selection"]["seed"], made["matching"]["seed"], made["experts"]["seed"]) == (seed, seed, 0)
    assert "| test | 5 | that of the source |" in (job / "distilled" / "seed0" / "README.md").read_text()


def test_seeds_differ_and_experts_are_shared(job: Path) -> None:
    prompts = [load_file(job / f"matching/seed{s}/prompts.safetensors")["prompts"] for s in (0, 1)]
    assert not torch.equal(*prompts)
    keys = [read_json(job / f"matching/seed{s}/config.json")["inputs"] for s in (0, 1)]
    assert keys[0]["expert0"] == keys[1]["expert0"] != keys[0]["expert1"]


def test_report_and_timing_are_there(job: Path) -> None:
    assert "<html" in (job / "report.html").read_text() and (job / "report.md").read_text()
    timing = read_json(job / "matching/seed0/timing.json")
    assert timing["seconds"] > 0 and timing["peak_bytes"] > 2**20


def test_a_second_run_reuses_everything(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nacd_fast import matching, training

    monkeypatch.chdir(job.parent)
    monkeypatch.setattr(matching, "prepare", None)
    monkeypatch.setattr(training, "train", None)
    stages = ("selection", "experts", "matching", "distilled", "tuned", "scores")
    before = {stage: tree_digests(job / stage) for stage in stages}
    assert cli.main(["distill", "--config", "recipe.yaml"]) == 0
    assert {stage: tree_digests(job / stage) for stage in stages} == before


def test_refused_settings_leave_the_runs_own_in_place(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(job.parent)
    before = tree_digests(job)
    assert cli.main(["distill", "--config", "recipe.yaml", "--match.beta", "0.5"]) == 2
    assert "config.match.beta=0.5, was 0.1" in capsys.readouterr().err
    assert tree_digests(job) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--transfer", "nowhere"], "nowhere: "),
        (["--transfer", "{bare}"], "no tokenizer"),
        (["--match.prompt_tokens", "7"], "k=56 prompt tokens"),
        (["--select.method", "ids", "--select.ids", "{few}"], "the kept set has 1 samples, fewer than match.batch=2"),
    ],
)
def test_what_would_fail_hours_later_is_refused_at_once(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(job.parent)
    bare, few = job.parent / "bare", job.parent / "few.txt"
    if not bare.exists():
        shutil.copytree(job.parent / "sibling", bare, ignore=shutil.ignore_patterns("token*"))
        few.write_text("x0-3\n")
    arguments = [text.format(bare=bare, few=few) for text in arguments]
    assert cli.main(["distill", "--config", "recipe.yaml", "--out", "other", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (job.parent / "other").exists()


def test_new_weights_in_the_models_folder_are_noticed(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(job.parent)
    path = job.parent / "model" / "model.safetensors"
    data = path.read_bytes()
    save_file({name: t + 1e-3 for name, t in load_file(path).items()}, path, {"format": "pt"})
    try:
        assert cli.main(["distill", "--config", "recipe.yaml"]) == 2
    finally:
        path.write_bytes(data)
    assert "inputs.model=" in capsys.readouterr().err


def test_a_changed_sample_makes_a_stage_refuse_its_old_result(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(job.parent)
    path = job.parent / "data" / "train.jsonl"
    text = path.read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    rows[0]["messages"][0]["content"] += " over"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    try:
        assert cli.main(["distill", "--config", "recipe.yaml"]) == 2
    finally:
        path.write_text(text)
    assert "made with other settings (inputs.examples=" in capsys.readouterr().err


def test_a_job_takes_any_selection_by_name(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """LESS on the student's own model; its warm-up and gradients stay beside the selections."""
    monkeypatch.chdir(job.parent)
    less = {"warmup_fraction": "1", "warmup_batch": "8", "warmup_epochs": "1", "dimensions": "64"}
    command = ["decode", "--config", "recipe.yaml", "--out", "by_less", "--seeds", "[1]", "--select.method", "less"]
    command += ["--select.target", str(job.parent / "data" / "validation.jsonl")]
    command += [part for name, value in less.items() for part in (f"--select.less.{name}", value)]
    assert cli.main(command) == 0
    run = job.parent / "by_less"
    kept = (run / "selection/seed1/ids.txt").read_text().split()
    assert len(kept) == 5 and kept == list(load_distilled(run / "distilled/seed1").samples["id"])
    assert kept != (job / "selection/seed1/ids.txt").read_text().split()
    stored = sorted(path.name.split("-")[0] for path in (run / "selection.store/seed1").iterdir())
    assert stored == ["pool", "target", "warmup"]
    before = tree_digests(run)
    assert cli.main(command) == 0 and tree_digests(run) == before
    assert cli.main([*command, "--select.less.dimensions", "128"]) == 2
    assert "config.less.dimensions=128, was 64" in capsys.readouterr().err
