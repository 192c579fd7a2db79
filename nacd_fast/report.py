"""Everything a run left -> report.html (one file that loads nothing) and report.md with report_files/*.svg.

The verdict is computed from the scores and says so where a claim failed. What the run has not come to yet is named.
The templates place text, and escape what comes from data; a report of the same files has the same bytes.
"""

import html
import os
import platform
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from markupsafe import Markup

from nacd_kernels.dispatch import backend

from . import codec, codec_cuda, comparison, plots
from .artifacts import read_json, write_atomic
from .comparison import TRANSFER, interval, label, number
from .config import EvaluateConfig
from .errors import InputError

STAGES = (  # name, its folders, what its time grows with (the paper's Table 5)
    ("Selection", "selection/*", "samples"),
    ("Expert trajectories", "experts/*", "experts × epochs × samples"),
    ("Distillation", "matching/*", "iterations S × student steps N"),
    ("Decoding", "distilled/*", "prompts × vocabulary"),
    ("Instruction tuning", "tuned/*/*", "rows × epochs × samples"),
    ("Evaluation", "scores/*/*", "models × test items"),
)
CURVES = (
    ("loss", "L = L_distill + β L_reg"),
    ("distill", "L_distill"),
    ("reg", "L_reg"),
    ("alpha", "α, the student's learning rate"),
)
TRANSFER_ROWS = ("baseline", "random", "nacd_decoded")
ONCE = ("baseline", "full", TRANSFER + "baseline")  # rows that need no cell for every seed
SAMPLE_COLUMNS = ("source", "messages", "prompt_tokens", "survives", "distance", "rank", "margin", "next_tokens")
PACKAGES = ("torch", "transformers", "peft", "datasets", "safetensors", "numpy")
SAMPLES = 6  # decoded samples shown of each seed
SAMPLE_CHARS = 900  # shown of a turn
SOURCES = 12  # sources in the table; the others are counted together


@dataclass(frozen=True)
class Run:
    """A run folder: settings, scores, and sentences about what is not there."""

    folder: Path
    settings: Mapping[str, Any]
    settings_text: str
    seeds: list[int]
    cells: comparison.Cells
    missing: list[str] = field(default_factory=list)

    def setting(self, path: str, default: Any) -> Any:
        value: Any = self.settings
        for name in path.split("."):
            value = value.get(name, default) if isinstance(value, Mapping) else default
        return value

    def seed_folders(self, stage: str, file: str) -> dict[int, Path]:
        """Seed -> stage/seed<s>/file where that is; the others are noted as missing."""
        found = {}
        for seed in self.seeds:
            path = self.folder / stage / f"seed{seed}" / file
            if path.is_file():
                found[seed] = path
            else:
                self.missing.append(f"{stage}/seed{seed}: no {file}.")
        return found


def read_run(folder: Path) -> Run:
    """Settings and scores. Raises InputError where there are no scores, or either makes no sense."""
    if not (folder / "scores.json").is_file():
        raise InputError(f"{folder}: no scores.json in this run folder, so there is nothing to report")
    cells = comparison.read_cells(folder / "scores.json")
    path, text, settings, missing = folder / "config.yaml", "", {}, []
    if path.is_file():
        text = path.read_text(encoding="utf-8")
        try:
            settings = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
        if not isinstance(settings, dict):
            raise InputError(f"{path}: must hold names and values")
    else:
        missing.append("config.yaml: not there, so the settings are unknown.")
    seeds = settings.get("seeds") or sorted({seed for row in cells.values() for seed in row})
    return Run(folder, settings, text, [int(seed) for seed in seeds], cells, missing)


def note_missing(run: Run) -> None:
    """Stages and rows that the settings ask for and the folder lacks, into run.missing."""
    stages = [f"selection/seed{seed}" for seed in run.seeds]
    stages += [f"experts/expert{i}" for i in range(int(run.setting("experts.count", 0)))]
    unfinished = [stage for stage in stages if not (run.folder / stage / "manifest.json").is_file()]
    run.missing.extend(f"{stage}: not finished." for stage in unfinished)
    for row in [*comparison.LABELS, *(TRANSFER + row for row in TRANSFER_ROWS if run.setting("transfer", ""))]:
        cells = run.cells.get(row, {})
        absent = [str(seed) for seed in run.seeds if seed not in cells]
        if not cells:
            run.missing.append(f"Row {row}: no scores.")
        elif absent and row not in ONCE:
            run.missing.append(f"Row {row}: no scores of seed {', '.join(absent)}.")


# Sections


def figures(run: Run) -> dict[str, tuple[str, str]]:
    """Name -> (SVG, description)."""
    rows = [row for row in run.cells if not row.startswith(TRANSFER)]
    dots = [(label(run.cells, row), comparison.values(run.cells, row, "nll"), row.startswith("nacd")) for row in rows]
    found = {"scores": (plots.draw_scores(dots, "held-out NLL, nats a token"), "Held-out NLL by row, a dot a seed")}
    curves = {seed: read_curve(path) for seed, path in run.seed_folders("matching", "curve.json").items()}
    for name, title in CURVES:
        lines = {
            f"seed {seed}": ([p["iteration"] for p in points if name in p], [p[name] for p in points if name in p])
            for seed, points in curves.items()
        }
        lines = {seed: line for seed, line in lines.items() if line[0]}
        if lines:
            found[name] = (plots.draw_curves(name, title, lines), f"{title} by iteration of the distillation")
    return found


def read_curve(path: Path) -> list[dict[str, float]]:
    points = read_json(path)
    if not isinstance(points, list) or not all(isinstance(p, dict) and "iteration" in p for p in points):
        raise InputError(f"{path}: must be a list of points with an iteration")
    return [{name: float(value) for name, value in p.items() if isinstance(value, (int, float))} for p in points]


def read_dataset(path: Path) -> list[dict[str, Any]]:
    try:
        return pq.read_table(path, columns=list(SAMPLE_COLUMNS)).to_pylist()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(
            f"{path}: not a distilled set, which has the columns {', '.join(SAMPLE_COLUMNS)} "
            f"({str(error).splitlines()[0]})"
        ) from None


def sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """One distilled sample as the paper's Figure 3 shows it: pseudo tokens, then the original turns."""
    names = ("prompt_tokens", "distance", "margin", "next_tokens")
    return {
        "source": row["source"],
        "tokens": [
            {"text": text, "distance": number(distance), "margin": number(margin, sign=True), "next": other}
            for text, distance, margin, other in zip(*(row[name] for name in names), strict=True)
        ],
        "turns": [(turn["role"].capitalize(), clip(turn["content"])) for turn in row["messages"]],
    }


def spelled(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Of a seed's prompts: how many took a further token than the nearest, and how many spell no text."""
    return {
        "all": len(rows),
        "moved": sum(any(row["rank"]) for row in rows),
        "lost": sum(not row["survives"] for row in rows),
    }


def clip(text: str) -> str:
    more = len(text) - SAMPLE_CHARS
    return text if more <= 0 else f"{text[:SAMPLE_CHARS]} … ({more:,} more characters)"


def source_table(sets: Mapping[int, Sequence[Mapping[str, Any]]]) -> list[tuple[str, list[int]]]:
    """(source, samples by seed), the commonest first, the tail as one line; then the sum."""
    counts = {seed: Counter(row["source"] for row in rows) for seed, rows in sets.items()}
    total: Counter[str] = sum(counts.values(), Counter())
    names = sorted(total, key=lambda name: (-total[name], name))
    shown, rest = (names, []) if len(names) <= SOURCES + 1 else (names[:SOURCES], names[SOURCES:])
    lines = [(name, [count[name] for count in counts.values()]) for name in shown]
    if rest:
        lines.append((f"{len(rest)} other sources", [sum(count[name] for name in rest) for count in counts.values()]))
    return [*lines, ("All", [count.total() for count in counts.values()])]


def cost_table(run: Run) -> list[dict[str, str]]:
    """Seconds and peak memory by stage, over its cells and seeds, from timing.json."""
    lines, seconds, peak = [], 0.0, 0
    for name, pattern, grows in STAGES:
        timings = [read_json(path) for path in sorted(run.folder.glob(f"{pattern}/timing.json"))]
        if not timings:
            run.missing.append(f"{pattern.split('/')[0]}: no timing.")
            continue
        spent, most = [float(t["seconds"]) for t in timings], max(int(t["peak_bytes"]) for t in timings)
        lines.append(
            {
                "name": name,
                "cells": str(len(timings)),
                "time": duration(sum(spent)),
                "longest": duration(max(spent)),
                "peak": size(most),
                "grows": grows,
            }
        )
        seconds, peak = seconds + sum(spent), max(peak, most)
    total = {"name": "All", "cells": "", "time": duration(seconds), "longest": "", "peak": size(peak), "grows": ""}
    return [*lines, total] if lines else []


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def environment() -> dict[str, str]:
    """What made the report: the stages of a run may have had other versions and another machine."""
    from . import __version__

    found = {"nacd_fast": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.is_available()
    found["Device"] = torch.cuda.get_device_name() if gpu else f"CPU, {cpu_name()}"
    ops = backend(torch.empty(0, device="cuda" if gpu else "cpu"))
    found["Ops"] = f"nacd_kernels, {ops.name}: {ops.reason}"
    found["Trajectories"] = codec.backend() + (f"; {codec_cuda.explain()}" if gpu else "")
    found["Threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    found["System"] = f"{platform.system()} {platform.machine()}"
    return found


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    return names[0].strip() if names else platform.machine()


# Rendering


def context(run: Run) -> dict[str, Any]:
    """What the templates show, by name; figures apart, the same for both."""
    selection = str(run.setting("select.method", "random"))
    resamples = int(run.setting("evaluate.bootstrap", EvaluateConfig.bootstrap))
    found = comparison.claims(run.cells, run.folder / "scores", resamples)
    sets = {seed: read_dataset(path) for seed, path in run.seed_folders("distilled", "dataset.parquet").items()}
    note_missing(run)
    costs = cost_table(run)
    return {
        "name": run.folder.resolve().name,
        "headline": comparison.headline(found),
        "verdict": comparison.verdict(run.cells, found, selection),
        "groups": comparison.table(run.cells),
        "claims": [claim_line(run, claim) for claim in found],
        "cells": [cell_line(run, row) for row in run.cells],
        "seeds": run.seeds,
        "fractions": sorted({c["fraction"] for row in run.cells.values() for c in row.values()}),
        "samples": {seed: [sample(row) for row in rows[:SAMPLES]] for seed, rows in sets.items()},
        "spelled": {seed: spelled(rows) for seed, rows in sets.items()},
        "source_seeds": list(sets),
        "sources": source_table(sets) if sets else [],
        "costs": costs,
        "environment": environment(),
        "settings": run.settings_text.rstrip(),
        "selection": selection,
        "missing": run.missing,
        "model": run.setting("model.path", ""),
        "beta": run.setting("match.beta", None),
    }


def claim_line(run: Run, claim: comparison.Claim) -> dict[str, str]:
    points = None if claim.accuracy_interval is None else [100 * bound for bound in claim.accuracy_interval]
    row, against = label(run.cells, claim.row), label(run.cells, claim.against)
    return {
        "claim": f"{row} better than {against}",
        "outcome": claim.outcome,
        "model": claim.model if claim.row.startswith(TRANSFER) else "",
        "wins": f"{claim.wins} of {claim.seeds}",
        "nll": number(claim.difference, sign=True),
        "nll_interval": interval(claim.nll_interval, sign=True),
        "accuracy": "–" if claim.accuracy is None else number(100 * claim.accuracy, 1, sign=True),
        "accuracy_interval": interval(points, 1, sign=True),
    }


def cell_line(run: Run, row: str) -> dict[str, Any]:
    lines = []
    for seed, cell in run.cells[row].items():
        accuracy, bounds = cell["accuracy"], cell["accuracy_interval"]
        lines.append(
            {
                "seed": seed,
                "nll": number(cell["nll"]),
                "nll_interval": interval(cell["nll_interval"]),
                "accuracy": "–" if accuracy is None else number(100 * accuracy, 1),
                "accuracy_interval": interval(bounds and [100 * bound for bound in bounds], 1),
            }
        )
    where = f" on {comparison.first(run.cells, row)['model']}" if row.startswith(TRANSFER) else ""
    return {"label": label(run.cells, row) + where, "seeds": lines}


def markdown(value: object) -> str:
    """Text from data within a line of Markdown: no HTML, no table cell ends, no markup."""
    text = " ".join(html.escape(str(value), quote=False).split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text)


def fenced(text: str) -> str:
    """A Markdown code block that its text cannot end."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall(r"`+", text)), 3)
    return f"{fence}text\n{text}\n{fence}"


def render(name: str, escape: bool, values: Mapping[str, Any]) -> str:
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    env = jinja2.Environment(
        loader=loader,
        autoescape=escape,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters.update(md=markdown, fenced=fenced)
    return env.get_template(name).render(**values)


def run(run_folder: Path) -> Path:
    """Write the report into the run folder; returns the path of report.html."""
    found = read_run(run_folder)
    drawings = figures(found)
    values = context(found)
    inline = {name: Markup(plots.inline(svg, text)) for name, (svg, text) in drawings.items()}
    page = render("report.html.j2", True, {**values, "figures": inline})
    text = render("report.md.j2", False, {**values, "figures": {name: what for name, (_, what) in drawings.items()}})
    for name, (svg, _) in drawings.items():
        write_atomic(run_folder / "report_files" / f"{name}.svg", plots.standalone(svg).encode())
    write_atomic(run_folder / "report.md", text.encode())
    write_atomic(run_folder / "report.html", page.encode())
    return run_folder / "report.html"


if __name__ == "__main__":
    from .cli import main

    sys.exit(main(["report", *sys.argv[1:]]))
