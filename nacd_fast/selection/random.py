"""Random subsets: every sample draws a uniform number, the largest are kept; so no sample is drawn twice."""

import random
from collections.abc import Sequence

import numpy as np

from ..config import SelectConfig
from ..examples import Example
from .method import Context, Selected, best


def draws(samples: int, seed: int) -> np.ndarray:
    """One number in [0, 1) a sample: the same on every platform and Python version."""
    draw = random.Random(seed)
    return np.array([draw.random() for _ in range(samples)])


def select(pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> Selected:
    """round(fraction * n) samples, at least 1. For one seed, a larger fraction's subset holds the smaller one's."""
    return best(pool, draws(len(pool), seed), config.fraction)
