"""The report of a made-up run folder: every part is there, claims that fail are said to, data cannot become markup."""

import re
import shutil
from collections import Counter
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml

from nacd_fast import report
from nacd_fast.artifacts import read_json, write_json
from nacd_fast.errors import InputError
from nacd_fast.intervals import Items, summarise, write_items

SEEDS = (0, 1, 2)
MEANS = {
    "baseline": 5.66,
    "full": 3.93,
    "random": 4.59,
    "nacd_embeddings": 4.52,
    "nacd_decoded": 4.60,
    "transfer_baseline": 5.90,
    "transfer_random": 4.80,
    "transfer_nacd_decoded": 4.7995,
}
NASTY = '<script>alert("x")</script> <img src=x onerror=alert(1)> | `code` ``` & </p>'
VOID = {"meta", "img", "br", "link", "hr", "input"}


def make_items(row: str, seed: int, n: int = 200) -> Items:
    """Items with a row's mean NLL: their ups and downs are the items' own, the same in every row."""
    shared = np.random.default_rng(0)
    tokens = shared.integers(2, 12, n)
    hard = shared.standard_normal(n)
    own = np.random.default_rng([seed, list(MEANS).index(row)])
    noise = 0.05 * own.standard_normal(n) + 0.01 * own.standard_normal()
    per_token = MEANS[row] + 0.8 * (hard - (hard * tokens).sum() / tokens.sum()) + noise
    correct = np.where(own.random(n) < 0.3 + 0.1 * (6 - MEANS[row]) / 2, 1.0, 0.0)
    return Items(tuple(f"test-{i:04d}" for i in range(n)), per_token * tokens, tokens, correct)


def finish(folder: Path, seconds: float) -> None:
    write_json(folder / "timing.json", {"seconds": seconds, "peak_bytes": int(3e8 + seconds * 1e6)})
    write_json(folder / "manifest.json", {"outputs": {}})


def make_run(folder: Path, seeds: tuple[int, ...] = SEEDS, iterations: int = 120) -> Path:
    """A whole run in the layout of the stages."""
    settings = {
        "out": "runs/made-up",
        "seeds": list(seeds),
        "transfer": "demo-sibling",
        "model": {"path": "demo", "rank": 8},
        "select": {"method": "random", "fraction": 0.05},
        "experts": {"count": 2},
        "match": {"beta": 0.5, "iterations": iterations},
        "evaluate": {"bootstrap": 300},
    }
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    scores = []
    for row in MEANS:
        fraction = {"baseline": 0.0, "full": 1.0}.get(row.removeprefix("transfer_"), 0.05)
        for seed in seeds if fraction else (0,):
            items = make_items(row, seed)
            write_items(folder / "scores" / row / f"seed{seed}" / "items.parquet", items)
            finish(folder / "scores" / row / f"seed{seed}", 2.0)
            if fraction:
                finish(folder / "tuned" / row / f"seed{seed}", 13.0)
            model = "demo-sibling" if row.startswith("transfer") else "demo"
            scores.append(
                {"row": row, "method": row, "model": model, "fraction": fraction, "seed": seed, **summarise(items, 300)}
            )
    write_json(folder / "scores.json", scores)
    for i in range(2):
        finish(folder / "experts" / f"expert{i}", 61.5)
    for seed in seeds:
        finish(folder / "selection" / f"seed{seed}", 0.2)
        generator = np.random.default_rng(seed)
        distill = 0.9 + 0.1 * np.exp(-np.arange(iterations) / 40) + 0.01 * generator.standard_normal(iterations)
        curve = [
            {
                "iteration": i,
                "loss": float(d + 0.5 * 0.02),
                "distill": float(d),
                "reg": 0.02 + 0.0001 * i,
                "alpha": 0.2 + 0.001 * i,
            }
            for i, d in enumerate(distill)
        ]
        write_json(folder / "matching" / f"seed{seed}" / "curve.json", curve)
        finish(folder / "matching" / f"seed{seed}", 75.0)
        rows: list[dict[str, Any]] = [
            {
                "id": f"train-{seed}-{i}",
                "source": f"p3/source {i % 10}",
                "prompt_tokens": [f" decoded {i}", " why"],
                "survives": i != 7,
                "distance": [0.25, 1.5 + i],
                "rank": [0, int(i == 3)],
                "margin": [0.125, 0.5 if i != 3 else -0.5],
                "next_tokens": [" other", " runner-up"],
                "messages": [
                    {"role": "user", "content": f"Question {i} of seed {seed}?"},
                    {"role": "assistant", "content": f"Answer {i}"},
                ],
            }
            for i in range(30)
        ]
        rows[0]["source"], rows[0]["messages"][0]["content"] = NASTY, NASTY
        (folder / "distilled" / f"seed{seed}").mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(folder / "distilled" / f"seed{seed}" / "dataset.parquet")
        finish(folder / "distilled" / f"seed{seed}", 0.4)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run with its report."""
    folder = make_run(tmp_path_factory.mktemp("runs") / "made-up")
    report.run(folder)
    return folder


@pytest.fixture()
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "made-up"))


class Page(HTMLParser):
    """Tags with attributes, and text; fails where tags do not nest."""

    def __init__(self, source: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text())


def plain(text: str) -> str:
    return " ".join(text.replace("\u00a0", " ").split())


def test_page_is_whole(whole: Path) -> None:
    page = page_of(whole)
    text = plain(page.text)
    for part in (
        "Baseline",
        "FULL",
        "Random",
        "NACD, embeddings",
        "NACD, decoded",
        "Expert trajectories",
        "Seed 2",
        "demo-sibling, tuned on the decoded text",
        "Instruction tuning",
        "p3/source 7",
        "transformers",
        "runs/made-up",
        "β = 0.5",
        "nacd_kernels, reference",
    ):
        assert part in text, part
    assert "Not in this report" not in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5  # scores, L, L_distill, L_reg, alpha
    assert sum(tag == "article" for tag, _ in page.tags) == 6 * len(SEEDS)
    assert "Question 5 of seed 1?" in text and "Question 6 of seed 1?" not in text
    assert "0.250; other +0.125" in text and "6.500; runner-up +0.500" in text and "4.500; runner-up −0.500" in text
    assert "the first 6 of 30: 1 took further tokens, 1 spell no text" in text


def test_versions_are_those_of_the_report(whole: Path) -> None:
    for name in ("report.html", "report.md"):
        text = (whole / name).read_text()
        assert "Report made with" in text and "may have run with other versions" in text and "Environment" not in text


def test_table_holds_the_scores(whole: Path) -> None:
    text = plain(page_of(whole).text)
    cells = read_json(whole / "scores.json")
    nll = {row: [c["nll"] for c in cells if c["row"] == row] for row in MEANS}
    mean = {row: np.mean(values) for row, values in nll.items()}
    assert f"{mean['nacd_embeddings']:.3f} ± {np.std(nll['nacd_embeddings'], ddof=1):.3f}" in text
    assert f"{100 * (mean['random'] - mean['nacd_embeddings']) / (mean['random'] - mean['full']):.1f} %" in text
    accuracy = 100 * np.array([c["accuracy"] for c in cells if c["row"] == "full"])
    assert f"{accuracy.mean():.1f} ± {accuracy.std(ddof=1):.1f}" in text


def test_page_loads_nothing(whole: Path) -> None:
    source = (whole / "report.html").read_text()
    for tag, attributes in page_of(whole).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "image", "img"), tag
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("src", "srcset", "data", "action", "poster"), name
            if name.endswith("href"):
                assert (value or "").startswith("#"), value
            elif not name.startswith("xmlns"):
                assert "//" not in (value or ""), f"{name}={value}"
    assert "@import" not in source and not re.search(r"url\((?!#)", source)


def test_ids_are_unique_and_referred_to(whole: Path) -> None:
    source = (whole / "report.html").read_text()
    counts = Counter(attributes["id"] for _, attributes in page_of(whole).tags if "id" in attributes)
    assert counts and max(counts.values()) == 1
    assert {*re.findall(r"url\(#([^)]+)\)", source), *re.findall(r'href="#([^"]+)"', source)} <= counts.keys()


def test_data_cannot_become_markup(whole: Path) -> None:
    source, page = (whole / "report.html").read_text(), page_of(whole)
    assert "<script" not in source and "<img" not in source
    assert page.text.count(NASTY) >= 2 * len(SEEDS)  # as a source and as a turn, to the letter
    text = (whole / "report.md").read_text()
    outside = re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    assert NASTY in text and "<" not in outside and "onerror" in unescape(outside)


def test_verdict_says_what_holds_and_what_failed(whole: Path) -> None:
    source = page_of(whole).text
    verdict = plain(source[source.index("Training on the full set") :])
    assert re.search(
        r"Training on the full set beats the raw 5 % \(random\): held-out NLL 3\.9\d+ against 4\.5\d+, "
        r"better in 3 of 3 seeds \(paired difference −0\.6\d+, 95 % interval −0\.6\d+ to −0\.6\d+\)",
        verdict,
    )
    assert re.search(r"The NACD embeddings beat the raw 5 %: .{90,140}, which closes 1\d\.\d % of the gap", verdict)
    assert re.search(
        r"The same prompts decoded to text do not beat the raw 5 %: .{90,140}; this claim failed\.", verdict
    )
    assert re.search(r"On demo-sibling, another model, the decoded prompts do not beat", verdict)


def test_markdown_matches(whole: Path) -> None:
    text = (whole / "report.md").read_text()
    for image in re.findall(r"!\[.*\]\((.+)\)", text):
        svg = (whole / image).read_text()
        assert svg.startswith("<svg") and "var(--" not in svg and "#0101" not in svg
    assert len(re.findall(r"!\[", text)) == 5
    columns = None
    for line in re.sub(r"^(`{3,})text\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE).splitlines():
        bars = len(re.findall(r"(?<!\\)\|", line))
        columns = bars if columns is None and bars else columns if bars else None
        assert not bars or bars == columns, line
    page = re.sub(r"\s", "", page_of(whole).text)
    rows = re.findall(r"^\| (?:NACD|FULL|Random)[^|]*(\|.*)$", text, re.MULTILINE)
    assert len(rows) == 6 + 4 + 6 * len(SEEDS)  # comparison, claims, cells
    for row in rows:
        assert re.sub(r"[\s|*]", "", row) in page, row


def test_same_files_same_bytes(copy: Path) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("report*") if path.is_file()}
    files = {path: path.read_bytes() for path in (copy / "report_files").iterdir()}
    report.run(copy)
    assert before == {path: path.read_bytes() for path in copy.rglob("report*") if path.is_file()}
    assert files == {path: path.read_bytes() for path in (copy / "report_files").iterdir()}


@pytest.mark.parametrize(
    ("gone", "named"),
    [
        ("matching/seed1", "matching/seed1: no curve.json."),
        ("matching", "matching: no timing."),
        ("distilled", "distilled/seed0: no dataset.parquet."),
        ("distilled/seed2/dataset.parquet", "distilled/seed2: no dataset.parquet."),
        ("experts/expert1/manifest.json", "experts/expert1: not finished."),
        ("selection/seed0", "selection/seed0: not finished."),
        ("config.yaml", "config.yaml: not there"),
        ("tuned", "tuned: no timing."),
    ],
)
def test_missing_parts_are_named(copy: Path, gone: str, named: str) -> None:
    path = copy / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    report.run(copy)
    assert named in plain(page_of(copy).text)
    assert "not in this report" in (copy / "report.md").read_text().lower()


def test_nothing_but_scores(tmp_path: Path) -> None:
    write_json(
        tmp_path / "run" / "scores.json",
        [{"row": "baseline", "method": "baseline", "model": "m", "fraction": 0, "seed": None, "nll": 3.0}],
    )
    report.run(tmp_path / "run")
    text = plain(page_of(tmp_path / "run").text)
    assert "No verdict yet" in text and "Row random: no scores." in text and "3.000" in text


def test_scores_of_some_seeds(copy: Path) -> None:
    gone = (("random", 2), ("full", 1), ("full", 2))
    write_json(copy / "scores.json", [c for c in read_json(copy / "scores.json") if (c["row"], c["seed"]) not in gone])
    report.run(copy)
    text = plain(page_of(copy).text)
    assert "Row random: no scores of seed 2." in text and "Row full" not in text
    assert "better in 2 of 2 seeds" in text


def test_without_item_scores_there_is_no_interval(copy: Path) -> None:
    shutil.rmtree(copy / "scores" / "random")
    report.run(copy)
    verdict = plain(page_of(copy).text)
    assert re.search(r"The NACD embeddings beat the raw 5 %: [^(]+\(paired difference −0\.\d+\), which", verdict)


def test_one_seed_and_no_choices(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", seeds=(7,), iterations=3)
    cells = [{**c, "accuracy": None, "accuracy_interval": None} for c in read_json(folder / "scores.json")]
    write_json(folder / "scores.json", cells)
    report.run(folder)
    text = plain(page_of(folder).text)
    assert "±" not in text.split("Mean ±")[0] and "of 1 seed (" in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("scores.json", None, r"no scores\.json"),
        ("scores.json", "[", r"scores\.json: not JSON"),
        ("scores.json", "[]", r"scores\.json: must be a list of rows"),
        ("scores.json", '[{"row": "full", "seed": 0, "fraction": 1}]', r"scores\.json, row 1: must have .*nll"),
        ("config.yaml", "a: [", r"config\.yaml: not YAML"),
        ("config.yaml", "just text", r"config\.yaml: must hold"),
        ("matching/seed0/curve.json", "{}", r"curve\.json: must be a list"),
        ("distilled/seed0/dataset.parquet", "PAR1", r"dataset\.parquet: not a distilled set"),
        ("scores/full/seed0/items.parquet", "PAR1", r"items\.parquet: not a table of item scores"),
    ],
)
def test_bad_files_are_named_in_one_line(copy: Path, file: str, content: str | None, message: str) -> None:
    before = (copy / "report.html").read_bytes()
    (copy / file).unlink() if content is None else (copy / file).write_text(content)
    with pytest.raises(InputError, match=message) as error:
        report.run(copy)
    assert len(str(error.value).splitlines()) == 1
    assert (copy / "report.html").read_bytes() == before


def test_code_block_cannot_be_ended() -> None:
    block = report.fenced("before\n```\n# after\n`````` x")
    assert block.splitlines()[0] == "```````text" and block.splitlines()[-1] == "```````"
    assert report.fenced("plain").startswith("```text")


def test_rare_sources_are_counted_together() -> None:
    sets = {seed: [{"source": f"s{i:02d}"} for i in range(15 + seed) for _ in range(20 - i)] for seed in (0, 4)}
    lines = report.source_table(sets)
    assert lines[0] == ("s00", [20, 20]) and lines[11] == ("s11", [9, 9])
    assert lines[12:] == [("7 other sources", [8 + 7 + 6, 8 + 7 + 6 + 5 + 4 + 3 + 2]), ("All", [195, 209])]
    assert report.source_table({0: [{"source": f"s{i:02d}"} for i in range(13)]})[12] == ("s12", [1])


def test_durations_and_sizes() -> None:
    assert [report.duration(s) for s in (0.24, 59.94, 60, 3599.4, 7325)] == [
        "0.2 s",
        "59.9 s",
        "1 min 00 s",
        "59 min 59 s",
        "2 h 02 min",
    ]
    assert [report.size(n) for n in (3 * 2**20, 3 * 2**30)] == ["3 MiB", "3.00 GiB"]
