"""The whole job: data -> selection -> experts -> matching -> decode -> tune -> evaluate -> report, in one run folder.

    config.yaml             the settings
    selection/seed0/        the kept samples (and selection.store/, what LESS keeps)
    experts/expert0/        trajectories on the full set, shared by all seeds
    matching/seed0/         prompts and alpha, with the curve
    distilled/seed0/        the product: prompts, their nearest tokens and the samples
    tuned/<row>/seed0/      adapters trained on each row of the comparison
    scores/<row>/seed0/     their scores on the test split
    scores.json             one entry a row and seed
    report.html, report.md

A finished stage is reused, an unfinished one resumes. `python -m nacd_fast.distill --help` shows every setting.
"""

import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from peft import PeftModel

from . import distilled, evaluate, experts, matching, report, tune
from .artifacts import folder_digest, write_atomic, write_json
from .config import ModelConfig, RunConfig, SelectionConfig, TransferConfig
from .data import encode_set
from .examples import Example, without_copies
from .forms import read_set
from .selection import check as check_selection
from .selection import ids
from .selection import stage as selection
from .selection.method import Context, kept_count
from .student import Student, add_lora, load_model, max_positions, resolve_device
from .training import check_batch, check_lengths

STAGES = ("select", "experts", "match", "decode", "tune", "evaluate", "report")
SETTINGS = "config.yaml"
TRANSFER_GROWTH = 8  # positions kept free for a decoded token in another tokenizer


@dataclass(frozen=True)
class Row:
    """One line of the comparison: what is trained, and what it is trained on."""

    name: str
    transfer: bool = False  # on the transfer model
    train: str | None = None  # None: the base as it is; "full" or "kept" samples
    prompts: str | None = None  # "embeddings" or "decoded", in front of the kept samples


ROWS = (
    Row("baseline"),
    Row("full", train="full"),
    Row("random", train="kept"),
    Row("nacd_embeddings", train="kept", prompts="embeddings"),
    Row("nacd_decoded", train="kept", prompts="decoded"),
    Row("transfer_baseline", transfer=True),
    Row("transfer_random", transfer=True, train="kept"),
    Row("transfer_nacd_decoded", transfer=True, train="kept", prompts="decoded"),
)


def to_yaml(config: RunConfig | SelectionConfig | TransferConfig) -> str:
    """The settings as a recipe file."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    return yaml.safe_dump(plain(asdict(config)), sort_keys=False, allow_unicode=True)


class Job:
    """A run folder and its stages, each a method that does what is left to do."""

    def __init__(self, config: RunConfig):
        self.config, self.out = config, Path(config.out)
        self.full, self.validation, self.test = (
            read_set(source, split, skip_empty=config.data.skip_empty)
            for source, split in (
                (config.data.train, "train"),
                (config.data.validation, "validation"),
                (config.data.test, "test"),
            )
        )
        if config.data.deduplicate:
            self.full = without_copies(self.full)
        aim = config.select
        self.target = read_set(aim.target, aim.target_split) if aim.target else []
        self.rows = [row for row in ROWS if config.transfer or not row.transfer]
        self.kept: dict[int, list[Example]] = {}

    def cells(self) -> list[tuple[Row, int]]:
        """Rows and seeds; an untrained model has no seed but the first."""
        return [
            (row, seed) for row in self.rows for seed in (self.config.seeds if row.train else self.config.seeds[:1])
        ]

    def folder(self, stage: str, seed: int, row: str = "") -> Path:
        return self.out / stage / row / f"seed{seed}"

    def expert_folders(self) -> list[Path]:
        return [self.out / "experts" / f"expert{i}" for i in range(self.config.experts.count)]

    def model(self, row: Row) -> ModelConfig:
        return replace(self.config.model, path=self.config.transfer) if row.transfer else self.config.model

    def select(self) -> None:
        for seed in self.config.seeds:
            folder = self.folder("selection", seed)
            ids = set(selection.run(folder, self.full, self.config.select, seed, self.context(seed)))
            self.kept[seed] = [example for example in self.full if example.id in ids]

    def context(self, seed: int) -> Context:
        """What selection needs beside the full set."""
        model = replace(self.config.model, path=self.config.select.model or self.config.model.path)
        return Context(self.target, model, self.config.data, self.folder("selection.store", seed))

    def experts(self) -> None:
        for seed, folder in enumerate(self.expert_folders()):
            experts.run(folder, self.config.model, self.config.data, self.config.experts, self.full, seed)

    def match(self) -> None:
        for seed in self.config.seeds:
            matching.run(
                self.folder("matching", seed),
                self.config.model,
                self.config.data,
                self.config.match,
                self.kept[seed],
                self.expert_folders(),
                seed,
            )

    def decode(self) -> None:
        for seed in self.config.seeds:
            matched = self.folder("matching", seed)
            stages = {
                "selection": self.folder("selection", seed),
                "experts": self.expert_folders()[0],
                "matching": matched,
            }
            distilled.run(self.folder("distilled", seed), self.config.model, self.kept[seed], matched, stages)

    def tune(self) -> None:
        for row, seed in self.cells():
            if not row.train:
                continue
            full = row.train == "full"
            product = self.folder("distilled", seed)
            prompts: tune.Prompts = None
            if row.prompts:
                found = distilled.load_distilled(product)
                prompts = found.texts if row.prompts == "decoded" else found.prompts
            tune.run(
                self.folder("tuned", seed, row.name),
                self.model(row),
                self.config.data,
                self.config.tune,
                self.full if full else self.kept[seed],
                self.validation,
                seed,
                epochs=self.config.tune.full_epochs if full else self.config.tune.epochs,
                prompts=prompts,
                inputs={} if row.prompts is None else {"distilled": folder_digest(product)},
                label=f"{row.name}, seed {seed}",
            )

    def evaluate(self) -> None:
        scores = []
        for row, seed in self.cells():
            adapter = self.folder("tuned", seed, row.name) / "adapter" if row.train else None
            found = evaluate.run(
                self.folder("scores", seed, row.name),
                self.model(row),
                self.config.data,
                self.config.evaluate,
                self.test,
                adapter,
                f"score {row.name}, seed {seed}",
            )
            raw = row.train == "kept" and not row.prompts
            fraction = {"full": 1.0, "kept": len(self.kept[seed]) / len(self.full), None: 0.0}[row.train]
            scores.append(
                {
                    "row": row.name,
                    "method": self.config.select.method if raw else row.name.removeprefix("transfer_"),
                    "model": self.model(row).path,
                    "fraction": fraction,
                    "seed": seed,
                    **found,
                }
            )
        write_json(self.out / "scores.json", scores)

    def report(self) -> None:
        print(f"report: {report.run(self.out)}")

    def check(self) -> None:
        """What can be told before anything is written.

        Sizes against batches, starts against snapshots; that both models load, take the adapters and every sample.
        """
        config = self.config
        check_selection(self.full, config.select, self.context(config.seeds[0]))
        check_batch("the full set", len(self.full), "experts.batch", config.experts.batch)
        for name, batch in (("match.batch", config.match.batch), ("tune.batch", config.tune.batch)):
            check_batch("the kept set", self.kept_count(), name, batch)
        matching.check_starts(config.match, config.experts, len(self.full))
        k = config.match.prompt_tokens
        Student(self.check_model(config.model, k))
        if config.transfer:  # a token of ours may be several of theirs
            self.check_model(replace(config.model, path=config.transfer), TRANSFER_GROWTH * k)

    def kept_count(self) -> int:
        """How many samples every selection keeps."""
        config = self.config.select
        if config.method == "ids":
            return len(ids.listed(self.full, config.ids))
        return kept_count(len(self.full), config.fraction)

    def check_model(self, model: ModelConfig, prompt_tokens: int) -> PeftModel:
        """The model with adapters, on the CPU, having seen that every sample behind its prompt fits its positions."""
        resolve_device(model.device)
        base, tokenizer = load_model(model.path, model.dtype, "cpu")
        for examples in (self.full, self.validation, self.test):
            rows = encode_set(examples, tokenizer, self.config.data)
            check_lengths([e.id for e in examples], rows, [prompt_tokens] * len(rows), max_positions(base))
        return add_lora(base, model, seed=0)

    def plan(self) -> str:
        """What is finished, what resumes and what is to do, by stage."""
        folders = {
            "select": [self.folder("selection", s) for s in self.config.seeds],
            "experts": self.expert_folders(),
            "match": [self.folder("matching", s) for s in self.config.seeds],
            "decode": [self.folder("distilled", s) for s in self.config.seeds],
            "tune": [self.folder("tuned", s, row.name) for row, s in self.cells() if row.train],
            "evaluate": [self.folder("scores", s, row.name) for row, s in self.cells()],
        }
        config, n, kept = self.config, len(self.full), self.kept_count()
        lines = [
            f"full set {n} samples, kept {kept}, validation {len(self.validation)}, test {len(self.test)}; "
            f"out {self.out}"
        ]
        steps = experts.total_steps(config.experts, experts.steps_per_epoch(n, config.experts.batch))
        work = {
            "experts": f"{steps} steps of {config.experts.batch} each",
            "match": f"S = {config.match.iterations} iterations "
            f"of N = {config.match.inner_steps} steps of {config.match.batch} each",
        }
        for stage, where in folders.items():
            done = sum((folder / "manifest.json").exists() for folder in where)
            begun = sum((folder / "work").exists() for folder in where)
            lines.append(
                f"{stage:9} {len(where):3} cells: {done} finished, {begun} to resume, {len(where) - done - begun} to do"
                + (f"; {work[stage]}" if stage in work else "")
            )
        return "\n".join(lines)


def run(config: RunConfig, until: str = STAGES[-1]) -> Path:
    """The job, up to and with stage `until`. Returns the run folder. Raises InputError before anything is written."""
    job = Job(config)
    job.check()
    for stage in STAGES[: STAGES.index(until) + 1]:
        if stage == "report":
            write_settings(job)
        getattr(job, stage)()
    write_settings(job)
    return job.out


def write_settings(job: Job) -> None:
    """The settings of what is in the folder: only now, when no stage has refused them."""
    write_atomic(job.out / SETTINGS, to_yaml(job.config).encode())


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["distill", *sys.argv[1:]]))
