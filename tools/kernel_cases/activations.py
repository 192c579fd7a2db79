"""Launches of activations_triton.py: every variant of gelu and silu_mul, and of the other kinds the widest."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from nacd_kernels.activations import Activation
from nacd_kernels.activations_triton import activation, gated

NEEDS = (True, True)


def case(op: Activation, kind: str, dtype: torch.dtype, widest: bool) -> Iterator[Callable[[], object]]:
    x, x_t = (tuple(torch.zeros(2, 512, dtype=dtype) for _ in range(2 if op.gated else 1)) for _ in range(2))
    dy, dy_t = torch.zeros(2, 512, dtype=dtype), torch.zeros(2, 512, dtype=dtype)
    inputs: tuple[Tensor | str, ...] = (*x, kind)
    yield lambda: op.backward_dual(inputs, (), x_t, (), dy, dy_t, NEEDS)
    yield lambda: op.forward_dual(inputs, x_t)
    if widest:
        return
    yield lambda: op.forward(*inputs)
    yield lambda: op.jvp(inputs, (), x_t)
    yield lambda: op.backward(inputs, (), dy, NEEDS)
    yield lambda: op.backward_jvp(inputs, (), x_t, (), dy, dy_t, NEEDS)
    yield lambda: op.backward_jvp(inputs, (), x_t, (), dy, None, NEEDS)


def cases() -> Iterator[Callable[[], object]]:
    for op, every, others in ((activation, "gelu", ("relu", "gelu_tanh")), (gated, "silu", ("gelu", "gelu_tanh"))):
        yield from case(op, every, torch.bfloat16, widest=False)
        yield from case(op, every, torch.float32, widest=True)
        for kind in others:
            yield from case(op, kind, torch.bfloat16, widest=True)
