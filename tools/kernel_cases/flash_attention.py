"""Launches of flash_attention_triton.py: both widths, 16 bits and float32; the wider with every option of the mask."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from nacd_kernels import flash_attention_triton as kernels
from nacd_kernels.attention_mask import Mask

B, H, T = 2, 4, 48
ALL = (True, True, True)
CASES: list[tuple[torch.dtype, int, int, dict[str, Any]]] = [  # dtype, G, d, options of the mask
    (torch.bfloat16, H, 64, {}),
    (torch.bfloat16, 2, 128, {}),
    (torch.float32, H, 64, {}),
    (torch.bfloat16, 2, 128, {"window": 16, "softcap": 50.0}),
]


def cases() -> Iterator[Callable[[], object]]:
    for dtype, G, d, options in CASES:
        q, do = (torch.zeros(B, T, H, d, dtype=dtype).transpose(1, 2) for _ in range(2))
        k, v = (torch.zeros(B, T, G, d, dtype=dtype).transpose(1, 2) for _ in range(2))
        inputs = (q, k, v, Mask.of(B, T, **options), d**-0.5)
        saved = (do, torch.zeros(B, H, T, 1))
        yield partial(kernels.forward, *inputs)
        yield partial(kernels.forward_dual, inputs, inputs[:3])
        yield partial(kernels.backward, inputs, saved, do, ALL)
        for do_t in (None, do):  # the tangents alone, and with the gradients
            yield partial(kernels.backward_jvp, inputs, saved, inputs[:3], saved, do, do_t, ALL)
