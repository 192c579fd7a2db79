"""The arithmetic of the format in NumPy, against the machine's float32 operations and simple definitions."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from nacd_fast import codec_format as form
from nacd_fast.codec_format import CodecError, Words

Operation = Callable[[NDArray, NDArray], NDArray]


def some_words(seed: int) -> Words:
    """Random bits, a third of them subnormal."""
    words = np.random.default_rng(seed).integers(0, 2**32, 200_000, np.uint32)
    words[::3] &= 0x80FFFFFF
    return words


def assert_same_floats(got: Words, expected: Words) -> None:
    nan = expected & 0x7FFFFFFF > 0x7F800000
    np.testing.assert_array_equal(got & 0x7FFFFFFF > 0x7F800000, nan)
    np.testing.assert_array_equal(got[~nan], expected[~nan])


def test_words_widen_to_their_values_and_back() -> None:
    words = some_words(0)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(form.widen(words), words.view(np.float32).astype(np.float64))
    assert_same_floats(form.narrow(form.widen(words)), words)
    assert form.number(0x80000001) == -(2.0**-149)


@pytest.mark.parametrize("operation", [np.add, np.subtract, np.multiply, np.divide])
def test_operations_round_as_float32(operation: Operation) -> None:
    x, y = some_words(1), np.random.default_rng(2).permutation(some_words(1))
    with np.errstate(all="ignore"):
        expected = operation(x.view(np.float32), y.view(np.float32)).view(np.uint32)
        assert_same_floats(form.narrow(operation(form.widen(x), form.widen(y))), expected)


def test_values_between_two_floats_go_to_the_even_one() -> None:
    for word in (0x3F800000, 0x3F800001, 0x00000001, 0x00000002, 0x007FFFFF, 0x7F7FFFFF, 0x80000000):
        low, high = form.number(word), form.number(word + 1)
        middle = (low + high) / 2 if np.isfinite(high) else 2.0**128 - 2.0**103
        even = word if word % 2 == 0 else word + 1
        assert form.narrow(np.array([middle, -middle])).tolist() == [even, even ^ 1 << 31]


def test_integers_are_in_the_order_of_the_floats() -> None:
    words = some_words(3)
    words = words[~np.isnan(words.view(np.float32))]
    for zero_bits in (0, 16):
        cut = words >> np.uint32(zero_bits) << np.uint32(zero_bits)
        x = form.ordered(cut, zero_bits)
        by_value = x[np.argsort(cut.view(np.float32), kind="stable")]
        assert np.all(np.diff(by_value.astype(np.int64)) >= -1)  # -0 is below 0, but equal to it
        np.testing.assert_array_equal((form.reorder(x, zero_bits) << zero_bits).view(np.uint32), cut)


def test_bfloat16_predictions_round_to_even() -> None:
    a = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF818000], np.uint32)
    p = form.predict(16, np.zeros(5), a, a, 5)
    assert [hex(x) for x in p] == ["0x3f800000", "0x3f820000", "0x3f810000", "0x3f800000", "0xbf820000"]


def test_canonical_codes_are_prefix_free_and_in_order() -> None:
    lengths = np.zeros(256, np.uint8)
    lengths[[5, 7, 9, 200]] = [2, 1, 3, 3]
    codes = form.canonical_codes(lengths)
    assert [(int(codes[s]), int(lengths[s])) for s in (7, 5, 9, 200)] == [(0, 1), (0b01, 2), (0b011, 3), (0b111, 3)]
    form.canonical_codes(np.zeros(256, np.uint8))
    lengths[0] = 11
    with pytest.raises(CodecError, match="no prefix code"):
        form.canonical_codes(lengths)


def bit_by_bit(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


@pytest.mark.parametrize("size", [0, 1, 3, 4, 5, 127, 128, 129, 255, 257, 4095, 8193])
def test_checksums_are_those_of_the_definition(size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert form.crc32c(data) == bit_by_bit(data.tobytes())
    assert form.crc32c(data, 0x12345678) == bit_by_bit(data.tobytes(), 0x12345678)
