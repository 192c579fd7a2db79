"""Frames written in NumPy: valid for every reader, some percent larger than the native encoder's.

A tile takes the cheapest of a few candidates: each codes all tiles of a block in one way, the sizes of cells and shifts
set from the tile's median difference. The order is that of the format: all blocks but their streams first, then the
one code that fits the whole frame, then the streams. Arrays are [T, TILE], the last tile filled up.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from . import codec_format as form
from .codec_format import BLOCK, CODE_BITS, STREAM_TILES, TILE, Bytes, Integers, Words, ceil_div

Run = tuple[int, float, float]  # first tile, step, tolerance

_EXCEPTION_BITS = 8 * form.EXCEPTION.itemsize
_CELLS_PER_DIFFERENCE = range(3)  # log2 of the median difference in cells
_SHIFTS_BELOW_DIFFERENCE = range(7)  # the same of the integer modes


@dataclass
class _Tiles:
    """Tiles coded in one way, or each in the cheapest."""

    modes: Bytes  # [T]
    words: Words  # [T, TILE], as a reader will see them
    residuals: Integers  # [T, TILE], and so on
    low: Integers
    widths: Integers  # of low, in bits
    zero: NDArray[np.bool_]  # cell 0: `low` is a zero field instead
    apart: NDArray[np.bool_]  # exceptions


@dataclass
class _Part:
    """A block without its streams."""

    prefix: bytes
    symbols: list[Bytes]  # of each stream
    words_crc: int
    exceptions: int
    max_error: float


def encode(
    words: Words,
    a: Words | None,
    b: Words | None,
    predictor: int,
    alpha: float | None,
    zero_bits: int,
    runs: Sequence[Run],
    threads: int,
    isa: str,
) -> tuple[Bytes, float, int, float]:
    """The frame, its alpha, the weights stored apart, and the largest error; one thread."""
    alpha_word = np.uint32(0)
    if predictor == form.LINEAR:
        assert a is not None and b is not None
        alpha_word = _fit_alpha(words, a, b) if alpha is None else form.narrow(np.array([alpha]))[0]
    parts = []
    for start in range(0, len(words), BLOCK):
        own = slice(start, start + BLOCK)
        own_a, own_b = form.part(a, own), form.part(b, own)
        parts.append(_encode_block(words[own], own_a, own_b, alpha_word, zero_bits, runs, start // TILE))
    return _write_frame(parts, len(words), predictor, zero_bits, alpha_word, runs)


def _fit_alpha(words: Words, a: Words, b: Words) -> np.uint32:
    """Least squares over the frame; 0 where that is nothing."""
    start = form.widen(a)
    with np.errstate(all="ignore"):
        x, y = form.widen(b) - start, form.widen(words) - start
        known = np.isfinite(x) & np.isfinite(y)
        alpha = form.narrow(np.atleast_1d(np.sum((x * y)[known]) / np.sum((x * x)[known])))[0]
    return alpha if form.finite(alpha) else np.uint32(0)


def _write_frame(
    parts: list[_Part], count: int, predictor: int, zero_bits: int, alpha: np.uint32, runs: Sequence[Run]
) -> tuple[Bytes, float, int, float]:
    histogram = np.zeros(form.SYMBOLS, np.int64)
    for part in parts:
        for symbols in part.symbols:
            histogram += np.bincount(symbols, minlength=form.SYMBOLS)
    lengths = code_lengths(histogram)
    codes = form.canonical_codes(lengths)
    directory, payloads = np.zeros(len(parts), form.ENTRY), []
    for entry, part in zip(directory, parts):
        streams = [
            _pack(codes[symbols].astype(np.int64), lengths[symbols].astype(np.int64)) for symbols in part.symbols
        ]
        sizes = np.array([len(stream) for stream in streams], "<u2")
        sections = [part.prefix, bytes(len(streams)), sizes.tobytes(), *(stream.tobytes() for stream in streams)]
        payload = np.frombuffer(b"".join(sections), np.uint8)
        entry["bytes"], entry["payload_crc"], entry["words_crc"] = len(payload), form.crc32c(payload), part.words_crc
        payloads.append(payload)

    header, table = np.zeros(1, form.HEADER), np.zeros(len(runs), form.RUN)
    table["first_tile"], table["step"] = [first for first, _, _ in runs], _steps(runs)
    packed = lengths[::2] | lengths[1::2] << 4
    head = [section.view(np.uint8) for section in (header, packed, table, directory)]
    size = sum(len(section) for section in (*head, *payloads))
    header[0] = (form.MAGIC, form.VERSION, predictor, zero_bits, count, size, alpha, len(parts), len(runs), 1, 0, 0)
    header["crc"] = form.crc32c(np.concatenate(head))
    exceptions = sum(part.exceptions for part in parts)
    error = max((part.max_error for part in parts), default=0.0)
    return np.concatenate([*head, *payloads]), form.number(int(alpha)), exceptions, error


# Blocks


def _encode_block(
    words: Words,
    a: Words | None,
    b: Words | None,
    alpha: np.uint32,
    zero_bits: int,
    runs: Sequence[Run],
    first_tile: int,
) -> _Part:
    count, tiles = len(words), ceil_div(len(words), TILE)
    alphas = np.zeros(tiles if b is not None else 0, np.uint8)
    tile_alphas = np.repeat(form.tile_alphas(int(alpha), alphas), TILE)[:count]
    p = _by_tile(form.predict(zero_bits, tile_alphas, a, b, count))
    w = _by_tile(words)
    there = _by_tile(np.ones(count, np.uint32)) > 0
    candidates = list(_candidates(w, p, zero_bits, runs, first_tile))
    costs = np.stack([_cost(tiles, there) for tiles in candidates])
    exact_only = ~np.all(form.finite(p), axis=1) if b is not None else np.zeros(tiles, bool)
    for cost, candidate in zip(costs, candidates):
        cost[exact_only & (candidate.modes != form.RAW)] = np.inf
    best = _choose(candidates, np.argmin(costs, axis=0))

    flat = {
        name: getattr(best, name).reshape(-1)[:count]
        for name in ("words", "residuals", "low", "widths", "zero", "apart")
    }
    apart = np.flatnonzero(flat["apart"])
    exceptions = np.zeros(len(apart), form.EXCEPTION)
    exceptions["index"], exceptions["word"] = apart, words[apart]
    low = _pack(flat["low"], np.where(flat["zero"], 0, flat["widths"]))
    zero_fields = flat["low"][flat["zero"]]
    prefix = [
        np.array([(len(low), len(zero_fields), len(apart))], form.BLOCK_HEADER),
        best.modes,
        alphas,
        low,
        _pack(zero_fields, np.full(len(zero_fields), form.ZERO_BITS)),
        exceptions,
    ]
    coded = np.repeat(form.has_symbols(best.modes), TILE)[:count]
    stream = STREAM_TILES * TILE
    symbols = [
        (flat["residuals"][at : at + stream][coded[at : at + stream]]).astype(np.int8).view(np.uint8)
        for at in range(0, count, stream)
    ]
    with np.errstate(invalid="ignore"):
        difference = np.abs(form.widen(flat["words"]) - form.widen(words))
    error = np.max(difference, where=words != flat["words"], initial=0)
    crc = form.crc32c(np.ascontiguousarray(flat["words"]).view(np.uint8))
    return _Part(b"".join(part.tobytes() for part in prefix), symbols, crc, len(apart), float(error))


def _by_tile(words: Words) -> Words:
    padded = np.zeros(ceil_div(len(words), TILE) * TILE, np.uint32)
    padded[: len(words)] = words
    return padded.reshape(-1, TILE)


# Tiles


def _candidates(w: Words, p: Words, zero_bits: int, runs: Sequence[Run], first_tile: int) -> Iterator[_Tiles]:
    yield _raw(w, zero_bits)
    yield _same(w, p)
    size = _log2_median(form.ordered(w, zero_bits).astype(np.int64) - form.ordered(p, zero_bits))
    for offset in _SHIFTS_BELOW_DIFFERENCE:
        yield _integer(w, p, zero_bits, np.clip(size - offset, 0, form.SAME - form.INTEGER - 1))
    if zero_bits:
        return
    with np.errstate(invalid="ignore"):
        size = _log2_median(form.widen(w) - form.widen(p))
    for offset in _CELLS_PER_DIFFERENCE:
        yield _grid(w, p, np.clip(size - offset, -form.GRID_BIAS, form.INTEGER - form.GRID_BIAS - 1))
    if runs:
        yield _step(w, p, runs, first_tile)


def _log2_median(differences: NDArray) -> Integers:
    """floor(log2) of the tiles' typical difference [T]; very small where there is none."""
    size = np.sort(np.abs(differences), axis=1)  # what is not a number comes last
    typical = np.where(size[:, TILE // 2] > 0, size[:, TILE // 2], size[:, -1]).astype(np.float64)
    return np.frexp(np.where(np.isfinite(typical), typical, 0))[1].astype(np.int64) - 1


def _plain(mode: int, w: Words) -> _Tiles:
    """No residuals, no low bits, nothing apart."""
    numbers, no = np.zeros(w.shape, np.int64), np.zeros(w.shape, bool)
    return _Tiles(np.full(len(w), mode, np.uint8), w, numbers, numbers, numbers, no, no)


def _raw(w: Words, zero_bits: int) -> _Tiles:
    tiles = _plain(form.RAW, w)
    tiles.low, tiles.widths = (w >> zero_bits).astype(np.int64), np.full(w.shape, 32 - zero_bits)
    return tiles


def _same(w: Words, p: Words) -> _Tiles:
    tiles = _plain(form.SAME, w)
    tiles.apart = w != p
    return tiles


def _integer(w: Words, p: Words, zero_bits: int, shift: Integers) -> _Tiles:
    tiles = _plain(form.INTEGER, w)
    tiles.modes = (form.INTEGER + shift).astype(np.uint8)
    s = shift[:, None]
    difference = (form.ordered(w, zero_bits) - form.ordered(p, zero_bits)).astype(np.int64)  # wraps around
    tiles.residuals, tiles.low = difference >> s, difference & (1 << s) - 1
    tiles.widths = np.broadcast_to(s, w.shape)
    return _without_far(tiles)


def _grid(w: Words, p: Words, exponent: Integers) -> _Tiles:
    tiles = _plain(0, w)
    tiles.modes = (form.GRID_BIAS + exponent).astype(np.uint8)
    e = np.broadcast_to(exponent[:, None], w.shape)
    cells, predicted = form.cut(form.widen(w), e), form.cut(form.widen(p), e)
    k = 126 + e - (w >> 23 & 0xFF)
    k = np.where(w & 0x7FFFFFFF, k, 7)
    field = (w >> 31).astype(np.int64) << 26 | k << 23 | w & 0x7FFFFF
    tiles.residuals = cells - predicted
    tiles.widths = form.cell_bits(cells)
    tiles.low = w & (1 << tiles.widths) - 1
    lost = (cells != 0) & (form.cell_words(cells, e, tiles.low) != w)
    tiles.apart = lost | (cells == 0) & ((k < 0) | (k > 7) | (k == 7) & (w & 0x7FFFFFFF > 0))
    _without_far(tiles)
    cells = predicted + tiles.residuals  # as they are read: an exception leaves the predicted one
    tiles.zero = cells == 0
    tiles.widths = form.cell_bits(cells)
    tiles.low = np.where(tiles.apart, 0, np.where(tiles.zero, field, tiles.low))
    return tiles


def _step(w: Words, p: Words, runs: Sequence[Run], first_tile: int) -> _Tiles:
    """Multiples of the runs' steps; everything apart in tiles before the first run."""
    run = np.searchsorted([first for first, _, _ in runs], np.arange(len(w)) + first_tile, side="right") - 1
    step = _steps(runs)[run][:, None]
    tolerance = np.array([tolerance for _, _, tolerance in runs])[run][:, None]
    tiles = _plain(form.STEP, w)
    inverse = form.inverse(step)
    wanted = form.multiples(form.widen(w), inverse)
    difference = wanted - form.multiples(form.widen(p), inverse)
    shift = np.clip(_log2_median(difference) - 2, 0, form.MODES - form.STEP - 1)
    tiles.modes = (form.STEP + shift).astype(np.uint8)
    s = shift[:, None]
    tiles.residuals, tiles.low = difference >> s, difference & (1 << s) - 1
    tiles.widths = np.broadcast_to(s, w.shape)
    values = form.narrow(wanted * form.widen(step))
    with np.errstate(invalid="ignore"):
        near = np.abs(form.widen(values) - form.widen(w)) <= tolerance
    tiles.apart = ~np.where(tolerance > 0, near, values == w) | (run < 0)[:, None]
    _without_far(tiles)
    tiles.words = np.where(tiles.apart, w, values)
    return tiles


def _steps(runs: Sequence[Run]) -> Words:
    return form.narrow(np.array([step for _, step, _ in runs], np.float64))


def _without_far(tiles: _Tiles) -> _Tiles:
    """Residuals that are no symbol are exceptions; an exception's residual is 0."""
    tiles.apart = tiles.apart | (tiles.residuals < -128) | (tiles.residuals > 127)
    tiles.residuals = np.where(tiles.apart, 0, tiles.residuals)
    tiles.low = np.where(tiles.apart, 0, tiles.low)
    return tiles


def _cost(tiles: _Tiles, there: NDArray[np.bool_]) -> NDArray[np.float64]:
    """About the bits of each tile [T], were the block's other tiles coded in this way, too."""
    bits = np.where(tiles.zero, form.ZERO_BITS, tiles.widths) + _EXCEPTION_BITS * tiles.apart
    cost = np.sum(bits, axis=1, where=there, dtype=np.float64)
    if form.has_symbols(tiles.modes[0]):
        counts = 1 + np.bincount(tiles.residuals[there] + 128, minlength=form.SYMBOLS)
        cost += np.sum(np.log2(np.sum(counts) / counts)[tiles.residuals + 128], axis=1, where=there)
    return np.where((tiles.modes == form.SAME) & np.any(tiles.apart & there, axis=1), np.inf, cost)


def _choose(candidates: list[_Tiles], best: Integers) -> _Tiles:
    tiles = np.arange(len(best))
    return _Tiles(*(np.stack([getattr(c, f.name) for c in candidates])[best, tiles] for f in fields(_Tiles)))


# Bits


def _pack(values: Integers, widths: Integers) -> Bytes:
    """Numbers of `widths` bits, one behind the other; the last byte is filled up with zeros."""
    places = np.arange(max(1, widths.max(initial=0)))
    bits = (values[:, None] >> places & 1).astype(np.uint8)
    return np.packbits(bits[places < widths[:, None]], bitorder="little")


def code_lengths(histogram: Integers) -> Bytes:
    """The shortest prefix code of at most CODE_BITS bits: package-merge (Larmore, Hirschberg 1990)."""
    lengths = np.zeros(form.SYMBOLS, np.uint8)
    symbols = [(int(histogram[s]), [int(s)]) for s in np.flatnonzero(histogram)]
    if len(symbols) == 1:
        lengths[symbols[0][1]] = 1
    packages: list[tuple[int, list[int]]] = []
    for _ in range(CODE_BITS):
        items = sorted(symbols + packages)
        packages = [(x + y, s + t) for (x, s), (y, t) in zip(items[::2], items[1::2])]
    for _, package in packages[: max(0, len(symbols) - 1)]:
        np.add.at(lengths, package, 1)
    return lengths
