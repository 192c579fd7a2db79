"""BM25 and DSIR against their packages called plainly, and against the formulas."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nacd_fast.config import SelectConfig
from nacd_fast.examples import full_text
from nacd_fast.forms import read_set
from nacd_fast.selection import dsir, select
from tests.selection.pools import context, spoken

POOL = spoken(
    "why is the river green|the stone is green",
    "where is the cat|under the stone",
    "why does iron rust|oxygen reacts with iron and water",
    "name a planet|mars is a red planet of iron oxide",
    "cat|dog",
)
TARGET = [*spoken("why does copper turn green|copper reacts with oxygen", source="t")]
TASKS = [*TARGET, *spoken("where does iron sleep|a cat sleeps under the stone", "name a dog|dog and iron", source="u")]


def test_bm25_is_the_best_task_s_mean() -> None:
    import bm25s

    found = select(POOL, SelectConfig(method="bm25", target="t", fraction=0.4), 0, context(TASKS))
    index = bm25s.BM25()
    index.index(bm25s.tokenize([full_text(e) for e in POOL], show_progress=False), show_progress=False)
    known = index.vocab_dict
    means = []
    for task in (TASKS[:1], TASKS[1:]):
        words = bm25s.tokenize([full_text(e) for e in task], return_ids=False, show_progress=False)
        means.append(np.mean([index.get_scores([w for w in query if w in known]) for query in words], axis=0))
    want = np.maximum(*means)
    np.testing.assert_allclose(found.scores, want, rtol=1e-6)
    assert found.ids == [POOL[i].id for i in sorted(np.argsort(-want, kind="stable")[:2])]


def test_bm25_by_the_formula() -> None:
    """Lucene's: idf = log(1 + (n - df + 0.5) / (df + 0.5)), tf over tf + k1 (1 - b + b length / mean length)."""
    pool = spoken("iron rust|water", "iron iron|planet mars", "cat|dog")
    found = select(pool, SelectConfig(method="bm25", target="t"), 0, context(spoken("iron|mars", source="t")))
    words = [full_text(e).split() for e in pool]
    mean = sum(map(len, words)) / len(words)
    for got, document in zip(found.scores, words):
        score = 0.0
        for word in ("iron", "mars"):
            df, tf = sum(word in d for d in words), document.count(word)
            idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
            score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(document) / mean))
        assert got == pytest.approx(score, rel=1e-5)


def test_a_target_without_a_known_word_scores_nothing() -> None:
    found = select(POOL, SelectConfig(method="bm25", target="t"), 0, context(spoken("xyzzy|plugh", source="t")))
    assert found.scores == [0.0] * len(POOL) and found.ids == [POOL[0].id]  # ties take the earlier


def plain_dsir(folder: Path, pool: list[str], target: list[str]) -> Any:
    from data_selection import HashedNgramDSIR

    sets = {"pool": pool, "target": target}
    dsir = HashedNgramDSIR(
        ["pool"],
        ["target"],
        str(folder),
        raw_load_dataset_fn=lambda name: [{"text": text} for text in sets[name]],
        target_load_dataset_fn=lambda name: [{"text": text} for text in sets[name]],
        num_proc=1,
        min_example_length=0,
    )
    dsir.fit_importance_estimator()
    dsir.compute_importance_weights()
    return dsir


def test_dsir_is_the_package_s_own_resampling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same noise the package keeps the same samples."""
    full, target = read_set("demo", "train")[:200], read_set("demo", "validation")[:20]
    found = select(full, SelectConfig(method="dsir", target="t", fraction=0.1), 5, context(target))
    plain = plain_dsir(tmp_path / "cache", [full_text(e) for e in full], [full_text(e) for e in target])
    weights = np.load(tmp_path / "cache" / "log_importance_weights" / "0.npy")
    noise = np.random.default_rng(5).gumbel(size=200)
    np.testing.assert_allclose(found.scores, weights + noise, rtol=1e-12)
    monkeypatch.setattr(np.random, "gumbel", lambda size: noise.reshape(size))
    plain.resample(str(tmp_path / "out"), 20, cache_dir=str(tmp_path / "part"))
    texts = (tmp_path / "out" / "0.jsonl").read_text().splitlines()
    assert len(texts) == 20
    assert Counter(json.loads(line)["text"] for line in texts) == Counter(
        full_text(e) for e in full if e.id in found.ids
    )


def test_dsir_in_several_processes_gives_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [full_text(e) for e in read_set("demo", "validation")[:101]]
    alone = dsir.log_weights(texts, texts[:9])
    monkeypatch.setattr(dsir, "processes_for", lambda samples: 3)
    np.testing.assert_array_equal(dsir.log_weights(texts, texts[:9]), alone)


def test_dsir_draws_by_its_weights() -> None:
    """Of two samples the one with weight w is drawn first in w / (w + v) of the seeds."""
    pool = spoken("iron|rust", "cat|dog")
    weights = dsir.log_weights([full_text(e) for e in pool], ["iron rust", "cat dog", "iron rust"])
    share = 1 / (1 + math.exp(weights[1] - weights[0]))
    assert 0.6 < share < 0.99
    config = SelectConfig(method="dsir", target="t", fraction=0.5)
    noise = np.stack([np.random.default_rng(seed).gumbel(size=2) for seed in range(4000)])
    drawn = ((weights + noise).argmax(1) == 0).mean()
    assert abs(drawn - share) < 4 * math.sqrt(share * (1 - share) / 4000)
    found = select(pool, config, 7, context(spoken("iron|rust", "cat|dog", "iron|rust", source="t")))
    assert found.ids == [pool[int(np.argmax(found.scores))].id]


def test_dsir_shows_no_bars(capfd: pytest.CaptureFixture[str]) -> None:
    dsir.log_weights(["a b", "c"], ["a"])
    assert capfd.readouterr() == ("", "")
