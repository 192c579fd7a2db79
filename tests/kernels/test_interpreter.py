"""Triton's interpreter, as the tests use it, rounds, multiplies and loops as a GPU does."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import pytest
import torch

from tests.kernels.numerics import DEVICE

pytest.importorskip("triton")

import triton
from triton import language as tl


@triton.jit
def to_bfloat16(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


def test_float32_to_bfloat16_is_pytorchs_conversion() -> None:
    g = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=g).to(torch.int32)
    bits[:4] = torch.tensor([0x3F808000, 0x3F818000, 0x7F7FFFFF, 0x7F800000], dtype=torch.int32)  # ties, overflow, inf
    x = bits.view(torch.float32).to(DEVICE)
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=DEVICE)
    to_bfloat16[(1,)](x, out, x.numel(), BLOCK=256)
    torch.testing.assert_close(out, x.bfloat16(), rtol=0, atol=0, equal_nan=True)


@triton.jit
def square(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = BLOCK * tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, tl.trans(x)) + x.to(tl.float32))


def test_bfloat16_matrices_are_multiplied_as_numbers() -> None:
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    out = torch.empty(16, 16, device=DEVICE)
    square[(1,)](x, out, BLOCK=16)
    torch.testing.assert_close(out, x.float() @ x.float().T + x.float())
