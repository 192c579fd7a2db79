"""What the reference checks beyond the native decoder, how it codes, and that its codes are the shortest."""

from copy import deepcopy
from fractions import Fraction

import numpy as np
import pytest

from nacd_fast import codec, codec_reference
from nacd_fast import codec_format as form
from nacd_fast.codec import BLOCK, TILE, CodecError, Words
from nacd_fast.codec_reference_encoder import code_lengths
from tests.frames import FrameParts, snapshots, take_apart, using


@pytest.fixture(scope="module")
def case() -> tuple[FrameParts, Words, Words]:
    """A frame, its words and its reference."""
    words, a, _ = snapshots("smooth", 9000, 1)
    with using("reference"):
        return take_apart(codec.encode(words, [a]).data), words, a


def assert_refused(frame: FrameParts, a: Words) -> None:
    with using("reference"), pytest.raises(CodecError, match="a stream that does not fit its tiles"):
        codec.decode(frame.build(), [a])


def test_a_stream_of_another_length_is_refused(case: tuple[FrameParts, Words, Words]) -> None:
    for change in (-1, 1):
        frame = deepcopy(case[0])
        block = frame.blocks[0]
        sizes = block.stream_sizes.astype(np.int64) + [change, -change, 0, 0, 0]  # the sum stays
        block.stream_sizes = sizes.astype("<u2")
        assert_refused(frame, case[2])


def test_bits_that_begin_no_code_are_refused(case: tuple[FrameParts, Words, Words]) -> None:
    frame = deepcopy(case[0])
    frame.lengths[:] = 0
    frame.lengths[0] = 11  # one code, of zeros
    assert_refused(frame, case[2])


def test_the_last_of_two_exceptions_at_one_place_stays(case: tuple[FrameParts, Words, Words]) -> None:
    frame, words, a = deepcopy(case[0]), case[1].copy(), case[2]
    block = frame.blocks[0]
    block.apart = np.array([(8, 1), (7, 2), (8, 3)], form.EXCEPTION).view(np.uint8)
    block.exceptions = 3
    assert len(take_apart(frame.build()).blocks[0].apart) == 18
    words[[7, 8]] = [2, 3]
    with using("reference"):
        np.testing.assert_array_equal(codec.decode(frame.build(), [a]), words)


def test_many_blocks_are_decoded_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    words, *references = snapshots("smooth", 4 * BLOCK + 1, 2)
    frame = codec.encode(words, references).data
    monkeypatch.setattr(codec_reference, "BLOCKS_AT_ONCE", 2)
    with using("reference"):
        np.testing.assert_array_equal(codec.decode(frame, references, verify=True), words)
        own = slice(BLOCK, 4 * BLOCK)
        got = codec.decode(frame, [x[own] for x in references], blocks=range(1, 4), verify=True)
    np.testing.assert_array_equal(got, words[own])


@pytest.mark.parametrize(("kind", "modes"), [("smooth", range(form.INTEGER)), ("identical", [form.SAME])])
def test_tiles_take_the_mode_that_suits_them(kind: str, modes: range | list[int]) -> None:
    words, a, _ = snapshots(kind, 8 * TILE, 3)
    with using("reference"):
        frame = take_apart(codec.encode(words, [a]).data)
    assert set(frame.blocks[0].modes.tolist()) <= set(modes)


def test_random_bits_grow_little() -> None:
    words, a, _ = snapshots("random bits", BLOCK, 3)
    with using("reference"):
        assert len(codec.encode(words, [a]).data) < 1.003 * words.nbytes


def test_bfloat16_takes_integer_tiles() -> None:
    words, a, _ = snapshots("smooth", 8 * TILE, 4, 16)
    with using("reference"):
        encoded = codec.encode(words, [a], zero_bits=16)
    modes = take_apart(encoded.data).blocks[0].modes
    assert np.all((modes >= form.INTEGER) & (modes < form.SAME))
    assert len(encoded.data) < words.nbytes / 2 / 1.5


@pytest.mark.parametrize("used", [0, 1, 2, 3, 200, 256])
def test_codes_are_short_and_at_most_eleven_bits(used: int) -> None:
    rng = np.random.default_rng(used)
    histogram = np.zeros(form.SYMBOLS, np.int64)
    histogram[rng.permutation(form.SYMBOLS)[:used]] = np.exp(rng.uniform(0, 30, used)).astype(np.int64) + 1
    lengths = code_lengths(histogram)
    assert np.array_equal(lengths > 0, histogram > 0) and lengths.max() <= form.CODE_BITS
    form.canonical_codes(lengths)
    if used > 1:  # every code is taken
        assert sum(Fraction(1, 2 ** int(length)) for length in lengths if length) == 1


def test_codes_are_the_shortest() -> None:
    histogram = np.zeros(form.SYMBOLS, np.int64)
    histogram[:6] = [45, 13, 12, 16, 9, 5]  # Cormen et al., Introduction to Algorithms, 16.3
    assert code_lengths(histogram)[:6].tolist() == [1, 3, 3, 3, 4, 4]
    fibonacci = [1, 1]
    while len(fibonacci) < 16:
        fibonacci.append(fibonacci[-1] + fibonacci[-2])
    histogram[:16] = fibonacci  # a free code would take 15 bits
    lengths = code_lengths(histogram)[:16]
    assert lengths.max() == 11 and np.all(np.diff(lengths.astype(int)) <= 0)
