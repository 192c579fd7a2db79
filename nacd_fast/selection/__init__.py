"""Which samples of the full set are kept: one file a method, each with the signature of method.py."""

from collections.abc import Sequence

from ..config import AIMED, SelectConfig
from ..errors import InputError
from ..examples import Example
from . import bm25, dq, dsir, ids, less, random, stratified
from .method import Context, Method, Selected

METHODS: dict[str, Method] = {
    "random": random.select,
    "stratified": stratified.select,
    "bm25": bm25.select,
    "dsir": dsir.select,
    "less": less.select,
    "dq": dq.select,
    "ids": ids.select,
}


LEARNED = ("less", "dq")  # those that look through a model


def select(pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> Selected:
    """The kept ids and everybody's scores, by the method that config names."""
    return METHODS[config.method](pool, config, seed, context)


def check(pool: Sequence[Example], config: SelectConfig, context: Context) -> None:
    """What can be told before anything is computed or written. Raises InputError."""
    if not pool:
        raise InputError("select: the set is empty; there is nothing to keep")
    if config.method in AIMED and not context.target:
        raise InputError("select.target: the target is empty: must have at least one sample")
    if config.method == "ids":
        ids.listed(pool, config.ids)
    elif config.method == "less":
        less.check(pool, config.less, context)
    elif config.method == "dq":
        dq.check(pool, context)
