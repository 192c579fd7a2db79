"""Dataset quantization against the greedy definition, and its embeddings against the model's own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nacd_fast.config import DqConfig, SelectConfig
from nacd_fast.data import encode_set
from nacd_fast.errors import InputError
from nacd_fast.selection import check, dq, select
from nacd_fast.selection.embeddings import embed
from nacd_fast.student import load_model
from tests.selection.pools import context
from tests.tiny import make_examples, make_model


def unit_points(n: int, d: int, seed: int) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(n, d))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def greedy(points: np.ndarray, bins: int) -> list[list[int]]:
    """The definition: each gain from all pairs anew, each bin from what the earlier ones left."""
    similarity = points @ points.T
    left, found = list(range(len(points))), []
    for b in range(bins):
        size, rest = len(points) // bins + (b < len(points) % bins), list(left)
        mine: list[int] = []
        for _ in range(size):
            gains = [
                similarity[rest, x].sum() - 2 * similarity[mine, x].sum() if x not in mine else -np.inf for x in rest
            ]
            mine.append(rest[int(np.argmax(gains))])
        found.append(mine)
        left = [x for x in left if x not in mine]
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 6), st.integers(1, 7), st.integers(0, 1000))
def test_bins_are_those_of_the_greedy_definition(n: int, d: int, bins: int, seed: int) -> None:
    bins = min(bins, n)
    points = np.random.default_rng(seed).integers(-3, 4, (n, d)).astype(np.float64)  # exact sums, many ties
    found, gains = dq.bins_of(points, bins)
    assert [b.tolist() for b in found] == greedy(points, bins)
    for b in found:
        assert np.all(np.isfinite(gains[b]))
    assert sorted(np.concatenate(found).tolist()) == list(range(n))


def test_the_first_bin_stands_for_the_set_and_the_last_for_the_rest() -> None:
    centre, far = unit_points(1, 8, 0)[0], unit_points(6, 8, 1)
    cloud = centre + 0.1 * unit_points(30, 8, 2)
    points = np.concatenate([far, cloud / np.linalg.norm(cloud, axis=1, keepdims=True)])
    found, _ = dq.bins_of(points, 6)
    assert found[0].min() >= 6  # no outlier
    assert {0, 1, 2, 3, 4, 5} <= set(np.concatenate(found[3:]).tolist())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(tmp_path_factory.mktemp("model"))


def test_kept_samples_come_evenly_from_the_bins(model: str) -> None:
    pool, given = make_examples(60), context(model=model)
    config = SelectConfig(method="dq", fraction=0.3, dq=DqConfig(bins=5, batch=7))
    ids, scores = select(pool, config, 3, given)
    assert len(ids) == len(set(ids)) == 18 and ids == [e.id for e in pool if e.id in set(ids)] and len(scores) == 60
    order = np.random.default_rng(3).permutation(60)
    bins, _ = dq.bins_of(embed(pool, given, 7).astype(np.float64)[order], 5)
    kept = [sum(pool[order[i]].id in ids for i in b) for b in bins]
    assert sorted(kept) == [3, 3, 4, 4, 4]
    assert select(pool, config, 3, given) == (ids, scores) and select(pool, config, 4, given).ids != ids


def test_blocks_are_quantised_by_themselves(model: str) -> None:
    pool = make_examples(50)
    config = SelectConfig(method="dq", fraction=0.2, dq=DqConfig(bins=2, block=20, batch=50))
    ids, scores = select(pool, config, 0, context(model=model))
    order = np.random.default_rng(0).permutation(50)
    for block in np.array_split(order, 3):
        assert sum(pool[i].id in ids for i in block) in (3, 4)
        points = embed(pool, context(model=model), 50).astype(np.float64)[block]
        np.testing.assert_allclose(np.array(scores)[block], dq.bins_of(points, 2)[1])


def test_embeddings_are_mean_hidden_states_of_unit_length(model: str) -> None:
    pool, given = make_examples(9), context(model=model)
    found = embed(pool, given, 4)
    base, tokenizer = load_model(model, device="cpu")
    for row, encoded in zip(found, encode_set(pool, tokenizer, given.data)):
        hidden = base.get_decoder()(torch.tensor([encoded.input_ids])).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(row, (hidden / hidden.norm()).detach().numpy(), atol=2e-6)


def test_a_sample_that_does_not_fit_the_model(model: str) -> None:
    pool = make_examples(3)
    long = [{"role": "user", "content": "river " * 80}, pool[0].messages[1]]
    pool.append(type(pool[0])("long", "s", tuple(long)))
    with pytest.raises(InputError, match=r"sample 'long': .* the model takes at most 64"):
        check(pool, SelectConfig(method="dq"), context(model=model))


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gone"):
        check(make_examples(3), SelectConfig(method="dq"), context(model=str(tmp_path / "gone")))
