"""Frames of the trajectory format, in NumPy words: one snapshot coded against none, one or two others.

A snapshot is `words` [P] uint32: the float32 bits of all its weights, one tensor behind the other; bfloat16 is widened
(zero_bits=16). A frame is uint8 bytes; csrc/FORMAT.md describes them. References are the decoded words of the
snapshots that a frame builds on: () none, (a,) previous, (a, b) linear, p = a + alpha (b - a).

What malformed bytes get is a CodecError with the same sentence from either backend: the native module where it was
built, else codec_reference, which is the format in NumPy. NACD_CODEC=avx2|portable|reference asks for one by name.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np

from . import codec_reference, native
from .codec_format import BLOCK, SLACK, TILE, Bytes, CodecError, Words, ceil_div

__all__ = [
    "BLOCK", "SLACK", "TILE", "Bytes", "CodecError", "Encoded", "FrameInfo", "Words",
    "backend", "base_error", "chosen_blocks", "crc32c", "decode", "encode", "read_info",
]  # fmt: skip

PREDICTORS = ("none", "previous", "linear")  # by number of references


@dataclass(frozen=True, eq=False)
class Encoded:
    data: Bytes  # the frame
    alpha: float  # of the linear predictor, as given or fitted; 0 otherwise
    exceptions: int  # weights stored apart, in full
    max_error: float  # the largest |decoded - weight|; 0 where all is lossless


@dataclass(frozen=True)
class FrameInfo:
    count: int  # weights
    bytes: int  # of the whole frame
    head_bytes: int  # of them before the first block
    predictor: int  # 0 none, 1 previous, 2 linear: how many references
    zero_bits: int  # 16 for bfloat16
    alpha: float
    blocks: int
    runs: int  # of the bounded-error mode; 0 where the frame is lossless

    def weights(self, blocks: range) -> range:
        """Those of the frame that `blocks` hold."""
        return range(blocks.start * BLOCK, min(blocks.stop * BLOCK, self.count))


def encode(
    words: Words,
    references: Sequence[Words] = (),
    *,
    alpha: float | None = None,
    zero_bits: int = 0,
    runs: Sequence[tuple[int, float, float]] = (),
    threads: int = 1,
) -> Encoded:
    """The frame of `words` [P], against 0, 1 or 2 references [P].

    alpha: of two references; None is fitted. runs: (first_tile, step, tolerance) in rising tiles, each up to the next:
    its values become multiples of step, each within tolerance of its weight, or else are kept as they are.
    """
    _check_words("words", words)
    if len(references) > 2:
        raise ValueError(f"{len(references)} references, must be at most 2")
    for name, reference in zip("ab", references):
        _check_words(f"reference {name}", reference, len(words))
    if alpha is not None and not abs(alpha) <= 2.0**127:
        raise ValueError(f"alpha={alpha}, must be from -2^127 to 2^127")
    if zero_bits not in (0, 16):
        raise ValueError(f"zero_bits={zero_bits}, must be 0 (float32) or 16 (bfloat16)")
    if zero_bits and runs:
        raise ValueError("runs are for float32, zero_bits=16 is bfloat16")
    if zero_bits:
        for name, array in zip(("words", "reference a", "reference b"), (words, *references)):
            if np.bitwise_or.reduce(array) & 0xFFFF:
                raise ValueError(f"{name}: not bfloat16, its low bits are not 0")
    _check_runs(runs, len(words))
    _check_threads(threads)
    core, isa = _core()
    a, b = _pair(references)
    return Encoded(*core.encode(words, a, b, len(references), alpha, zero_bits, list(runs), threads, isa))


def read_info(head: Bytes) -> FrameInfo:
    """What the frame's head says, which `head` begins with; its checksum is verified."""
    _check_bytes(head)
    try:
        return FrameInfo(*_core()[0].read_head(head))
    except ValueError as error:
        raise CodecError(str(error)) from None


def decode(
    frame: Bytes,
    references: Sequence[Words] = (),
    *,
    blocks: range | None = None,
    out: Words | None = None,
    threads: int = 1,
    verify: bool = False,
    base_only: bool = False,
) -> Words:
    """The words of the frame that `frame` begins with, or of some of its blocks.

    references and out hold the weights of `blocks`, and no others. verify compares the words with their checksum;
    base_only leaves the low bits out: cheaper, each weight within base_error. Without SLACK bytes behind the blocks
    they are copied. After an error, out holds anything.
    """
    info, blocks, begin, end = _locate(frame, blocks)
    count = len(info.weights(blocks))
    if len(references) != info.predictor:
        raise ValueError(f"{len(references)} references, must be {info.predictor} ({PREDICTORS[info.predictor]})")
    for name, reference in zip("ab", references):
        _check_words(f"reference {name}", reference, count)
    if verify and base_only:
        raise ValueError("verify and base_only: the base layer has no checksum")
    _check_threads(threads)
    if out is None:
        out = np.empty(count, np.uint32)
    _check_words("out", out, count)
    if not out.flags.writeable:
        raise ValueError("out is read-only")
    if any(np.may_share_memory(out, reference) for reference in references):
        raise ValueError("out overlaps a reference")
    core, isa = _core()
    a, b = _pair(references)
    try:
        core.decode(
            frame, frame[begin:], end - begin, blocks.start, len(blocks), a, b, out, threads, verify, base_only, isa
        )
    except ValueError as error:
        raise CodecError(str(error)) from None
    return out


def base_error(frame: Bytes, blocks: range | None = None) -> float:
    """The most that a weight decoded with base_only is off; 0 where all is exact."""
    _, blocks, begin, end = _locate(frame, blocks)
    try:
        return _core()[0].base_error(frame, frame[begin:], end - begin, blocks.start, len(blocks))
    except ValueError as error:
        raise CodecError(str(error)) from None


def chosen_blocks(frame: Bytes, info: FrameInfo, blocks: range | None) -> range:
    """`blocks` of the frame, None for all. Raises CodecError unless all of its bytes are there."""
    if blocks is None:
        blocks = range(info.blocks)
    if blocks.step != 1 or not 0 <= blocks.start <= blocks.stop <= info.blocks:
        raise ValueError(f"blocks {blocks}, must be a part of range(0, {info.blocks})")
    if len(frame) < info.bytes:
        raise CodecError("fewer bytes than its header says")
    return blocks


def crc32c(data: Bytes, crc: int = 0) -> int:
    """CRC-32C (Castagnoli) of the bytes, continued from `crc`."""
    _check_bytes(data)
    return _core()[0].crc32c(data, crc)


def backend() -> str:
    """What encodes and decodes, for logs and reports: avx2, portable, or reference, NumPy without the native module."""
    core, isa = _core()
    return isa or core.kernels()


def _core() -> tuple[ModuleType, str]:
    """What is asked for or, without that, the best: the module, and its kernels' name ("": its choice)."""
    asked = os.environ.get("NACD_CODEC", "")
    if asked not in ("", "avx2", "portable", "reference"):
        raise ValueError(f"NACD_CODEC={asked}, must be avx2, portable or reference")
    module = native.load()
    if asked == "reference" or (module is None and asked == ""):
        return codec_reference, ""
    if module is None:
        raise ImportError(f"NACD_CODEC={asked}, but the native module was not built; run `make build`")
    return module, asked


def _locate(frame: Bytes, blocks: range | None) -> tuple[FrameInfo, range, int, int]:
    """The frame's head, the blocks that are meant, and where in the frame they begin and end."""
    info = read_info(frame)
    blocks = chosen_blocks(frame, info, blocks)
    return info, blocks, *_core()[0].block_range(frame, blocks.start, len(blocks))


def _pair(references: Sequence[Words]) -> tuple[Words | None, Words | None]:
    a, b, *_ = (*references, None, None)
    return a, b


def _check_words(name: str, array: Any, count: int | None = None) -> None:
    _check_array(name, array, np.uint32)
    if count is not None and len(array) != count:
        raise ValueError(f"{name} has {len(array)} words, must have {count}")


def _check_bytes(array: Any) -> None:
    _check_array("a frame", array, np.uint8)


def _check_array(name: str, array: Any, dtype: type) -> None:
    good = isinstance(array, np.ndarray) and array.dtype == dtype and array.ndim == 1
    if not (good and array.flags.c_contiguous and array.flags.aligned):
        kind = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} is {kind}, must be a contiguous, aligned array of one dimension of {np.dtype(dtype)}")


def _check_runs(runs: Sequence[tuple[int, float, float]], count: int) -> None:
    last, tiles = -1, ceil_div(count, TILE)
    for first_tile, step, tolerance in runs:
        if not last < first_tile < tiles:
            raise ValueError(f"run at tile {first_tile}, must be above {last} and below the {tiles} tiles")
        if not 2.0**-126 <= step <= 2.0**126:
            raise ValueError(f"step={step} at tile {first_tile}, must be from 2^-126 to 2^126, as its inverse")
        if not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance} at tile {first_tile}, must be 0 or more")
        last = first_tile


def _check_threads(threads: int) -> None:
    if threads < 1:
        raise ValueError(f"threads={threads}, must be at least 1")
