"""What csrc/FORMAT.md defines, in NumPy: layouts, checksum, prefix codes and the arithmetic of predictions.

NumPy's float32 operations obey the thread's flush-to-zero flags, which a library or torch.set_flush_denormal may have
set; a prediction must not. So float32 words are widened to float64 by integer arithmetic where they are subnormal, and
rounded back the same way. float64 holds the sum and the product of two float32 values, or rounds them so finely that
rounding again to float32 gives what one float32 operation gives.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

MAGIC = int.from_bytes(b"NFRM", "little")
VERSION = 1
BLOCK, TILE, STREAM_TILES = 65536, 512, 4  # weights of a block, weights of a tile, tiles of a stream
MAX_COUNT = 2**40
MAX_BLOCK_BYTES = 2**20
SLACK = 4096  # no stream reads further past its end
CODE_BITS, SYMBOLS, MAX_TABLES = 11, 256, 4
ZERO_BITS = 27  # the field of a weight in cell 0
NONE, PREVIOUS, LINEAR = 0, 1, 2

# Tile modes: grid 0 .. 191, integer 192 .. 216, same 217, raw 218, step 219 .. 234.
GRID_BIAS, INTEGER, SAME, RAW, STEP, MODES = 118, 192, 217, 218, 219, 235

HEADER = np.dtype(
    [
        ("magic", "<u4"),
        ("version", "<u2"),
        ("predictor", "u1"),
        ("zero_bits", "u1"),
        ("count", "<u8"),
        ("bytes", "<u8"),
        ("alpha", "<u4"),  # a float32's word, as all floats here
        ("blocks", "<u4"),
        ("runs", "<u4"),
        ("tables", "<u4"),
        ("reserved", "<u4"),
        ("crc", "<u4"),
    ]
)
RUN = np.dtype([("first_tile", "<u4"), ("step", "<u4")])
ENTRY = np.dtype([("bytes", "<u4"), ("payload_crc", "<u4"), ("words_crc", "<u4")])
BLOCK_HEADER = np.dtype([("low_bytes", "<u4"), ("zeros", "<u4"), ("exceptions", "<u4")])
EXCEPTION = np.dtype([("index", "<u2"), ("word", "<u4")])

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint32]  # the bits of float32 values
Floats = NDArray[np.float64]  # the values, exactly
Integers = NDArray[np.int64]


class CodecError(ValueError):
    """A malformed frame. The message is a sentence without its subject: the caller knows the file and the step."""


def part(words: Words | None, own: slice) -> Words | None:
    return None if words is None else words[own]


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def has_symbols(modes: Bytes) -> NDArray[np.bool_]:
    return (modes != SAME) & (modes != RAW)


# Floats


def widen(words: Words) -> Floats:
    """The values of float32 words."""
    with np.errstate(invalid="ignore"):  # a signalling NaN
        values = words.view(np.float32).astype(np.float64)
    subnormal = np.copysign((words & 0x7FFFFF) * 2.0**-149, words.view(np.int32))
    return np.where(words & 0x7F800000, values, subnormal)


def number(word: int) -> float:
    """The value of one float32 word."""
    return float(widen(np.array([word], np.uint32))[0])


def narrow(values: Floats) -> Words:
    """The float32 words nearest to the values, ties to even; beyond the largest, infinity."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        words = values.astype(np.float32).view(np.uint32)
    magnitude = np.abs(values)
    tiny = magnitude < 2.0**-126
    subnormal = np.rint(np.where(tiny, magnitude, 0) * 2.0**149).astype(np.uint32)
    return np.where(tiny, subnormal | np.signbit(values).astype(np.uint32) << 31, words)


def rounded(values: Floats) -> Floats:
    """The values as float32 would hold them."""
    return widen(narrow(values))


def finite(words: Words) -> NDArray[np.bool_]:
    return (words & 0x7F800000) != 0x7F800000


def inverse(steps: Words) -> Floats:
    """1 / step, as float32."""
    with np.errstate(divide="ignore"):
        return rounded(1.0 / widen(steps))


# Predictions


def predict(zero_bits: int, alphas: Floats, a: Words | None, b: Words | None, count: int) -> Words:
    """The predicted words [count]: 0 without references, a with one, a + alphas (b - a) with two."""
    if a is None:
        return np.zeros(count, np.uint32)
    if b is None:
        return a
    start = widen(a)
    with np.errstate(invalid="ignore"):  # infinities
        p = narrow(start + rounded(alphas * rounded(widen(b) - start)))
    if zero_bits:
        p += 0x7FFF + (p >> 16 & 1)
        p &= 0xFFFF0000
    return p


def tile_alphas(alpha: int, offsets: Bytes) -> Floats:
    """alpha_t of tiles, from the frame's alpha and their signed bytes."""
    return rounded(number(alpha) + offsets.view(np.int8) / 128)


def cut(values: Floats, exponents: Integers) -> Integers:
    """The cells of 2^exponent: towards zero; 0 where there are too many, or for a NaN."""
    with np.errstate(over="ignore"):
        cells = np.ldexp(values, -exponents)
    return np.where(np.abs(cells) < 2.0**24, np.trunc(cells), 0).astype(np.int64)


def cell_bits(cells: Integers) -> Integers:
    """How many low bits a weight in the cell has: 23 - floor(log2 |cell|), not below 0; 0 in cell 0."""
    floats = np.abs(cells).astype(np.float32).view(np.uint32)
    return np.where(cells == 0, 0, np.maximum(150 - (floats >> 23).astype(np.int64), 0))


def cell_words(cells: Integers, exponents: Integers, low: Integers) -> Words:
    """|cell| as a float, the low bits in its mantissa's end, times 2^exponent, with the cell's sign; not for cell 0."""
    floats = np.abs(cells).astype(np.float32).view(np.uint32)
    words = (floats | low) + (exponents << 23) | (cells < 0).astype(np.int64) << 31
    return words.astype(np.uint32)


def multiples(values: Floats, inverses: Floats) -> Integers:
    """The multiples of a step, given its inverse: to the nearest; 0 where there are too many, or for a NaN."""
    with np.errstate(invalid="ignore"):
        quotients = rounded(values * inverses)
    return np.where(np.abs(quotients) < 2.0**22, np.rint(quotients), 0).astype(np.int64)


def ordered(words: Words, zero_bits: int) -> NDArray[np.int32]:
    """Words without their zero bits, as integers in the order of the floats."""
    return reorder(words.view(np.int32) >> zero_bits, zero_bits)


def reorder(x: NDArray[np.int32], zero_bits: int) -> NDArray[np.int32]:
    return x ^ ((x >> 31) & np.int32(0x7FFFFFFF >> zero_bits))


# Prefix codes


def canonical_codes(lengths: Bytes) -> NDArray[np.uint32]:
    """The symbols' codes, the first bit of each in bit 0; CodecError where the lengths make none."""
    used = lengths[lengths > 0].astype(np.int64)
    if np.any(used > CODE_BITS) or np.sum(1 << (CODE_BITS - used)) > 1 << CODE_BITS:
        raise CodecError("code lengths that make no prefix code")
    codes = np.zeros(SYMBOLS, np.uint32)
    code = last = 0
    for symbol in np.lexsort((np.arange(SYMBOLS), lengths)):
        length = int(lengths[symbol])
        if length == 0:
            continue
        code <<= length - last
        codes[symbol] = int(f"{code:0{length}b}"[::-1], 2)
        code, last = code + 1, length
    return codes


# CRC-32C

_COLUMNS = 32  # words of a row


@cache
def _zeros(power: int) -> NDArray[np.uint32]:
    """Tables [4, 256] of what 2^power zero bytes make of a register: the sum of what becomes of its four bytes."""
    if power > 0:
        return _advance(_zeros(power - 1), _zeros(power - 1))
    low = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        low = np.where(low & 1, low >> 1 ^ np.uint32(0x82F63B78), low >> 1)
    return np.stack([low, *(np.arange(256, dtype=np.uint32) << 8 * i for i in range(3))])


def _advance(tables: NDArray[np.uint32], registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    b = np.ascontiguousarray(registers)[..., None].view(np.uint8)
    return tables[0][b[..., 0]] ^ tables[1][b[..., 1]] ^ tables[2][b[..., 2]] ^ tables[3][b[..., 3]]


def crc32c(data: Bytes, crc: int = 0) -> int:
    """CRC-32C (Castagnoli), continued from `crc`.

    The checksum is linear: the bytes are cut into rows that are taken side by side, a word of each at a time, and then
    joined in pairs. Zeros in front do not count, so they fill the first row.
    """
    register = np.uint32(crc ^ 0xFFFFFFFF)
    if len(data) < 4:  # fewer than the register
        for byte in data:
            register = register >> 8 ^ _zeros(0)[0][(register ^ byte) & 255]
        return int(register) ^ 0xFFFFFFFF
    message = np.zeros(ceil_div(len(data), 4 * _COLUMNS) * 4 * _COLUMNS, np.uint8)
    start = len(message) - len(data)
    message[start:] = data
    message[start : start + 4] ^= np.frombuffer(register.tobytes(), np.uint8)

    columns = message.view("<u4").reshape(-1, _COLUMNS).T
    registers = np.zeros(columns.shape[1], np.uint32)
    for column in columns:
        registers = _advance(_zeros(2), registers ^ column)
    power = 2 + _COLUMNS.bit_length() - 1
    while len(registers) > 1:
        if len(registers) % 2:
            registers = np.concatenate([np.zeros(1, np.uint32), registers])
        registers = _advance(_zeros(power), registers[::2]) ^ registers[1::2]
        power += 1
    return int(registers[0]) ^ 0xFFFFFFFF
