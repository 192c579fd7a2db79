"""Random, stratified and listed subsets: sizes, shares, reproducibility, errors."""

import random
from collections import Counter
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nacd_fast.config import SelectConfig
from nacd_fast.errors import InputError
from nacd_fast.examples import Example
from nacd_fast.selection import METHODS, check, select
from nacd_fast.selection.method import Selected
from tests.selection.pools import context, numbered, write_ids


def chosen(full: list[Example], config: SelectConfig, seed: int) -> Selected:
    return select(full, config, seed, context())


def test_every_method_of_the_config_exists() -> None:
    assert set(get_args(get_type_hints(SelectConfig)["method"])) == set(METHODS)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.floats(0.001, 1), st.integers(0, 5))
def test_random_takes_its_share_without_repetition(n: int, fraction: float, seed: int) -> None:
    full = numbered(n)
    ids, scores = chosen(full, SelectConfig(fraction=fraction), seed)
    assert len(ids) == len(set(ids)) == max(1, round(fraction * n)) and len(scores) == n
    assert ids == [e.id for e in full if e.id in set(ids)]  # in the set's order
    kept, left = ([s for e, s in zip(full, scores) if (e.id in ids) is inside] for inside in (True, False))
    assert not left or min(kept) >= max(left)


def test_random_depends_on_the_seed_and_nothing_else() -> None:
    full, config = numbered(100), SelectConfig(fraction=0.05)
    assert chosen(full, config, 0)[0] == ["s17", "s29", "s49", "s62", "s94"]  # the same on every platform
    assert chosen(full, config, 0) == chosen(full, config, 0)
    assert chosen(full, config, 0) != chosen(full, config, 1)
    assert set(chosen(full, config, 0)[0]) < set(chosen(full, SelectConfig(fraction=0.2), 0)[0])


def test_random_is_uniform() -> None:
    counts = [0] * 20
    for seed in range(2000):
        for name in chosen(numbered(20), SelectConfig(fraction=0.2), seed)[0]:
            counts[int(name[1:])] += 1
    assert all(330 < count < 470 for count in counts)  # 400 expected, deviation 18


def test_empty_set_is_an_error() -> None:
    with pytest.raises(InputError, match="select: the set is empty"):
        check([], SelectConfig(), context())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.floats(0.001, 1), st.integers(0, 3))
def test_stratified_gives_every_source_its_share(sizes: list[int], fraction: float, seed: int) -> None:
    full = [Example(f"{s}-{i}", str(s), numbered(1)[0].messages) for s, n in enumerate(sizes) for i in range(n)]
    random.Random(0).shuffle(full)
    ids, _ = chosen(full, SelectConfig(method="stratified", fraction=fraction), seed)
    total = max(1, round(fraction * len(full)))
    assert len(ids) == len(set(ids)) == total and ids == [e.id for e in full if e.id in set(ids)]
    counts = Counter(name.split("-")[0] for name in ids)
    for s, n in enumerate(sizes):
        assert abs(counts[str(s)] - n * total / len(full)) < 1


def test_stratified_draws_as_random_does() -> None:
    full = numbered(100)
    ids, scores = chosen(full, SelectConfig(method="stratified", fraction=0.1), 3)
    assert scores == chosen(full, SelectConfig(fraction=0.1), 3).scores
    for source in ("odd", "even"):
        kept, left = (
            [s for e, s in zip(full, scores) if e.source == source and (e.id in ids) is k] for k in (True, False)
        )
        assert len(kept) == 5 and min(kept) > max(left)


def test_id_list(tmp_path: Path) -> None:
    config = write_ids(tmp_path / "ids.txt", "\ufeff# mine\r\n\r\ns7\r\n  s3  \r\n# s1\r\ns4")
    ids, scores = chosen(numbered(8), config, 0)
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
        check(numbered(5), write_ids(tmp_path / "ids.txt", content), context())


def test_missing_id_list(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.txt: cannot be read \(No such file or directory\)"):
        check(numbered(5), SelectConfig(method="ids", ids=str(tmp_path / "gone.txt")), context())
