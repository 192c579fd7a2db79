"""DSIR (Xie et al., arXiv 2302.03169): importance resampling on hashed n-grams, by the authors' data-selection.

The log importance weight of a sample is what its unigrams and bigrams, hashed to 10,000 buckets, say for the target
against the pool; adding Gumbel noise and taking the largest is sampling without replacement by these weights. Short
samples are not left out, as instruction sets are made of them (the package's default leaves out those below 100 words).
"""

import contextlib
import io
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ..config import SelectConfig
from ..examples import Example, full_text
from .method import Context, Selected, best

ALONE = 20_000  # samples that one process does at once: starting others takes seconds


def select(pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> Selected:
    """The noised log weights are the scores."""
    weights = log_weights([full_text(e) for e in pool], [full_text(e) for e in context.target])
    return best(pool, weights + np.random.default_rng(seed).gumbel(size=len(pool)), config.fraction)


def log_weights(pool: Sequence[str], target: Sequence[str]) -> np.ndarray:
    """The log importance weight of every text of the pool, float64."""
    from data_selection import HashedNgramDSIR
    from nltk.tokenize import WordPunctTokenizer

    texts = {"pool": pool, "target": target}
    processes = processes_for(len(pool))
    with tempfile.TemporaryDirectory() as cache, quiet():
        dsir = HashedNgramDSIR(
            ["pool"],
            ["target"],
            cache,
            raw_load_dataset_fn=texts.__getitem__,
            raw_parse_example_fn=None,
            target_load_dataset_fn=texts.__getitem__,
            target_parse_example_fn=None,
            num_proc=processes,
            min_example_length=0,
        )
        dsir.tokenizer = WordPunctTokenizer().tokenize  # a used one does not survive the way to another process
        dsir.fit_importance_estimator(num_tokens_to_fit="all")
        dsir.compute_importance_weights()
        found = np.empty(len(pool))
        for shard in range(processes):  # process i has every processes-th text from the i-th
            found[shard::processes] = np.load(Path(cache) / "log_importance_weights" / f"{shard}.npy")
    return found


def processes_for(samples: int) -> int:
    return 1 if samples <= ALONE else len(os.sched_getaffinity(0))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The package's bars are not shown."""
    before = os.environ.get("TQDM_DISABLE")
    os.environ["TQDM_DISABLE"] = "1"  # for processes that it starts
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        os.environ.pop("TQDM_DISABLE")
        if before is not None:
            os.environ["TQDM_DISABLE"] = before
