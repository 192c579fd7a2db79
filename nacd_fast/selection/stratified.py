"""Random subsets in which every source has its share of the pool, to within one sample (largest remainders)."""

from collections.abc import Sequence

import numpy as np

from ..config import SelectConfig
from ..examples import Example
from .method import Context, Selected, kept_count, tasks
from .random import draws


def quotas(sizes: np.ndarray, total: int) -> np.ndarray:
    """How many of each stratum [S], in sum `total`: whole parts, then the largest remainders; of equal ones the first.

    sizes [S] whole numbers with sum >= total; none gets more than it has.
    """
    exact = sizes * (total / sizes.sum())
    found = np.floor(exact).astype(np.int64)
    further = np.argsort(-(exact - found), kind="stable")[: total - found.sum()]
    found[further] += 1
    return found


def select(pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> Selected:
    """round(fraction * n) samples; within a source those with the largest uniform numbers."""
    scores, strata = draws(len(pool), seed), list(tasks(pool).values())
    numbers = quotas(np.array([len(places) for places in strata]), kept_count(len(pool), config.fraction))
    kept = [i for places, n in zip(strata, numbers) for i in sorted(places, key=lambda i: -scores[i])[:n]]
    return Selected([pool[i].id for i in sorted(kept)], scores.tolist())
