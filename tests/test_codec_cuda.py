"""What a GPU decodes with, run on the host, against the CPU's decoder."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from nacd_fast import codec, native
from nacd_fast.codec import BLOCK, TILE, Bytes, CodecError, Words

CORE = native.load()
COUNT = 2 * BLOCK + 777
CRC_AT = 44  # of the head's checksum

needs_core = pytest.mark.skipif(CORE is None, reason="the native module was not built")


def snapshots(count: int, seed: int = 0) -> tuple[Words, Words, Words]:
    """(words, a, b) whose tiles take, in turn, every mode, with zero cells and exceptions among them."""
    g = np.random.default_rng(seed)
    a, change, noise = (g.standard_normal(count).astype(np.float32) for _ in range(3))
    at = np.arange(count)
    kind = np.where(at < BLOCK, at // TILE % 9, 0)
    rare = (at >= BLOCK) & (at // 2048 % 2 == 0)  # streams where most weights stay: a code of their own pays
    change[rare] *= g.random(int(rare.sum())) < 0.03
    noise[rare] = 0
    scale = np.select([kind == 1, kind == 4, kind == 5], [1e-5, 1e-38, 1e32], 0.02).astype(np.float32)
    step = scale * np.select([kind == 1, kind == 6], [5, 0], 0.005).astype(np.float32)
    a *= scale
    b, w = a + 2 * step * change, a + step * change + step / 2 * noise
    w = np.where(kind == 6, a, w).astype(np.float32)
    w[(kind == 7) & (g.random(count) < 0.02)] *= 1000
    w[(kind == 8) & (g.random(count) < 0.01)] = np.nan
    words = w.view(np.uint32), a.view(np.uint32), b.view(np.uint32)
    for x in words:  # among them what is not finite
        x[kind == 3] = g.integers(0, 2**32, int((kind == 3).sum()), dtype=np.uint32)
    return words


def encoded(count: int, references: int, zero_bits: int = 0, bounded: bool = False) -> tuple[Bytes, list[Words]]:
    """(frame, its references)"""
    mask = np.uint32(0xFFFF0000 if zero_bits else 0xFFFFFFFF)
    words, *others = (x & mask for x in snapshots(count))
    runs = [(0, 1e-4, 6e-5), (-(-count // TILE) // 2, 3e-6, 2e-6)] if bounded else []
    frame = codec.encode(words, others[:references], zero_bits=zero_bits, runs=runs).data
    return frame, others[:references]


def emulated(
    frame: Bytes, references: list[Words], blocks: range | None = None, base_only: bool = False
) -> NDArray[np.uint32]:
    """As codec.decode, by the functions that run on a GPU."""
    assert CORE is not None
    info = codec.read_info(frame)
    blocks = range(info.blocks) if blocks is None else blocks
    begin, end = CORE.block_range(frame, blocks.start, len(blocks))
    out = np.zeros(len(info.weights(blocks)), np.uint32)
    a, b, *_ = (*references, None, None)
    try:
        CORE.decode_emulated(frame, frame[begin:], end - begin, blocks.start, len(blocks), a, b, out, base_only)
    except ValueError as error:
        raise CodecError(str(error)) from None
    return out


def payloads(frame: Bytes) -> list[NDArray[np.uint8]]:
    """The blocks' payloads, as views."""
    assert CORE is not None
    ranges = [CORE.block_range(frame, i, 1) for i in range(codec.read_info(frame).blocks)]
    return [frame[begin:end] for begin, end in ranges]


def seal(frame: Bytes, blocks: list[NDArray[np.uint8]]) -> None:
    """Makes the checksums those of the bytes."""
    head = head_bytes(frame)
    entries = frame[head - 12 * len(blocks) : head].view(np.uint32).reshape(-1, 3)
    entries[:, 1] = [codec.crc32c(block) for block in blocks]
    frame[CRC_AT : CRC_AT + 4] = 0
    frame[CRC_AT : CRC_AT + 4] = np.frombuffer(np.uint32(codec.crc32c(frame[:head])).tobytes(), np.uint8)


def head_bytes(frame: Bytes) -> int:
    blocks, runs, tables = frame[28:40].view(np.uint32).tolist()
    return int(48 + 128 * tables + 8 * runs + 12 * blocks)


# The GPU's functions, on the host


@needs_core
@pytest.mark.parametrize("base_only", [False, True])
@pytest.mark.parametrize(("zero_bits", "bounded"), [(0, False), (16, False), (0, True)])
@pytest.mark.parametrize("references", [0, 1, 2])
def test_words_are_the_cpus(references: int, zero_bits: int, bounded: bool, base_only: bool) -> None:
    frame, others = encoded(COUNT, references, zero_bits, bounded)
    want = codec.decode(frame, others, base_only=base_only)
    np.testing.assert_array_equal(emulated(frame, others, base_only=base_only), want)


@needs_core
@pytest.mark.parametrize("count", [0, 1, 31, 33, 511, 513, 2047, 2049, BLOCK - 1, BLOCK, BLOCK + 1])
def test_words_are_the_cpus_at_ragged_ends(count: int) -> None:
    frame, others = encoded(count, 2)
    np.testing.assert_array_equal(emulated(frame, others), codec.decode(frame, others))


@needs_core
def test_words_of_some_blocks_are_the_cpus() -> None:
    frame, others = encoded(COUNT, 2, bounded=True)
    for blocks in (range(1, 2), range(1, 3), range(2, 3), range(2, 2)):
        part = [x[blocks.start * BLOCK : blocks.stop * BLOCK] for x in others]
        want = codec.decode(frame, part, blocks=blocks)
        np.testing.assert_array_equal(emulated(frame, part, blocks), want)


@needs_core
def test_the_frames_have_every_mode_and_section() -> None:
    modes: set[str] = set()
    for bounded in (False, True):
        frame, _ = encoded(COUNT, 2, bounded=bounded)
        assert frame[36] > 1, "one table only"
        block = payloads(frame)[0]
        zeros, exceptions = block[4:12].view(np.uint32)
        assert (bounded or zeros > 0) and exceptions > 0
        starts = {0: "grid", 192: "integer", 217: "same", 218: "raw", 219: "step"}
        modes |= {starts[max(s for s in starts if s <= mode)] for mode in block[12 : 12 + BLOCK // TILE]}
    assert modes == {"grid", "integer", "same", "raw", "step"}


@needs_core
def test_of_two_exceptions_at_one_place_the_later_stays() -> None:
    frame, others = encoded(BLOCK, 1)
    (payload,) = payloads(frame)
    low_bytes, zeros, count = payload[:12].view(np.uint32).tolist()
    at = 12 + BLOCK // TILE + low_bytes + -(-27 * zeros // 8)
    for k in range(1, count, 3):  # near and, beyond a warp's 32, far
        payload[at + 6 * k : at + 6 * k + 2] = payload[at : at + 2]
    seal(frame, [payload])
    np.testing.assert_array_equal(emulated(frame, others), codec.decode(frame, others))


def outcome(decode: Callable[..., NDArray], *args: Any, **options: Any) -> tuple[str, NDArray | None]:
    """(what it raised, what it returned)"""
    try:
        return "", decode(*args, **options)
    except CodecError as error:
        return str(error), None


@needs_core
@pytest.mark.parametrize(("references", "zero_bits", "bounded"), [(0, 0, False), (2, 0, True), (1, 16, False)])
def test_what_corrupt_bytes_give_is_refused_or_the_cpus(references: int, zero_bits: int, bounded: bool) -> None:
    """Checksums are made to fit: what remains must hold without them. Sanitizers see each access of these."""
    g = np.random.default_rng(references)
    good, others = encoded(BLOCK + 2500, references, zero_bits, bounded)
    sections = 12 + 2 * 128, head_bytes(good) - 24
    refused = 0
    for round_ in range(300):
        frame = good.copy()
        blocks = payloads(frame)
        block = blocks[int(g.integers(2))]
        # half of them where sizes and modes are, a sixth in code lengths and runs
        place = g.integers(min(sections[0], len(block)) if round_ % 2 else len(block), size=int(g.integers(1, 4)))
        if round_ % 6 == 0:
            frame[g.integers(48, sections[1], size=2)] ^= g.integers(1, 256, size=2, dtype=np.uint8)
        else:
            block[place] ^= g.integers(1, 256, size=len(place), dtype=np.uint8)
        seal(frame, blocks)
        base_only = bool(round_ % 5 == 0)
        error, words = outcome(emulated, frame, others, base_only=base_only)
        cpu_error, cpu_words = outcome(codec.decode, frame, others, base_only=base_only)
        assert error or not cpu_error, cpu_error
        refused += bool(error)
        if words is not None:
            np.testing.assert_array_equal(words, cpu_words)
    assert 100 < refused < 300


@needs_core
def test_a_stream_that_is_too_short_is_refused() -> None:
    frame, others = encoded(BLOCK, 1)
    (payload,) = payloads(frame)
    low_bytes, zeros, exceptions = payload[:12].view(np.uint32).tolist()
    sizes = 12 + BLOCK // TILE + low_bytes + -(-27 * zeros // 8) + 6 * exceptions + 32
    for k, delta in ((0, -1), (1, 1)):  # a byte of the first falls to the second
        size = payload[sizes + 2 * k : sizes + 2 * k + 2].copy().view(np.uint16) + np.uint16(delta % 2**16)
        payload[sizes + 2 * k : sizes + 2 * k + 2] = size.view(np.uint8)
    seal(frame, [payload])
    with pytest.raises(CodecError, match="a stream that does not fit its tiles"):
        emulated(frame, others)


@needs_core
def test_changed_bytes_are_refused() -> None:
    frame, others = encoded(BLOCK, 1)
    frame[-1] ^= 1
    with pytest.raises(CodecError, match="a checksum that does not fit its bytes"):
        emulated(frame, others)
