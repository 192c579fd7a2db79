"""Triton kernels or the PyTorch reference: one decision, which can be read and overridden.

`NACD_KERNELS` is `auto` (the default: Triton for CUDA tensors where Triton is installed), `triton` or `reference`.
`triton` means it: where the kernels cannot run it is an error, never a fallback. Under Triton's interpreter
(`TRITON_INTERPRET=1`, how the kernels are tested without a GPU) they run on CPU tensors too.
"""

import os
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check

VARIABLE = "NACD_KERNELS"
CHOICES = ("auto", "triton", "reference")
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Backend(NamedTuple):
    """What runs, and why."""

    name: str  # triton or reference
    reason: str


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


def backend(x: Tensor) -> Backend:
    """What an op runs on a tensor like x.

    Raises ValueError where NACD_KERNELS is no choice, or asks for Triton where its kernels cannot run.
    """
    asked = os.environ.get(VARIABLE, "auto")
    check(asked in CHOICES, f"{VARIABLE}={asked!r}: must be one of {', '.join(CHOICES)}")
    if asked == "reference":
        return Backend("reference", f"{VARIABLE}=reference")
    obstacle = why_not_triton(x)
    if asked == "triton":
        check(not obstacle, f"{VARIABLE}=triton, but {obstacle}")
        return Backend("triton", f"{VARIABLE}=triton")
    if obstacle:
        return Backend("reference", obstacle)
    if not x.is_cuda:
        return Backend("reference", f"x is on {x.device}")
    return Backend("triton", f"x is {x.dtype} on {x.device}")


def why_not_triton(x: Tensor) -> str:
    """What keeps the kernels from running on a tensor like x; empty if nothing does."""
    if not has_triton():
        return "triton is not installed"
    if not (x.is_cuda or (x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")):
        return f"x is on {x.device}, and TRITON_INTERPRET=1 is not set"
    if x.dtype not in KERNEL_DTYPES:
        return f"x is {x.dtype}, and the kernels take float32, float16 and bfloat16"
    return ""


def use_triton(x: Tensor) -> bool:
    return backend(x).name == "triton"
