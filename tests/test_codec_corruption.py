"""Frames whose bytes changed or are missing: always an error, never other weights, whatever the place.

csrc/fuzz looks for what bytes that pass the checksums can do; this is about those that do not.
"""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from nacd_fast import codec

Words = NDArray[np.uint32]
COUNT = codec.TILE + 5
CHANGES = (0x01, 0x80, 0xFF)  # to a byte, as an exclusive or


def frames() -> Iterator[tuple[str, NDArray[np.uint8], list[Words]]]:
    """Small frames of each predictor and mode, with their references."""
    random = np.random.default_rng(0)
    weights = random.normal(0, 0.02, COUNT)
    near = weights + random.normal(0, 1e-4, COUNT)
    near[::50] *= 1e-5  # zero cells and exceptions
    a, words = weights.astype(np.float32).view(np.uint32), near.astype(np.float32).view(np.uint32)
    b = (weights + random.normal(0, 1e-3, COUNT)).astype(np.float32).view(np.uint32)
    bits = random.integers(0, 2**32, COUNT, dtype=np.uint32)
    half = np.uint32(0xFFFF0000)
    yield "key", codec.encode(words).data, []
    yield "previous", codec.encode(words, [a]).data, [a]
    yield "linear", codec.encode(words, [a, b]).data, [a, b]
    yield "bounded", codec.encode(words, [a], runs=[(0, 1e-3, 4.9e-4), (1, 1e-4, 4.9e-5)]).data, [a]
    yield "bfloat16", codec.encode(words & half, [a & half], zero_bits=16).data, [a & half]
    yield "raw", codec.encode(bits).data, []
    yield "same", codec.encode(a, [a]).data, [a]
    yield "empty", codec.encode(a[:0]).data, []


FRAMES = {name: (frame, references) for name, frame, references in frames()}


@pytest.mark.parametrize("name", FRAMES)
def test_every_changed_byte_is_an_error(name: str) -> None:
    frame, references = FRAMES[name]
    padded = np.concatenate([frame, np.zeros(codec.SLACK, np.uint8)])
    out = np.empty(len(references[0]) if references else codec.read_info(frame).count, np.uint32)
    missed = []
    for place in range(len(frame)):
        for change in CHANGES:
            padded[place] ^= change
            try:
                codec.decode(padded, references, out=out)
                missed.append((place, change))
            except codec.CodecError:
                pass
            padded[place] ^= change
    assert missed == []
    codec.decode(padded, references, out=out, verify=True)


@pytest.mark.parametrize("name", FRAMES)
def test_every_shorter_frame_is_an_error(name: str) -> None:
    frame, references = FRAMES[name]
    for length in range(len(frame)):
        with pytest.raises(codec.CodecError):
            codec.decode(frame[:length], references)


@pytest.mark.parametrize("name", FRAMES)
def test_a_frame_may_begin_anywhere(name: str) -> None:
    frame, references = FRAMES[name]
    expected = codec.decode(frame, references)
    for offset in range(1, 9):
        moved = np.concatenate([np.zeros(offset, np.uint8), frame, np.zeros(codec.SLACK, np.uint8)])[offset:]
        np.testing.assert_array_equal(codec.decode(moved, references, verify=True), expected)


def test_words_in_between_are_refused() -> None:
    words = np.zeros(9, np.uint8)[1:].view(np.uint32)  # the core reads four bytes at once, from multiples of four
    with pytest.raises(ValueError, match=r"words is uint32 \[2\], must be a contiguous, aligned array"):
        codec.encode(words)
