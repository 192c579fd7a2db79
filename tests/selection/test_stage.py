"""The selection stage's folder: its files, its settings, reuse, and what a kill leaves."""

from pathlib import Path

import pytest
from pyarrow import parquet

from nacd_fast.artifacts import folder_digest
from nacd_fast.config import SelectConfig
from nacd_fast.errors import InputError
from nacd_fast.examples import Example
from nacd_fast.forms import read_set
from nacd_fast.selection import select, stage
from tests.selection.pools import context, numbered, spoken, write_ids


def run(folder: Path, full: list[Example], config: SelectConfig, seed: int) -> list[str]:
    return stage.run(folder, full, config, seed, context())


def test_stage_writes_ids_and_scores(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    full = read_set("demo", "train")
    ids = run(tmp_path / "seed0", full, SelectConfig(), 0)
    assert len(ids) == 100 and (tmp_path / "seed0" / "ids.txt").read_text().split() == ids
    table = parquet.read_table(tmp_path / "seed0" / "scores.parquet").to_pydict()
    assert table["id"] == [e.id for e in full] and table["source"] == [e.source for e in full]
    assert [name for name, kept in zip(table["id"], table["kept"]) if kept] == ids
    assert table["score"] == select(full, SelectConfig(), 0, context()).scores
    assert {p.name for p in (tmp_path / "seed0").iterdir()} == {
        "config.json",
        "ids.txt",
        "scores.parquet",
        "scores.svg",
        "timing.json",
        "manifest.json",
    }
    assert capfd.readouterr() == ("", "")
    again = write_ids(tmp_path / "list.txt", (tmp_path / "seed0" / "ids.txt").read_bytes())
    assert run(tmp_path / "again", full, again, 0) == ids  # its output is a list for method `ids`


def test_stage_is_reused_and_bound_to_its_settings(tmp_path: Path) -> None:
    full, folder = numbered(40), tmp_path / "out"
    ids = run(folder, full, SelectConfig(fraction=0.1), 0)
    stamp = (folder / "scores.parquet").stat().st_mtime_ns
    assert run(folder, full, SelectConfig(fraction=0.1), 0) == ids
    assert (folder / "scores.parquet").stat().st_mtime_ns == stamp
    for other in (
        lambda: run(folder, full, SelectConfig(fraction=0.2), 0),
        lambda: run(folder, full, SelectConfig(fraction=0.1), 1),
        lambda: run(folder, full[:39], SelectConfig(fraction=0.1), 0),
    ):
        with pytest.raises(InputError, match="made with other settings"):
            other()


def test_stage_follows_the_list_and_not_its_place(tmp_path: Path) -> None:
    full, folder = numbered(10), tmp_path / "out"
    run(folder, full, write_ids(tmp_path / "a.txt", "s1\n"), 0)
    run(folder, full, write_ids(tmp_path / "b.txt", "s1\n"), 0)
    assert str(tmp_path) not in (folder / "config.json").read_text()
    with pytest.raises(InputError, match="made with other settings"):
        run(folder, full, write_ids(tmp_path / "a.txt", "s2\n"), 0)


def test_stage_writes_nothing_on_bad_input(tmp_path: Path) -> None:
    config = write_ids(tmp_path / "ids.txt", "nobody")
    with pytest.raises(InputError):
        run(tmp_path / "out", numbered(5), config, 0)
    assert not (tmp_path / "out").exists()


def test_stage_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, config = numbered(40), SelectConfig(fraction=0.1)

    def die(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "score_table", die)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "torn", full, config, 0)
    assert not (tmp_path / "torn" / "manifest.json").exists()
    run(tmp_path / "torn", full, config, 0)
    run(tmp_path / "whole", full, config, 0)
    assert folder_digest(tmp_path / "torn") == folder_digest(tmp_path / "whole")


def test_a_target_counts_by_its_content(tmp_path: Path) -> None:
    full, target = spoken("iron rust|water", "cat|dog"), spoken("iron|rust", source="t")
    config = SelectConfig(method="bm25", target="here", fraction=0.5)
    first = stage.run(tmp_path / "out", full, config, 0, context(target))
    assert stage.run(tmp_path / "out", full, config, 0, context(target)) == first == ["s0"]
    with pytest.raises(InputError, match=r"made with other settings \(inputs\.target="):
        stage.run(tmp_path / "out", full, config, 0, context(spoken("cat|dog", source="t")))


def test_a_finished_selection_is_not_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(tmp_path / "out", numbered(30), SelectConfig(), 1)
    monkeypatch.delattr(stage, "select")
    assert run(tmp_path / "out", numbered(30), SelectConfig(), 1) == first
