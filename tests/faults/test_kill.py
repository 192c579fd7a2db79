"""kill -9 in every stage, one after the other: the job still ends with the bytes of an uninterrupted run."""

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch

from nacd_fast import cli
from tests.job import make_job
from tests.tiny import at_call, tree_digests

# a stage, and which of the files that it puts in place is never put there (counted from 0, over all its cells)
DEATHS = {"selection": 1, "experts": 5, "matching": 2, "distilled": 1, "tuned": 9, "scores": 1}


def job_in(folder: Path, stage: str = "", file: int = 0) -> int:
    """Exit code of the job in a process of its own, killed when it is about to put that file of `stage` in place."""
    plain = os.replace
    deadly = at_call(file, plain)

    def replace(src: Any, dst: Any, **options: Any) -> None:
        (deadly if stage and stage in Path(dst).parts else plain)(src, dst, **options)

    def child() -> None:
        torch.set_num_threads(1)  # a forked OpenMP pool hangs
        os.chdir(folder)
        os.replace = replace
        os._exit(cli.main(["evaluate", "--config", "recipe.yaml", "--seeds", "[0]", "--transfer", ""]))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "the job hangs"
    return process.exitcode


def results(run: Path) -> dict[str, str]:
    """Digests of everything but the timings."""
    return {name: digest for name, digest in tree_digests(run).items() if name != "config.yaml"}


def test_killed_in_every_stage_ends_with_the_same_bytes(tmp_path: Path) -> None:
    make_job(tmp_path)
    assert job_in(tmp_path) == 0
    run = tmp_path / "run"
    whole = results(run)
    run.rename(tmp_path / "whole")
    for stage, file in DEATHS.items():
        assert job_in(tmp_path, stage, file) == -signal.SIGKILL
        begun = [path.parent for path in (run / stage).rglob("config.json")]
        unfinished = [folder for folder in begun if not (folder / "manifest.json").exists()]
        assert len(unfinished) == 1, f"killed outside {stage}"
    assert job_in(tmp_path) == 0
    assert results(run) == whole
