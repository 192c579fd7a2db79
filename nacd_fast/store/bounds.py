"""The bounded-error mode: how far each tensor may be off, and what of it a record keeps.

A tensor's bound is eps times the RMS of its change since the snapshot before, as that one is stored. Its weights become
multiples of 2 * bound, so that each is at most `bound` off, now and in every later encoding: the multiples are those of
the weight and not of its change. The first snapshot, and tensors that are as they were or not finite, have bound 0.

The table behind a frame holds one float32 a tensor, in the order of the names. Without a table all bounds are 0.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..codec import TILE, CodecError
from .schema import Schema, Words

Bounds = NDArray[np.float32]  # one a tensor
Runs = list[tuple[int, float, float]]  # first tile, step, tolerance

MARGIN = 1e-3  # of the step, for the rounding of float32
SMALLEST, LARGEST = 1e-30, 1e30  # bounds whose steps and their inverses are ordinary numbers


def bounds_of(words: Words, before: Words, schema: Schema) -> Bounds:
    """eps x RMS of each tensor's change; 0 where that is 0 or not finite."""
    bounds = np.zeros(len(schema.tensors), np.float32)
    for i, place in enumerate(schema.slices.values()):
        if place.stop > place.start:
            with np.errstate(all="ignore"):
                change = words[place].view(np.float32).astype(np.float64) - before[place].view(np.float32)
                bounds[i] = schema.eps * np.sqrt(np.mean(change * change))
    bounds[~((bounds > SMALLEST) & (bounds < LARGEST))] = 0
    return bounds


def runs_of(bounds: Bounds, schema: Schema, *, exact: bool) -> Runs:
    """What the codec is asked for. A tile in two tensors takes the smaller bound.

    exact: the words are multiples already and stay what they are.
    """
    tiles = np.full(-(-schema.count // TILE), np.inf, np.float32)
    for bound, place in zip(bounds, schema.slices.values(), strict=True):
        if place.stop > place.start:
            mine = tiles[place.start // TILE : (place.stop - 1) // TILE + 1]
            np.minimum(mine, bound, out=mine)
    if not tiles.any():
        return []
    firsts = np.flatnonzero(np.diff(tiles, prepend=np.float32(-1)))
    return [
        (int(first), 2 * bound * (1 - MARGIN) if bound else 1.0, 0.0 if exact else bound)
        for first, bound in zip(firsts, tiles[firsts].tolist())
    ]


def to_table(bounds: Bounds) -> NDArray[np.uint8]:
    return bounds.astype("<f4").view(np.uint8) if bounds.any() else np.empty(0, np.uint8)


def from_table(table: NDArray[np.uint8], schema: Schema) -> Bounds:
    """The bounds of a record. Raises CodecError for a table that does not fit."""
    if len(table) == 0:
        return np.zeros(len(schema.tensors), np.float32)
    if len(table) != 4 * len(schema.tensors):
        raise CodecError(f"{len(table)} bytes of bounds for {len(schema.tensors)} tensors")
    bounds = table.view("<f4").astype(np.float32)
    if not np.all((bounds >= 0) & (bounds < LARGEST)):
        raise CodecError("bounds that are no sizes of errors")
    return bounds


def by_name(bounds: Bounds, schema: Schema) -> Mapping[str, float]:
    return dict(zip(schema.tensors, bounds.tolist(), strict=True))
