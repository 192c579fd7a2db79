"""kill -9, again and again, in every stage: the job still ends with the bytes of an uninterrupted run."""

import multiprocessing
import os
import signal
from pathlib import Path

import torch
from nacd_fast import cli

from tests.job import make_job
from tests.tiny import at_call, tree_digests

STAGES = ("selection", "experts", "matching", "distilled", "tuned", "scores")
WRITES = (2, 5, 9, 8, 7, 11)  # a process dies at its write of this number, then its successor at the next one's
MAX_PROCESSES = 60


def job_in(folder: Path, die_at: int | None) -> int:
    """Exit code of the job in a process of its own, killed at its atomic write number `die_at`."""
    def child() -> None:
        torch.set_num_threads(1)  # a forked OpenMP pool hangs
        os.chdir(folder)
        if die_at is not None:
            os.replace = at_call(die_at, os.replace)  # type: ignore[assignment]
        os._exit(cli.main(["evaluate", "--config", "recipe.yaml"]))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(240)
    assert process.exitcode is not None, "the job hangs"
    return process.exitcode


def stage_at_work(run: Path) -> str:
    """The stage whose folder is begun and not finished, the furthest one; empty between stages."""
    begun = [path.parent for path in run.rglob("config.json") if not (path.parent / "manifest.json").exists()]
    names = [path.relative_to(run).parts[0] for path in begun if path.relative_to(run).parts[0] in STAGES]
    return max(names, key=STAGES.index, default="")


def test_killed_in_every_stage_ends_with_the_same_bytes(tmp_path: Path) -> None:
    make_job(tmp_path)
    assert job_in(tmp_path, None) == 0
    whole = {stage: tree_digests(tmp_path / "run" / stage) for stage in STAGES} | {"scores.json": (tmp_path / "run/scores.json").read_bytes()}
    (tmp_path / "run").rename(tmp_path / "whole")

    died_in = []
    for attempt in range(MAX_PROCESSES):
        code = job_in(tmp_path, WRITES[attempt % len(WRITES)])
        if code == 0:
            break
        assert code == -signal.SIGKILL
        died_in.append(stage_at_work(tmp_path / "run"))
    assert code == 0, f"not done after {MAX_PROCESSES} processes"
    assert set(STAGES) <= set(died_in)
    cut = {stage: tree_digests(tmp_path / "run" / stage) for stage in STAGES} | {"scores.json": (tmp_path / "run/scores.json").read_bytes()}
    assert cut == whole
