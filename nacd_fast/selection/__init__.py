"""Which samples of the full set are kept. One file a method, one signature:

    select(examples, config, seed) -> (ids, scores)

ids: those kept, in the set's order; scores: one for every example of the set, in its order, larger where the method
would rather keep it. Deterministic for one seed, whatever the platform.
"""

from collections.abc import Callable, Sequence

from ..config import SelectConfig
from ..data import Example
from ..errors import InputError
from . import ids, random

Method = Callable[[Sequence[Example], SelectConfig, int], tuple[list[str], list[float]]]
METHODS: dict[str, Method] = {"random": random.select, "ids": ids.select}


def select(examples: Sequence[Example], config: SelectConfig, seed: int) -> tuple[list[str], list[float]]:
    """The kept ids and everybody's scores, by the method that config names."""
    if not examples:
        raise InputError("select: the set is empty; there is nothing to keep")
    return METHODS[config.method](examples, config, seed)
