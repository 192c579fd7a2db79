"""Frames taken apart and put together again, malformed but with checksums that fit; words that are hard to code."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nacd_fast import codec, native
from nacd_fast import codec_format as form
from nacd_fast.codec import Bytes, Words

_NATIVE = native.load()
BACKENDS = ["reference"]  # and what this machine has of the native ones
if _NATIVE is not None:
    BACKENDS += ["portable"] if _NATIVE.kernels() == "portable" else ["portable", _NATIVE.kernels()]


@contextmanager
def using(backend: str) -> Iterator[None]:
    """NACD_CODEC in this process; not a fixture, so that hypothesis may enter it."""
    before = os.environ.get("NACD_CODEC")
    os.environ["NACD_CODEC"] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ["NACD_CODEC"]
        else:
            os.environ["NACD_CODEC"] = before


# Frames


@dataclass
class BlockParts:
    low_bytes: int
    zeros: int
    exceptions: int
    modes: Bytes
    alphas: Bytes
    low: Bytes
    zero_fields: Bytes
    apart: Bytes
    stream_tables: Bytes
    stream_sizes: NDArray[np.uint16]
    streams: Bytes
    words_crc: int

    def payload(self) -> bytes:
        sizes = np.array([self.low_bytes, self.zeros, self.exceptions], "<u4")
        parts = (self.modes, self.alphas, self.low, self.zero_fields, self.apart, self.stream_tables, self.stream_sizes)
        return b"".join(part.tobytes() for part in (sizes, *parts, self.streams))


@dataclass
class FrameParts:
    header: NDArray[np.void]  # one
    lengths: Bytes  # packed, of all tables
    runs: NDArray[np.void]
    blocks: list[BlockParts]

    def build(self, **header: int) -> Bytes:
        """The frame, with these fields in its header; sizes and checksums are set where they are not among them."""
        payloads = [np.frombuffer(block.payload(), np.uint8) for block in self.blocks]
        directory = np.zeros(len(self.blocks), form.ENTRY)
        for entry, block, payload in zip(directory, self.blocks, payloads):
            entry["bytes"], entry["payload_crc"] = len(payload), codec.crc32c(payload)
            entry["words_crc"] = block.words_crc
        head = self.header.copy()
        sections = [part.view(np.uint8) for part in (self.lengths, self.runs, directory)]
        head["bytes"] = head.nbytes + sum(map(len, [*sections, *payloads]))
        for name, value in header.items():
            head[name] = value
        if "crc" not in header:
            head["crc"] = 0
            head["crc"] = codec.crc32c(np.concatenate([head.view(np.uint8), *sections]))
        return np.concatenate([head.view(np.uint8), *sections, *payloads])


def take_apart(frame: Bytes) -> FrameParts:
    """A well-formed frame's parts, all of them copies."""
    at = 0

    def take(size: int) -> Bytes:
        nonlocal at
        at += size
        return frame[at - size : at].copy()

    header = take(form.HEADER.itemsize).view(form.HEADER)
    lengths = take(int(header["tables"][0]) * form.SYMBOLS // 2)
    runs = take(int(header["runs"][0]) * form.RUN.itemsize).view(form.RUN)
    directory = take(int(header["blocks"][0]) * form.ENTRY.itemsize).view(form.ENTRY)
    blocks = []
    for i, entry in enumerate(directory):
        end = at + int(entry["bytes"])
        tiles = -(-min(form.BLOCK, int(header["count"][0]) - i * form.BLOCK) // form.TILE)
        streams = -(-tiles // form.STREAM_TILES)
        low, zeros, exceptions = (int(x) for x in take(12).view("<u4"))
        alphas = tiles if header["predictor"][0] == form.LINEAR else 0
        sections = (tiles, alphas, low, -(-zeros * form.ZERO_BITS // 8), exceptions * form.EXCEPTION.itemsize, streams)
        modes, tile_alphas, low_bits, fields, apart, tables = (take(size) for size in sections)
        sizes, crc = take(2 * streams).view("<u2"), int(entry["words_crc"])
        counts = (low, zeros, exceptions)
        blocks.append(
            BlockParts(*counts, modes, tile_alphas, low_bits, fields, apart, tables, sizes, take(end - at), crc)
        )
    return FrameParts(header, lengths, runs, blocks)


# Words

KINDS = (
    "random bits", "nan payloads", "infinities", "denormals", "minus zero", "constant", "identical", "sparse",
    "smooth", "smooth and special", "tiny", "huge", "alternating",
)  # fmt: skip


def snapshots(kind: str, count: int, seed: int, zero_bits: int = 0) -> list[Words]:
    """(words, a, b) of one kind [count]: b - a is about twice words - a where the kind is smooth."""
    rng = np.random.default_rng(seed)
    floats = _smooth(rng, count, {"tiny": 1e-38, "huge": 1e37}.get(kind, 0.02))
    words, a, b = (x.view(np.uint32).copy() for x in floats)
    some = rng.random(count) < 0.05
    if kind == "random bits":
        words, a, b = (rng.integers(0, 2**32, count, np.uint32) for _ in range(3))
    elif kind == "nan payloads":
        words = rng.integers(0x7F800001, 0x80000000, count, np.uint32) | rng.integers(0, 2, count, np.uint32) << 31
        a = np.where(some, words, a)
    elif kind == "infinities":
        words = np.where(some, np.uint32(0x7F800000), words)
        a, b = np.where(some, np.uint32(0xFF800000), a), np.where(some, np.uint32(0x7F800000), b)
    elif kind == "denormals":
        words, a, b = (rng.integers(0, 0x00900000, count, np.uint32) | x & 0x80000000 for x in (words, a, b))
    elif kind == "minus zero":
        words, a = np.where(some, np.uint32(0x80000000), 0 * words), np.where(some, 0 * a, np.uint32(0x80000000))
    elif kind == "constant":
        words = np.full(count, rng.integers(0, 2**32, dtype=np.uint32))
        a = words.copy()
    elif kind == "identical":
        words, b = a.copy(), a.copy()
    elif kind == "sparse":
        words = np.where(some, words, a)
    elif kind == "smooth and special":
        special = np.array([0, 1 << 31, 0x7F800000, 0xFFC00001, 1, 0x807FFFFF, 0x00800000, 0x7F7FFFFF], np.uint32)
        rates = (0.003, 0.0003, 0.0003)  # more of them, and a tile is stored raw
        words, a, b = (
            np.where(rng.random(count) < rate, rng.choice(special, count), x) for rate, x in zip(rates, (words, a, b))
        )
    elif kind == "alternating":
        words = words ^ np.arange(count).astype(np.uint32) << np.uint32(31)
    return [(x >> zero_bits << zero_bits).astype(np.uint32) for x in (words, a, b)]


def _smooth(rng: np.random.Generator, count: int, scale: float) -> list[NDArray[np.float32]]:
    a, change, noise = rng.standard_normal((3, count))
    with np.errstate(over="ignore", under="ignore"):
        return [(scale * x).astype(np.float32) for x in (a + 0.01 * change + 0.002 * noise, a, a + 0.02 * change)]


def decoded(frame: Bytes, references: Sequence[Words]) -> dict[str, Words]:
    """What each backend makes of the frame, verified."""
    result = {}
    for backend in BACKENDS:
        with using(backend):
            result[backend] = codec.decode(frame, references, verify=True)
    return result
