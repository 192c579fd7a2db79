"""Writes the fuzz targets' seeds: real frames of every mode, real files, and commands that make weights.

    python csrc/fuzz/make_corpus.py csrc/fuzz/corpus

Other files stay: those named by a hash are what the fuzzers found, minimised with libFuzzer's -merge=1.
"""

import struct
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nacd_fast import codec
from nacd_fast.store import records

Words = NDArray[np.uint32]
COUNTS = (0, 1, 513, 8704 + 3)  # none, ragged, two groups of streams
OTHER = 0x10000000  # what fuzz_decode.cpp adds to the seed for reference b


def scramble(x: Words) -> Words:
    x = x * np.uint32(0x9E3779B1)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x85EBCA77)
    return x ^ (x >> np.uint32(13))


def made_up_weights(seed: int, count: int) -> Words:
    """The references of fuzz.h: magnitudes 2^-7 .. 2^-3, of either sign."""
    x = scramble(np.arange(count, dtype=np.uint32) + np.uint32(seed))
    return (x & np.uint32(0x807FFFFF)) | ((120 + ((x >> 24) & 3)) << 23).astype(np.uint32)


def near(words: Words, change: float) -> Words:
    """`words` as float32, each moved by about `change`."""
    noise = scramble(words).view(np.int32).astype(np.float64) / 2**31
    return (words.view(np.float32) + change * noise).astype(np.float32).view(np.uint32)


def frames(seed: int, count: int) -> dict[str, tuple[NDArray[np.uint8], int]]:
    """Frames by name, each with the bits of its decode flags: 1 verify, 2 base layer only."""
    a, b = made_up_weights(seed, count), made_up_weights(seed + OTHER, count)
    random = scramble(a)
    middle = (0.5 * a.view(np.float32) + 0.5 * b.view(np.float32)).astype(np.float32).view(np.uint32)
    odd = near(a, 1e-4)
    odd[::97] ^= 0x40000000  # exceptions
    odd[5::11] >>= 5  # zero cells
    half = near(a, 1e-3) & np.uint32(0xFFFF0000)
    half_a, half_b = a & np.uint32(0xFFFF0000), b & np.uint32(0xFFFF0000)
    runs = [(0, 1e-3, 5e-4 * 0.999)] + ([(1, 1e-5, 5e-6 * 0.999)] if count > codec.TILE else [])

    made = {
        "key": (codec.encode(near(a, 1e-3)), 1),
        "previous": (codec.encode(near(a, 1e-4), (a,)), 1),
        "base": (codec.encode(odd, (a,)), 2),
        "odd": (codec.encode(odd, (a,)), 1),
        "linear": (codec.encode(near(middle, 1e-5), (a, b)), 1),
        "extrapolated": (codec.encode(near(a, 1e-3), (a, b), alpha=-0.25), 1),
        "same": (codec.encode(a, (a,)), 1),
        "raw": (codec.encode(random), 1),
        "integer": (codec.encode(a + (random >> 20), (a,)), 1),
        "bfloat16": (codec.encode(half, (half_a,), zero_bits=16), 1),
        "bfloat16-linear": (codec.encode(half, (half_a, half_b), zero_bits=16), 1),
    }
    if count > 0:
        made["step"] = (codec.encode(near(a, 1e-2), (a,), runs=runs), 0)
    return {name: (encoded.data, flags) for name, (encoded, flags) in made.items()}


def decode_seeds(folder: Path) -> None:
    for count in COUNTS:
        for name, (frame, flags) in frames(seed := 1, count).items():
            if count > codec.TILE + 1 and name in ("raw", "key", "extrapolated", "bfloat16-linear"):
                continue  # size
            # the options, last byte first: flags, first block, blocks, kind of references, seed
            options = struct.pack("<IBBBB", seed, 0, 1, 0, flags)
            (folder / f"{name}-{count}").write_bytes(frame.tobytes() + options)
    a = made_up_weights(1, 16384)  # streams of such different spread that each class of them takes a code of its own
    uneven = a + (scramble(a) >> (32 - np.repeat(np.array([1, 8], np.uint32), 8192)))
    tables = codec.encode(uneven, (a,)).data
    assert int(tables[36]) == 4, "one code for all"
    (folder / "tables").write_bytes(tables.tobytes() + struct.pack("<IBBBB", 1, 0, 1, 0, 1))
    two = codec.encode(np.zeros(codec.BLOCK + 1, np.uint32)).data
    (folder / "two-blocks").write_bytes(two.tobytes() + struct.pack("<IBBBB", 1, 1, 1, 0, 1))


def encode_seeds(folder: Path) -> None:
    def command(kind: int, exponent: int, length: int, x: int = 1) -> bytes:
        return struct.pack("<BBHI", kind, exponent, length - 1 + (0x8000 if length > 700 else 0), x)

    def options(
        predictor: int, more: int = 0, alpha: float = 0.5, runs: tuple[tuple[int, float, float], ...] = ()
    ) -> bytes:
        packed = b"".join(struct.pack("<ffB", tolerance, step, first) for first, step, tolerance in reversed(runs))
        return packed + struct.pack("<fB", alpha, predictor | len(runs) << 4 | more)

    everything = b"".join(command(kind, 18, 300 + kind) for kind in range(8))
    for predictor in range(3):
        for bfloat16 in (0, 4):
            (folder / f"all-{predictor}-{bfloat16}").write_bytes(everything + options(predictor, bfloat16 | 8))
        for kind in range(8):
            (folder / f"kind{kind}-{predictor}").write_bytes(command(kind, 16, 1025) + options(predictor))
        steps = ((0, 1e-3, 0.0), (1, 1e-4, 4e-5))
        for more in (0, 64, 128):
            (folder / f"step-{predictor}-{more}").write_bytes(everything + options(predictor, more, runs=steps))
    (folder / "empty").write_bytes(options(0))
    (folder / "one").write_bytes(command(0, 16, 1) + options(1))
    (folder / "two-blocks").write_bytes(b"".join(command(0, k, 8192) for k in range(9)) + options(2))


def scan_seeds(folder: Path) -> None:
    def record(at: int, kind: int, payload: bytes, step: int = 0, references: tuple[int, ...] = ()) -> bytes:
        pieces = [np.frombuffer(payload, np.uint8)] if payload else []
        _, packed = records.pack(kind, at, pieces, step=step, references=references)
        return b"".join(bytes(piece) for piece in packed)

    file = record(0, records.SCHEMA, b'{"group": 8}')
    for step, references in enumerate(((), (0,), (0, 1), (0, 2))):
        file += record(len(file), records.FRAME, bytes(range(13 * step, 20 * step + 40)), step, references)
    file += record(len(file), records.SEAL, b"", 3)
    hole = record(0, records.FRAME, b"x" * 9000)
    made = {
        "empty": b"",
        "group": file,
        "two-groups": file + record(len(file), records.FRAME, b"next", 4, (3,)),
        "stub": file + b"NRE",
        "torn": file[:-20],
        "hole": hole[:4096] + bytes(4096) + hole[8192:],
        "big": record(0, records.FRAME, b"x" * 9000) + b"NREC",
        "noise": file + scramble(np.arange(40, dtype=np.uint32)).tobytes(),
        "zeros": file + bytes(4096),
    }
    for name, data in made.items():
        (folder / name).write_bytes(data + struct.pack("<HH", 65535, len(data) // 2))


if __name__ == "__main__":
    for name, write in (("decode", decode_seeds), ("encode", encode_seeds), ("scan", scan_seeds)):
        target = Path(sys.argv[1]) / name
        target.mkdir(parents=True, exist_ok=True)
        write(target)
