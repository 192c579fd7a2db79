"""The trajectory codec in NumPy: csrc/FORMAT.md as code, the oracle of the native module and its stand-in.

It has the functions of nacd_fast/_codec.pyi and gives the same words, bit for bit, and the same sentence for whatever
is malformed. Read `decode` first, then `_decode_block`. Arrays hold all weights [P] of a block; only Huffman codes are
read one after the other, there for all streams of many blocks side by side.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from . import codec_format as form
from .codec_format import BLOCK, CODE_BITS, STREAM_TILES, TILE, Bytes, CodecError, Integers, Words, ceil_div
from .codec_reference_encoder import encode

__all__ = ["base_error", "block_range", "crc32c", "decode", "encode", "kernels", "read_head"]

crc32c = form.crc32c
BLOCKS_AT_ONCE = 64  # whose streams are decoded side by side


def kernels() -> str:
    return "reference (the native module was not built)"


@dataclass(frozen=True)
class _Frame:
    header: np.void
    lengths: Bytes  # of the symbols' codes [tables, SYMBOLS]
    runs: NDArray[np.void]
    directory: NDArray[np.void]
    head_bytes: int

    def offset(self, block: int) -> int:
        return self.head_bytes + int(self.directory["bytes"][:block].sum(dtype=np.int64))

    def run_of_tiles(self, block: int, tiles: int) -> Integers:
        """The run of each of the block's tiles, -1 before the first."""
        return np.searchsorted(self.runs["first_tile"], np.arange(tiles) + block * (BLOCK // TILE), side="right") - 1

    def weights(self, block: int) -> int:
        return min(BLOCK, int(self.header["count"]) - block * BLOCK)


@dataclass(frozen=True)
class _Block:
    """The sections of a block's payload."""

    count: int
    modes: Bytes
    alphas: Bytes  # of the tiles, signed; empty without a linear predictor
    low: Bytes
    zeros: int
    zero_fields: Bytes
    exceptions: NDArray[np.void]
    stream_tables: Bytes
    stream_sizes: Integers
    streams: Bytes

    def per_weight(self, tiles: NDArray) -> NDArray:
        return np.repeat(tiles, TILE)[: self.count]

    def symbols_of_streams(self) -> Integers:
        coded = self.per_weight(form.has_symbols(self.modes))
        return np.add.reduceat(coded, np.arange(0, self.count, STREAM_TILES * TILE), dtype=np.int64)


# Heads


def read_head(head: Bytes) -> tuple[int, int, int, int, int, float, int, int]:
    """(count, bytes, head_bytes, predictor, zero_bits, alpha, blocks, runs)"""
    frame = _parse_head(head)
    h = frame.header
    alpha = form.number(int(h["alpha"]))
    count, size, predictor, zero_bits = int(h["count"]), int(h["bytes"]), int(h["predictor"]), int(h["zero_bits"])
    return count, size, frame.head_bytes, predictor, zero_bits, alpha, int(h["blocks"]), int(h["runs"])


def block_range(head: Bytes, first: int, blocks: int) -> tuple[int, int]:
    frame = _parse_head(head)
    return frame.offset(first), frame.offset(first + blocks)


def _parse_head(head: Bytes) -> _Frame:
    if len(head) < form.HEADER.itemsize:
        raise CodecError("fewer bytes than its header says")
    header = head[: form.HEADER.itemsize].view(form.HEADER)[0]
    if header["magic"] != form.MAGIC:
        raise CodecError("not a frame")
    if header["version"] != form.VERSION:
        raise CodecError("a frame of a version that this build does not read")
    tables_at = form.HEADER.itemsize
    runs_at = tables_at + form.SYMBOLS // 2 * int(header["tables"])
    directory_at = runs_at + form.RUN.itemsize * int(header["runs"])
    head_bytes = directory_at + form.ENTRY.itemsize * int(header["blocks"])
    if not _valid_header(header) or header["bytes"] < head_bytes:
        raise CodecError("a header field outside its limits")
    if len(head) < head_bytes:
        raise CodecError("fewer bytes than its header says")
    zeroed = head[:head_bytes].copy()
    zeroed[: form.HEADER.itemsize].view(form.HEADER)["crc"] = 0
    if crc32c(zeroed) != header["crc"]:
        raise CodecError("a checksum that does not fit its bytes")
    packed = head[tables_at:runs_at]
    frame = _Frame(
        header,
        np.stack([packed & 15, packed >> 4], axis=1).reshape(-1, form.SYMBOLS),
        head[runs_at:directory_at].view(form.RUN),
        head[directory_at:head_bytes].view(form.ENTRY),
        head_bytes,
    )
    small = np.all(frame.directory["bytes"] <= form.MAX_BLOCK_BYTES)
    if not small or not _valid_runs(frame.runs) or frame.offset(int(header["blocks"])) != header["bytes"]:
        raise CodecError("a header field outside its limits")
    return frame


def _valid_header(header: np.void) -> bool:
    count, predictor, zero_bits = int(header["count"]), int(header["predictor"]), int(header["zero_bits"])
    return bool(
        predictor <= form.LINEAR
        and zero_bits in (0, 16)
        and count <= form.MAX_COUNT
        and header["blocks"] == ceil_div(count, BLOCK)
        and form.finite(header["alpha"])
        and (predictor == form.LINEAR or header["alpha"] == 0)
        and header["runs"] <= ceil_div(count, TILE)
        and (header["runs"] == 0 or zero_bits == 0)
        and 1 <= header["tables"] <= form.MAX_TABLES
        and header["reserved"] == 0
    )


def _valid_runs(runs: NDArray[np.void]) -> bool:
    steps = np.ascontiguousarray(runs["step"])
    normal = (steps >= 0x00800000) & (steps <= 0x7E800000)  # 2^-126 .. 2^126, and so are the inverses
    rising = np.diff(runs["first_tile"].astype(np.int64)) > 0
    return bool(np.all(normal) and np.all(rising))


# Decoding


def decode(
    head: Bytes,
    payload: Bytes,
    payload_bytes: int,
    first: int,
    blocks: int,
    a: Words | None,
    b: Words | None,
    out: Words,
    threads: int,
    verify: bool,
    base_only: bool,
    isa: str,
) -> None:
    """Blocks [first, first + blocks) of the frame, whose bytes `payload` begins with, into out; one thread."""
    frame = _parse_head(head)
    if blocks == 0:
        return
    tables = _decoding_tables(frame.lengths)
    for start in range(first, first + blocks, BLOCKS_AT_ONCE):
        group = range(start, min(start + BLOCKS_AT_ONCE, first + blocks))
        parts = list(_read_blocks(frame, payload, first, group))
        for i, part, residuals in zip(group, parts, _read_symbols(parts, *tables)):
            own = slice((i - first) * BLOCK, (i - first) * BLOCK + part.count)
            out[own] = _decode_block(frame, i, part, residuals, form.part(a, own), form.part(b, own), base_only)
            if verify and crc32c(out[own].view(np.uint8)) != frame.directory["words_crc"][i]:
                raise CodecError("decoded words that are not those that were encoded")


def _read_blocks(frame: _Frame, payload: Bytes, first: int, blocks: range) -> Iterator[_Block]:
    for i in blocks:
        at = frame.offset(i) - frame.offset(first)
        data = payload[at : at + int(frame.directory["bytes"][i])]
        if crc32c(data) != frame.directory["payload_crc"][i]:
            raise CodecError("a checksum that does not fit its bytes")
        yield _view_block(frame, data, frame.weights(i))


def _view_block(frame: _Frame, data: Bytes, count: int) -> _Block:
    at = 0

    def take(size: int) -> Bytes:
        nonlocal at
        if at + size > len(data):
            raise CodecError("block sections that do not fill the block")
        at += size
        return data[at - size : at]

    low_bytes, zeros, exceptions = (int(x) for x in take(form.BLOCK_HEADER.itemsize).view("<u4"))
    if zeros > count or exceptions > count:
        raise CodecError("block sections that do not fill the block")
    tiles = ceil_div(count, TILE)
    modes = take(tiles)
    alphas = take(tiles if frame.header["predictor"] == form.LINEAR else 0)
    low = take(low_bytes)
    zero_fields = take(ceil_div(form.ZERO_BITS * zeros, 8))
    apart = take(form.EXCEPTION.itemsize * exceptions).view(form.EXCEPTION)
    stream_tables = take(ceil_div(tiles, STREAM_TILES))
    stream_sizes = take(2 * len(stream_tables)).view("<u2").astype(np.int64)
    streams = take(len(data) - at)
    if stream_sizes.sum() != len(streams) or np.any(stream_tables >= frame.header["tables"]):
        raise CodecError("block sections that do not fill the block")
    unknown = modes >= form.MODES
    if frame.header["zero_bits"]:
        unknown |= modes < form.INTEGER
    if len(frame.runs) == 0:
        unknown |= modes >= form.STEP
    if np.any(unknown):
        raise CodecError("an unknown tile mode")
    return _Block(count, modes, alphas, low, zeros, zero_fields, apart, stream_tables, stream_sizes, streams)


def _decoding_tables(lengths: Bytes) -> tuple[NDArray[np.int16], Integers]:
    """Of each table, the symbol that any CODE_BITS bits begin with, -1 where it is none, and how many bits it has."""
    symbol_of = np.full((len(lengths), 1 << CODE_BITS), -1, np.int16)
    bits_of = np.zeros(symbol_of.shape, np.int64)
    for table, of_table in enumerate(lengths):
        codes = form.canonical_codes(of_table)
        for symbol in np.flatnonzero(of_table):  # every continuation of its code
            own = slice(int(codes[symbol]), None, 1 << int(of_table[symbol]))
            symbol_of[table, own], bits_of[table, own] = symbol, of_table[symbol]
    return symbol_of, bits_of


def _read_symbols(parts: list[_Block], symbol_of: NDArray[np.int16], bits_of: Integers) -> list[Integers]:
    """The residuals of each block's weights, 0 where a weight has none."""
    data = np.concatenate([part.streams for part in parts] + [np.zeros(form.SLACK, np.uint8)]).astype(np.uint32)
    windows = data[:-2] | data[1:-1] << 8 | data[2:] << 16  # at each byte, the 17 bits and more that follow any bit
    tables = np.concatenate([part.stream_tables for part in parts])
    sizes = np.concatenate([part.stream_sizes for part in parts])
    counts = np.concatenate([part.symbols_of_streams() for part in parts])
    starts = 8 * (np.cumsum(sizes) - sizes)

    longest_first = np.argsort(-counts, kind="stable")
    at, table = starts[longest_first], tables[longest_first]
    symbols = np.zeros((STREAM_TILES * TILE, len(counts)), np.int16)
    for i in range(int(counts.max())):
        active = int(np.count_nonzero(counts > i))
        window = windows[at[:active] >> 3] >> (at[:active] & 7).astype(np.uint32) & (1 << CODE_BITS) - 1
        symbols[i, :active] = symbol_of[table[:active], window]
        at[:active] += bits_of[table[:active], window]
    bits = np.empty_like(at)
    bits[longest_first] = at
    if np.any(symbols < 0) or np.any((bits - starts + 7) // 8 != sizes):
        raise CodecError("a stream that does not fit its tiles")

    by_stream = np.empty(symbols.shape[::-1], np.int64)
    by_stream[longest_first] = symbols.T.astype(np.int8)
    residuals, stream = [], 0
    for part in parts:
        own = slice(stream, stream + len(part.stream_sizes))
        coded = part.per_weight(form.has_symbols(part.modes))
        residual = np.zeros(part.count, np.int64)
        residual[coded] = by_stream[own][np.arange(by_stream.shape[1]) < counts[own, None]]
        residuals.append(residual)
        stream = own.stop
    return residuals


def _decode_block(
    frame: _Frame, i: int, part: _Block, residual: Integers, a: Words | None, b: Words | None, base_only: bool
) -> Words:
    if np.any(frame.run_of_tiles(i, len(part.modes))[part.modes >= form.STEP] < 0):
        raise CodecError("an unknown tile mode")
    zero_bits = int(frame.header["zero_bits"])
    mode = part.per_weight(part.modes).astype(np.int64)
    grid, integer, raw, step = (
        mode < form.INTEGER,
        _between(mode, form.INTEGER, form.SAME),
        mode == form.RAW,
        mode >= form.STEP,
    )
    alphas = form.tile_alphas(int(frame.header["alpha"]), part.alphas)
    p = form.predict(zero_bits, part.per_weight(alphas), a, b, part.count)
    words = p.copy()  # mode same

    # Low bits: how many each weight takes
    exponent = mode[grid] - form.GRID_BIAS
    cell = form.cut(form.widen(p[grid]), exponent) + residual[grid]
    width = np.zeros(part.count, np.int64)
    width[grid] = form.cell_bits(cell)
    width[integer] = mode[integer] - form.INTEGER
    width[raw] = 32 - zero_bits
    width[step] = mode[step] - form.STEP
    offsets = np.cumsum(width) - width
    if ceil_div(int(width.sum()), 8) != len(part.low):
        raise CodecError("a stream that does not fit its tiles")
    low = _read_bits(part.low, offsets, width)

    if base_only:
        low[grid] = (1 << width[grid]) >> 1  # the middle of the cell
        of_zero = np.zeros(np.count_nonzero(cell == 0), np.int64)
    else:
        of_zero = _zero_cell(part, exponent[cell == 0])
    words[grid] = form.cell_words(cell, exponent, low[grid])
    words[np.flatnonzero(grid)[cell == 0]] = of_zero

    shifted = (residual << np.where(integer, width, 0)) + low
    y = (form.ordered(p[integer], zero_bits) + shifted[integer]).astype(np.int32)
    words[integer] = (form.reorder(y, zero_bits) << zero_bits).view(np.uint32)

    words[raw] = low[raw] << zero_bits

    if np.any(step):
        words[step] = _step_values(frame, i, part, step, p, (residual << width) + low)
    if np.any(part.exceptions["index"] >= part.count):
        raise CodecError("a stream that does not fit its tiles")
    words[part.exceptions["index"]] = part.exceptions["word"]
    return words


def _between(x: Integers, low: int, high: int) -> NDArray[np.bool_]:
    return (low <= x) & (x < high)


def _zero_cell(part: _Block, exponent: Integers) -> Integers:
    """The words of the weights in cell 0, from their fields: sign, k, mantissa."""
    if len(exponent) != part.zeros:
        raise CodecError("a stream that does not fit its tiles")
    field = _read_bits(part.zero_fields, form.ZERO_BITS * np.arange(part.zeros), np.full(part.zeros, form.ZERO_BITS))
    k = field >> 23 & 7
    magnitude = np.where(k == 7, 0, (126 + exponent - k << 23) + (field & 0x7FFFFF))
    return field >> 26 << 31 | magnitude


def _step_values(frame: _Frame, i: int, part: _Block, step: NDArray[np.bool_], p: Words, added: Integers) -> Words:
    """The multiples of the runs' steps."""
    run = frame.run_of_tiles(i, len(part.modes))
    steps = part.per_weight(np.ascontiguousarray(frame.runs["step"])[run])[step]
    multiples = form.multiples(form.widen(p[step]), form.inverse(steps)) + added[step]
    return form.narrow(form.rounded(multiples.astype(np.float64)) * form.widen(steps))


def _read_bits(data: Bytes, offsets: Integers, widths: Integers) -> Integers:
    """The numbers of `widths` bits, at most 32, that begin at bits `offsets`."""
    windows = sliding_window_view(np.concatenate([data, np.zeros(8, np.uint8)]), 8)
    taken = np.ascontiguousarray(windows[offsets >> 3]).view("<u8")[:, 0].astype(np.int64)
    return taken >> (offsets & 7) & (1 << widths) - 1


def base_error(head: Bytes, payload: Bytes, payload_bytes: int, first: int, blocks: int) -> float:
    """Half a cell, or all of one where a weight is in cell 0."""
    frame = _parse_head(head)
    error = 0.0
    for i in range(first, first + blocks):
        at = frame.offset(i) - frame.offset(first)
        part = _view_block(frame, payload[at : at + int(frame.directory["bytes"][i])], frame.weights(i))
        grid = part.modes[part.modes < form.INTEGER]
        if len(grid):
            error = max(error, 2.0 ** (int(grid.max()) - form.GRID_BIAS) * (1.0 if part.zeros else 0.5))
    return error
