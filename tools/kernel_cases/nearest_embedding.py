"""Launches of nearest_embedding: few and many queries, in both precisions."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nacd_kernels.nearest_embedding_triton import tile_minima

D, V = 2048, 512


def cases() -> Iterator[Callable[[], object]]:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        table = torch.zeros(V, D, dtype=dtype)
        for P in (1, 96, 256):
            yield partial(tile_minima, torch.zeros(P, D, dtype=dtype), table, torch.zeros(V))
