"""Subsets: sizes, reproducibility, external lists and their errors, the stage's files."""

from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from nacd_fast.artifacts import folder_digest
from nacd_fast.config import SelectConfig
from nacd_fast.data import Example, read_set
from nacd_fast.errors import InputError
from nacd_fast.selection import METHODS, select, stage


def examples(n: int) -> list[Example]:
    return [Example(f"s{i}", "odd" if i % 2 else "even", ({"role": "assistant", "content": str(i)},)) for i in range(n)]


def test_every_method_of_the_config_exists() -> None:
    assert set(get_args(get_type_hints(SelectConfig)["method"])) == set(METHODS)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.floats(0.001, 1), st.integers(0, 5))
def test_random_takes_its_share_without_repetition(n: int, fraction: float, seed: int) -> None:
    full = examples(n)
    ids, scores = select(full, SelectConfig(fraction=fraction), seed)
    assert len(ids) == len(set(ids)) == max(1, round(fraction * n)) and len(scores) == n
    assert ids == [e.id for e in full if e.id in set(ids)]  # in the set's order
    kept, left = ([s for e, s in zip(full, scores) if (e.id in ids) is inside] for inside in (True, False))
    assert not left or min(kept) >= max(left)


def test_random_depends_on_the_seed_and_nothing_else() -> None:
    full, config = examples(100), SelectConfig(fraction=0.05)
    assert select(full, config, 0)[0] == ["s17", "s29", "s49", "s62", "s94"]  # the same on every platform
    assert select(full, config, 0) == select(full, config, 0)
    assert select(full, config, 0) != select(full, config, 1)
    assert set(select(full, config, 0)[0]) < set(select(full, SelectConfig(fraction=0.2), 0)[0])


def test_random_is_uniform() -> None:
    counts = [0] * 20
    for seed in range(2000):
        for name in select(examples(20), SelectConfig(fraction=0.2), seed)[0]:
            counts[int(name[1:])] += 1
    assert all(330 < count < 470 for count in counts)  # 400 expected, deviation 18


def test_empty_set_is_an_error() -> None:
    with pytest.raises(InputError, match="select: the set is empty"):
        select([], SelectConfig(), 0)


def write_ids(path: Path, content: str | bytes) -> SelectConfig:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return SelectConfig(method="ids", ids=str(path))


def test_id_list(tmp_path: Path) -> None:
    config = write_ids(tmp_path / "ids.txt", "\ufeff# mine\r\n\r\ns7\r\n  s3  \r\n# s1\r\ns4")
    ids, scores = select(examples(8), config, 0)
    assert ids == ["s3", "s4", "s7"]  # in the set's order
    assert scores == [0, 0, 0, 1, 1, 0, 0, 1]


@pytest.mark.parametrize(
    "content, says",
    [
        ("s1\n\nx9\ny", r"ids\.txt, line 3: id 'x9' is not in the set of 5 samples"),
        ("s1\ns2\n#\ns1\n", r"ids\.txt, line 4: id 's1' stands on line 1 already"),
        ("# nothing\n\n", r"ids\.txt: lists no id"),
        (b"\xff\xfe", r"ids\.txt: not UTF-8 text"),
    ],
)
def test_bad_id_list(tmp_path: Path, content: str | bytes, says: str) -> None:
    with pytest.raises(InputError, match=says):
        select(examples(5), write_ids(tmp_path / "ids.txt", content), 0)


def test_missing_id_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: cannot be read \(No such file or directory\)"):
        select(examples(5), SelectConfig(method="ids", ids=str(tmp_path / "gone.txt")), 0)


def test_stage_writes_ids_and_scores(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    full = read_set("demo", "train")
    ids = stage.run(tmp_path / "seed0", full, SelectConfig(), 0)
    assert len(ids) == 100 and (tmp_path / "seed0" / "ids.txt").read_text().split() == ids
    table = parquet.read_table(tmp_path / "seed0" / "scores.parquet").to_pydict()
    assert table["id"] == [e.id for e in full] and table["source"] == [e.source for e in full]
    assert [name for name, kept in zip(table["id"], table["kept"]) if kept] == ids
    assert table["score"] == select(full, SelectConfig(), 0)[1]
    assert {p.name for p in (tmp_path / "seed0").iterdir()} == {
        "config.json",
        "ids.txt",
        "scores.parquet",
        "timing.json",
        "manifest.json",
    }
    assert capfd.readouterr() == ("", "")
    again = write_ids(tmp_path / "list.txt", (tmp_path / "seed0" / "ids.txt").read_bytes())
    assert stage.run(tmp_path / "again", full, again, 0) == ids  # its output is a list for method `ids`


def test_stage_is_reused_and_bound_to_its_settings(tmp_path: Path) -> None:
    full, folder = examples(40), tmp_path / "out"
    ids = stage.run(folder, full, SelectConfig(fraction=0.1), 0)
    stamp = (folder / "scores.parquet").stat().st_mtime_ns
    assert stage.run(folder, full, SelectConfig(fraction=0.1), 0) == ids
    assert (folder / "scores.parquet").stat().st_mtime_ns == stamp
    for other in (
        lambda: stage.run(folder, full, SelectConfig(fraction=0.2), 0),
        lambda: stage.run(folder, full, SelectConfig(fraction=0.1), 1),
        lambda: stage.run(folder, full[:39], SelectConfig(fraction=0.1), 0),
    ):
        with pytest.raises(InputError, match="made with other settings"):
            other()


def test_stage_follows_the_list_and_not_its_place(tmp_path: Path) -> None:
    full, folder = examples(10), tmp_path / "out"
    stage.run(folder, full, write_ids(tmp_path / "a.txt", "s1\n"), 0)
    stage.run(folder, full, write_ids(tmp_path / "b.txt", "s1\n"), 0)
    assert str(tmp_path) not in (folder / "config.json").read_text()
    with pytest.raises(InputError, match="made with other settings"):
        stage.run(folder, full, write_ids(tmp_path / "a.txt", "s2\n"), 0)


def test_stage_writes_nothing_on_bad_input(tmp_path: Path) -> None:
    config = write_ids(tmp_path / "ids.txt", "nobody")
    with pytest.raises(InputError):
        stage.run(tmp_path / "out", examples(5), config, 0)
    assert not (tmp_path / "out").exists()


def test_stage_resumes_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full, config = examples(40), SelectConfig(fraction=0.1)

    def die(*_: object) -> bytes:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stage, "score_table", die)
        with pytest.raises(KeyboardInterrupt):
            stage.run(tmp_path / "torn", full, config, 0)
    assert not (tmp_path / "torn" / "manifest.json").exists()
    stage.run(tmp_path / "torn", full, config, 0)
    stage.run(tmp_path / "whole", full, config, 0)
    assert folder_digest(tmp_path / "torn") == folder_digest(tmp_path / "whole")
