"""`nacd select` as a user runs it: tables, files, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from nacd_fast import cli
from nacd_fast.examples import Example
from nacd_fast.selection import METHODS, summary
from tests.selection.pools import numbered
from tests.sets import message_row, write_lines
from tests.tiny import make_examples, make_model

SIZES = {"pool": 40, "target": 4}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, pool.jsonl of two sources with one copy, and target.jsonl."""
    folder = tmp_path_factory.mktemp("sets")
    make_model(folder / "model")
    for seed, (name, size) in enumerate(SIZES.items()):
        rows = [
            {"id": e.id, "source": ("dolly/qa", "p3/sciq")[i % 2], "messages": list(e.messages)}
            for i, e in enumerate(make_examples(size, seed))
        ]
        write_lines(folder / f"{name}.jsonl", *rows, *([{**rows[0], "id": "copy"}] if name == "pool" else []))
    return folder


def arguments(sets: Path, method: str, out: Path, **more: object) -> list[str]:
    found = ["select", "--pool", str(sets / "pool.jsonl"), "--method", method, "--out", str(out), "--fraction", "0.2"]
    found += ["--model", str(sets / "model"), "--lora.rank", "2", "--lora.device", "cpu"]
    found += ["--less.warmup_fraction", "0.5", "--less.warmup_batch", "4", "--less.warmup_epochs", "1"]
    found += ["--less.dimensions", "64", "--dq.bins", "4"]
    if method in ("bm25", "dsir", "less"):
        found += ["--target", str(sets / "target.jsonl")]
    return found + [part for name, value in more.items() for part in (f"--{name}", str(value))]


def test_every_method_prints_its_tables(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, method in enumerate(name for name in METHODS if name != "ids"):
        out = tmp_path / method
        assert cli.main(arguments(sets, method, out)) == 0
        shown = capsys.readouterr().out
        assert f"select: 8 of 40 samples by {method}" in shown and "8 of 40 samples kept" in shown
        assert "CC BY-SA 3.0" in shown and "Apache-2.0" in shown
        assert "Highest and lowest scores" in shown and f"select: {out}" in shown
        assert ("Kept by others too" in shown) == (number > 0)
        table = parquet.read_table(out / "scores.parquet").to_pydict()
        assert len(table["id"]) == 40 and "copy" not in table["id"] and sum(table["kept"]) == 8
        assert (out / "ids.txt").read_text().split() == [i for i, k in zip(table["id"], table["kept"]) if k]
        assert (out / "scores.svg").read_text().startswith("<svg")
    assert cli.main(arguments(sets, "ids", tmp_path / "again", ids=tmp_path / "dq" / "ids.txt")) == 0
    assert (tmp_path / "again" / "ids.txt").read_bytes() == (tmp_path / "dq" / "ids.txt").read_bytes()


def test_the_tables_count_what_is_there(tmp_path: Path) -> None:
    from rich.console import Console

    pool = [Example(e.id, f"p3/{i % 20}", e.messages) for i, e in enumerate(numbered(40))]
    kept = [i % 20 == 3 or i == 7 for i in range(40)]
    for name, chosen in (("mine", kept), ("other", [i < 10 for i in range(40)])):
        write_selection(tmp_path / name, pool, chosen, [float(i) for i in range(40)])
    write_selection(tmp_path / "of another pool", pool, kept, [0.0] * 40, digest="else")
    write_selection(tmp_path / "unfinished", pool, kept, [0.0] * 40)
    (tmp_path / "unfinished" / "manifest.json").unlink()
    console = Console(record=True, width=100, file=open(tmp_path / "sink", "w"))
    summary.show(tmp_path / "mine", pool, console)
    lines = [" ".join(line.replace("│", " ").split()) for line in console.export_text().splitlines()]
    assert "3 of 40 samples kept" in lines
    assert "p3/3 2 2 100.0% Apache-2.0" in lines and "p3/7 2 1 50.0% Apache-2.0" in lines
    assert "5 others 10 0 0.0%" in lines
    assert "all 0 1.95 9.75 19.5 29.2 37 39" in lines and "kept 3 3.4 5 7 15 21.4 23" in lines
    assert "other 10 2 0.8" in lines and not any("another pool" in line or "unfinished" in line for line in lines)
    ends = [line.split()[0] for line in lines if line.endswith(tuple("0123456789")) and " p3/" in line]
    assert ends == ["39", "38", "37", "36", "35", "4", "3", "2", "1", "0"]


def write_selection(
    folder: Path, pool: list[Example], kept: list[bool], scores: list[float], digest: str = "d"
) -> None:
    import pyarrow

    folder.mkdir()
    columns: dict[str, Any] = {"id": [e.id for e in pool], "source": [e.source for e in pool]}
    parquet.write_table(pyarrow.table({**columns, "score": scores, "kept": kept}), folder / "scores.parquet")
    (folder / "config.json").write_text(json.dumps({"inputs": {"examples": digest}}))
    (folder / "manifest.json").write_text("{}")


@pytest.mark.parametrize(
    "change, says",
    [
        (["--fraction", "0"], "select.fraction=0.0: must be in (0, 1]"),
        (["--method", "bm25"], "select.target='': must be given with bm25, dsir and less and only then"),
        (["--target", "arc_easy"], "select.target='arc_easy': must be given with bm25, dsir and less and only then"),
        (["--method", "ids"], "select.ids='': must be given with method `ids` and only then"),
        (["--method", "less", "--target", "{target}", "--less.warmup_batch", "99"], "fewer than less.warmup_batch=99"),
        (["--method", "less", "--target", "{target}", "--less.dimensions", "100"], "less.dimensions=100: must be"),
        (["--method", "less", "--target", "{target}", "--model", "{gone}"], "gone"),
        (["--method", "dq", "--model", "{gone}"], "gone"),
        (["--method", "dq", "--dq.bins", "0"], "dq.bins=0: must be at least 1"),
        (["--method", "bm25", "--target", "{gone}"], "no such file or folder"),
        (["--pool", "{gone}"], "no such file or folder"),
        (["--seed", "-1"], "seed=-1: must be from 0 to 2**32 - 1"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    change: list[str], says: str, sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"target": str(sets / "target.jsonl"), "gone": str(tmp_path / "gone")}
    given = arguments(sets, "random", tmp_path / "out") + [value.format(**places) for value in change]
    assert cli.main(given) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("nacd: ")
    assert list(tmp_path.iterdir()) == []


def test_dry_run_writes_nothing(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments(sets, "stratified", tmp_path / "out"), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "method: stratified" in shown and "8 of 40 samples by stratified" in shown
    assert list(tmp_path.iterdir()) == []


def test_copies_and_empty_rows(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments(sets, "random", tmp_path / "all", deduplicate="false")) == 0
    assert "8 of 41 samples" in capsys.readouterr().out
    write_lines(tmp_path / "pool.jsonl", message_row(), message_row("x", ""), message_row("y"))
    given = ["select", "--pool", str(tmp_path / "pool.jsonl"), "--out", str(tmp_path / "out"), "--fraction", "1"]
    assert cli.main(given) == 2 and "skip_empty leaves such rows out" in capsys.readouterr().err
    assert cli.main([*given, "--skip_empty", "true"]) == 0
    assert (tmp_path / "out" / "ids.txt").read_text() == "pool-1\npool-3\n"
