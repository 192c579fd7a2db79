"""Projected gradients of many samples on disk, made shard by shard; a killed run goes on at its last whole shard.

    <folder>/features1.npy    [n, d] float16, at the first checkpoint; features2.npy at the second, ..
    <folder>/exponents1.npy   [n] int16: row i stands for features[i] * 2^exponents[i]

Unnormalised: a row and its exponent are the gradient's projection, rounded to 11 bits against its largest feature.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..artifacts import Stage, read_json, write_json
from ..errors import NonFiniteError
from ..progress import Bar

Features = Callable[[int, int], Tensor]  # samples start, .., stop - 1 -> their features [stop - start, d]


def to_half(y: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(float16 [B, d], int16 [B]): each row over the power of two that brings its largest number to [0.5, 1)."""
    exponents = torch.frexp(y.abs().amax(1)).exponent
    scaled = torch.ldexp(y, -exponents[:, None].to(y.dtype)).half()
    return scaled.cpu().numpy(), exponents.to(torch.int16).cpu().numpy()


class Store:
    """The files of one folder, `n` samples of d features at each of several checkpoints."""

    def __init__(self, folder: Path, n: int, d: int):
        self.folder, self.n, self.d = folder, n, d

    def paths(self, checkpoint: int) -> tuple[Path, Path]:
        return self.folder / f"features{checkpoint}.npy", self.folder / f"exponents{checkpoint}.npy"

    def fill(self, stage: Stage, checkpoint: int, ids: Sequence[str], shard: int, features: Features, bar: Bar) -> None:
        """Write what is left of a checkpoint. Raises NonFiniteError naming the sample, before its shard is written."""
        progress = stage.work / "features.json"
        counts: dict[str, int] = read_json(progress) if progress.exists() else {}
        done = counts.get(str(checkpoint), 0)
        files = [self.open(path, shape, kind, new=done == 0) for path, shape, kind in self.layout(checkpoint)]
        bar.advance(done)
        for start in range(done, self.n, shard):
            stop = min(self.n, start + shard)
            rows = features(start, stop)
            if not bool(rows.isfinite().all()):
                bad = start + int((~rows.isfinite()).any(1).nonzero()[0])
                raise NonFiniteError(f"the gradient of sample {ids[bad]!r} at checkpoint {checkpoint} is not finite")
            for file, values in zip(files, to_half(rows), strict=True):
                file[start:stop] = values
                file.flush()
            counts[str(checkpoint)] = stop
            write_json(progress, counts)
            bar.advance(stop - start)

    def layout(self, checkpoint: int) -> list[tuple[Path, tuple[int, ...], type]]:
        features, exponents = self.paths(checkpoint)
        return [(features, (self.n, self.d), np.float16), (exponents, (self.n,), np.int16)]

    @staticmethod
    def open(path: Path, shape: tuple[int, ...], kind: type, new: bool) -> np.memmap:
        if not new:
            return np.lib.format.open_memmap(path, mode="r+")
        path.parent.mkdir(parents=True, exist_ok=True)
        file = np.lib.format.open_memmap(path, mode="w+", dtype=kind, shape=shape)
        with path.open("r+b") as f:  # a full disk is an error here; where the file is mapped it would be a crash
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
        return file

    def unit_rows(self, checkpoint: int, start: int, stop: int) -> Tensor:
        """Rows start, .., stop - 1 over their lengths, float32 [stop - start, d]; a zero row stays zero."""
        features = np.load(self.paths(checkpoint)[0], mmap_mode="r")[start:stop]
        return torch.nn.functional.normalize(torch.from_numpy(features.astype(np.float32)), dim=1)
