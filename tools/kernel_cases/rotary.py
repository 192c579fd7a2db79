"""Launches of rotary_triton.py: both directions and orders, whole and partial, each block."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nacd_kernels.rotary_triton import turn


def cases() -> Iterator[Callable[[], object]]:
    for d, width, dtype, interleaved, back in (
        (128, 128, torch.bfloat16, False, False),
        (128, 128, torch.bfloat16, False, True),
        (128, 128, torch.float32, False, True),
        (64, 64, torch.bfloat16, False, True),
        (256, 128, torch.bfloat16, True, True),
        (256, 256, torch.float32, True, False),
        (80, 32, torch.float32, False, True),
    ):
        x = torch.zeros(2, 16, 32, d, dtype=dtype).transpose(1, 2)
        table = torch.zeros(2, 1, 16, width, dtype=dtype)
        yield partial(turn, x, table, table, interleaved, back=back)
