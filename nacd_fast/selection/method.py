"""What every selection method takes and gives.

    select(pool, config, seed, context) -> Selected(ids, scores)

ids: the kept samples, in the pool's order; scores: one for every sample, in its order, larger where the method would
rather keep it. Deterministic for one seed on one machine.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import DataConfig, ModelConfig, SelectConfig
from ..data import encode_set
from ..examples import Example
from ..student import max_positions
from ..training import check_lengths


class Selected(NamedTuple):
    ids: list[str]
    scores: list[float]


@dataclass(frozen=True)
class Context:
    """What some methods need beside the pool."""

    target: Sequence[Example]
    """Samples of what is to be learned; each of its sources is a task of its own."""
    model: ModelConfig
    """The model that is looked through."""
    data: DataConfig
    """How samples become tokens for it."""
    store: Path
    """Folder for what takes long and serves again: LESS's warm-up and gradients."""


Method = Callable[[Sequence[Example], SelectConfig, int, Context], Selected]


def kept_count(samples: int, fraction: float) -> int:
    """round(fraction * samples), at least 1."""
    return max(1, round(fraction * samples))


def best(pool: Sequence[Example], scores: np.ndarray, fraction: float) -> Selected:
    """The samples with the highest scores; of equal ones the earlier."""
    kept = np.argsort(-scores, kind="stable")[: kept_count(len(pool), fraction)]
    return Selected([pool[i].id for i in np.sort(kept)], scores.tolist())


def check_fit(
    examples: Sequence[Example], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: Context
) -> None:
    """Raise InputError if a sample is longer than the model takes."""
    rows = encode_set(examples, tokenizer, context.data)
    check_lengths([e.id for e in examples], rows, [0] * len(rows), max_positions(model))


def tasks(target: Sequence[Example]) -> dict[str, list[int]]:
    """Places of the target's samples by their source."""
    places: dict[str, list[int]] = {}
    for i, example in enumerate(target):
        places.setdefault(example.source, []).append(i)
    return places
