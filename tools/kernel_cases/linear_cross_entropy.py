"""Launches of linear_cross_entropy: both kernels, bfloat16 in every variant, float32 in the largest ones."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from nacd_kernels.linear_cross_entropy_triton import forward, forward_dual, jvp

D, V = 16, 50272


def cases() -> Iterator[Callable[[], object]]:
    labels = torch.zeros(2, dtype=torch.int64)
    for dtype, caps in ((torch.bfloat16, (None, 30.0)), (torch.float32, (None,))):
        h, w = torch.zeros(2, D, dtype=dtype), torch.zeros(V, D, dtype=dtype)
        for cap in caps:
            inputs = (h, w, labels, None, cap, True, True)
            yield partial(forward, *inputs)
            yield partial(forward_dual, inputs, (h,))
        if dtype == torch.bfloat16:
            yield partial(forward, *inputs[:-1], False)
            yield partial(jvp, inputs, (h, labels), (h,))
