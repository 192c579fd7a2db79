"""Random subsets: every sample draws a uniform number, the largest are kept; so no sample is drawn twice."""

import random
from collections.abc import Sequence

from ..config import SelectConfig
from ..data import Example


def select(examples: Sequence[Example], config: SelectConfig, seed: int) -> tuple[list[str], list[float]]:
    """round(fraction * n) samples, at least 1. For one seed, a larger fraction's subset holds the smaller one's."""
    draw = random.Random(seed)  # its random() is the same on every platform and Python version
    scores = [draw.random() for _ in examples]
    count = max(1, round(config.fraction * len(examples)))
    kept = sorted(range(len(examples)), key=lambda i: -scores[i])[:count]
    return [examples[i].id for i in sorted(kept)], scores
