"""BM25 (Robertson and Zaragoza 2009): the samples that share the rarest words with the target; by bm25s.

A sample's score is its mean over the queries, which are the target's samples; of a target of several tasks, that of the
task it fits best, as LESS has it.
"""

from collections.abc import Sequence

import numpy as np

from ..config import SelectConfig
from ..examples import Example, full_text
from ..progress import progress_bar
from .method import Context, Selected, best, tasks


def select(pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> Selected:
    """The best of the samples by BM25; nothing is drawn."""
    import bm25s

    words = bm25s.tokenize([full_text(e) for e in pool], show_progress=False)
    index = bm25s.BM25()
    index.index(words, show_progress=False)
    queries = bm25s.tokenize([full_text(e) for e in context.target], return_ids=False, show_progress=False)
    scores = np.full(len(pool), -np.inf)
    with progress_bar("BM25", len(queries)) as bar:
        for places in tasks(context.target).values():
            total = np.zeros(len(pool))
            for place in places:
                known = [word for word in queries[place] if word in index.vocab_dict]
                total += index.get_scores(known) if known else 0.0
                bar.advance()
            scores = np.maximum(scores, total / len(places))
    return best(pool, scores, config.fraction)
