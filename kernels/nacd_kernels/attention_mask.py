"""Which keys a query sees, as plain numbers: segments of rows, a sliding window, and the cap of the scores.

    packed     one row of samples laid end to end, sample s in tokens cu_seqlens[s] <= t < cu_seqlens[s + 1]
    padded     one run of real tokens a row, with padding before it (left) or after it (right)
    window     query i sees the keys i - window < j <= i (Mistral, arXiv 2310.06825, section 2; Gemma)
    softcap    scores s -> softcap tanh(s / softcap), before the mask (Gemma 2, arXiv 2408.00118, section 2)

The kernels and the reference read a `Mask`; nothing else of the options reaches them. B rows, T tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check

Segment = tuple[int, int, int]  # (row, begin, end): the tokens begin <= t < end of a row


class Run(NamedTuple):
    """Segments of one length that lie regularly: the same tokens of `rows` rows, or `parts` neighbours in one row."""

    row: int
    rows: int
    begin: int
    length: int
    parts: int

    def cut(self, x: Tensor) -> Tensor:
        """The tokens of x [B, H, T, e] as a view [n, H, length, e], n = rows * parts."""
        x = x[self.row : self.row + self.rows, :, self.begin : self.begin + self.length * self.parts]
        return x if self.parts == 1 else x[0].unflatten(1, (self.parts, self.length)).transpose(0, 1)

    def joined(self, other: "Run") -> "Run | None":
        """This run and the segment `other` after it as one run, or None."""
        if other.length != self.length:
            return None
        if self.parts == 1 and (other.row, other.begin) == (self.row + self.rows, self.begin):
            return self._replace(rows=self.rows + 1)
        if self.rows == 1 and (other.row, other.begin) == (self.row, self.begin + self.length * self.parts):
            return self._replace(parts=self.parts + 1)
        return None


@dataclass(frozen=True)
class Mask:
    """A query sees the keys of its own segment up to itself, the last `window` of them.

    Tokens outside every segment see nothing and are seen by none: their results are zeros. Immutable and hashable,
    and a leaf to pytrees: to an op it is a constant like a float.
    """

    segments: tuple[Segment, ...]  # none of them empty, in the order of rows and tokens, none overlapping
    window: int | None = None  # None where it would hide nothing
    softcap: float | None = None

    @classmethod
    def of(
        cls,
        B: int,
        T: int,
        cu_seqlens: Sequence[int] | Tensor | None = None,
        key_padding: Tensor | None = None,
        window: int | None = None,
        softcap: float | None = None,
    ) -> "Mask":
        """The mask of `flash_attention`'s options, which are checked here; ValueError says what is wrong."""
        check(cu_seqlens is None or key_padding is None, "cu_seqlens and key_padding: packed rows have no padding")
        if cu_seqlens is not None:
            segments = packed_segments(B, T, cu_seqlens)
        elif key_padding is not None:
            segments = padded_segments(B, T, key_padding)
        else:
            segments = whole_rows(B, T)
        check(window is None or window >= 1, f"window={window}: must be at least 1, a query sees itself")
        check(softcap is None or 0 < softcap < math.inf, f"softcap={softcap}: must be positive and finite")
        longest = max((end - begin for _, begin, end in segments), default=0)
        window = None if window is None or window >= longest else int(window)
        return cls(segments, window, None if softcap is None else float(softcap))

    def covers(self, B: int, T: int) -> bool:
        """Every token of B rows of T is in a segment."""
        return sum(end - begin for _, begin, end in self.segments) == B * T

    def runs(self) -> Iterator[Run]:
        """The segments, neighbours of one shape together: they can be computed as one batch."""
        run: Run | None = None
        for row, begin, end in self.segments:
            segment = Run(row, 1, begin, end - begin, 1)
            longer = None if run is None else run.joined(segment)
            if run is not None and longer is None:
                yield run
            run = segment if longer is None else longer
        if run is not None:
            yield run


def whole_rows(B: int, T: int) -> tuple[Segment, ...]:
    return tuple((row, 0, T) for row in range(B)) if T else ()


def packed_segments(B: int, T: int, cu_seqlens: Sequence[int] | Tensor) -> tuple[Segment, ...]:
    """Samples laid end to end in one row. Waits for the device where cu_seqlens is a tensor on one."""
    check(B == 1, f"cu_seqlens with a batch of {B}: packed samples lie in one row, B must be 1")
    if isinstance(cu_seqlens, Tensor):
        integral = not (cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool)
        check(
            integral and cu_seqlens.ndim == 1,
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: must be integers [S + 1]",
        )
        borders = [int(t) for t in cu_seqlens.tolist()]
    else:
        borders = [int(t) for t in cu_seqlens]
    check(
        len(borders) >= 1 and borders[0] == 0 and borders[-1] == T,
        f"cu_seqlens goes from {borders[0] if borders else None} to {borders[-1] if borders else None}: "
        f"must go from 0 to the number of tokens, {T}",
    )
    for begin, end in pairwise(borders):
        check(begin < end, f"cu_seqlens has {begin} before {end}: must increase, every sample has a token")
    return tuple((0, begin, end) for begin, end in pairwise(borders))


def padded_segments(B: int, T: int, key_padding: Tensor) -> tuple[Segment, ...]:
    """The run of real tokens of every row that has one. Waits for the device where key_padding is on one."""
    check(
        key_padding.dtype == torch.bool and tuple(key_padding.shape) == (B, T),
        f"key_padding is {key_padding.dtype} {tuple(key_padding.shape)}: must be torch.bool {(B, T)}",
    )
    segments = []
    for row, real in enumerate(key_padding.tolist()):
        count = sum(real)
        begin = real.index(True) if count else 0
        check(
            all(real[begin : begin + count]),
            f"key_padding row {row} has padding between real tokens: must have one run of them",
        )
        if count:
            segments.append((row, begin, begin + count))
    return tuple(segments)
