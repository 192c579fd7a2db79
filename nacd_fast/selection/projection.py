"""Random projection of gradients to a few thousand features that keep their inner products (Johnson-Lindenstrauss).

y = G S / sqrt(d) with independent signs S (Achlioptas 2003), as in TRAK (arXiv 2303.14186) and LESS. S [P, d] is never
whole: word w of it, 64 signs in row-major order, is SplitMix64's output for the counter w (Steele et al. 2014), so any
block is made anew from the seed, the same one on every device.

B gradients, P parameters, d features.
"""

import torch
from torch import Tensor

BLOCK = 2**20  # signs made at a time: 4 MB in float32
WORD = 64  # signs of a word
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word."""
    return (word & (2**64 - 1)) - (2**64 if word & 2**63 else 0)


def shifted(z: Tensor, bits: int) -> Tensor:
    """z >> bits of unsigned words: torch's is that of signed ones."""
    return (z >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def words(first: int, count: int, seed: int, device: torch.device) -> Tensor:
    """SplitMix64 of the counters first, .., first + count - 1 [count] int64."""
    z = torch.arange(first + 1, first + count + 1, dtype=torch.int64, device=device)
    z = z.mul_(signed(GOLDEN)).add_(signed(seed * GOLDEN * GOLDEN))
    z = z.bitwise_xor_(shifted(z, 30)).mul_(signed(FIRST))
    z = z.bitwise_xor_(shifted(z, 27)).mul_(signed(SECOND))
    return z.bitwise_xor_(shifted(z, 31))


class Projection:
    """P numbers to d features, for one seed; d is a multiple of 64."""

    def __init__(self, d: int, seed: int, device: torch.device, dtype: torch.dtype = torch.float32):
        assert d % WORD == 0
        self.d, self.seed, self.device = d, seed, device
        self.rows = max(1, BLOCK // d)
        bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
        self.of_byte = (bits & 1).to(dtype) * 2 - 1  # [256, 8], the lowest bit first
        self.room = torch.empty(self.rows * d // 8, 8, dtype=dtype, device=device)

    def signs(self, first: int, rows: int) -> Tensor:
        """Rows first, .., first + rows - 1 of S [rows, d]; a view that the next call overwrites."""
        per_row = self.d // WORD
        found = words(first * per_row, rows * per_row, self.seed, self.device).view(torch.uint8).int()
        return torch.index_select(self.of_byte, 0, found, out=self.room[: len(found)]).view(rows, self.d)

    def __call__(self, gradients: Tensor) -> Tensor:
        """gradients [B, P] -> [B, d], of the signs' type."""
        out = gradients.new_zeros(len(gradients), self.d, dtype=self.room.dtype)
        for first in range(0, gradients.shape[1], self.rows):
            part = gradients[:, first : first + self.rows].to(self.room.dtype)
            out.addmm_(part, self.signs(first, part.shape[1]))
        return out.div_(self.d**0.5)
