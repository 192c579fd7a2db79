"""Rotary embedding on a GPU: one kernel, which is also its own derivative; formulas and names as in rotary.py.

A program turns the pairs of BLOCK_T tokens of one head and copies their features that do not turn. x may have any
strides (heads are mostly a transposed view); the result has x's layout where x is dense.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .twice import Maybe, Tensors, twice_differentiable


def config(pairs: int) -> dict[str, int]:
    """BLOCK_T tokens by BLOCK_P pairs of a program: 1024 pairs, 8 a thread.

    Both chips alike. Chosen by registers; not timed on a GPU yet.
    """
    block = triton.next_power_of_2(pairs)
    return {"BLOCK_T": max(1, 1024 // block), "BLOCK_P": block, "num_warps": 4}


@triton.jit
def turn_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, H, T, pairs,
    x_b, x_h, x_t, x_d, y_b, y_h, y_t, y_d, c_b, c_t,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, REST: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """x [B, H, T, d] -> y; cos, sin [B, T, 2 pairs] with strides c_b, c_t, 1; REST features follow the pairs."""
    i_b, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    t = (tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None].to(tl.int64)
    p = tl.arange(0, BLOCK_P)[None, :]
    first, second = (2 * p, 2 * p + 1) if INTERLEAVED else (p, p + pairs)
    mask = (t < T) & (p < pairs)
    x_row = x_ptr + i_b.to(tl.int64) * x_b + i_h.to(tl.int64) * x_h + t * x_t
    y_row = y_ptr + i_b.to(tl.int64) * y_b + i_h.to(tl.int64) * y_h + t * y_t
    table = i_b.to(tl.int64) * c_b + t * c_t
    a = tl.load(x_row + first * x_d, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(x_row + second * x_d, mask=mask, other=0.0).to(tl.float32)
    cos_a = tl.load(cos_ptr + table + first, mask=mask, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + table + second, mask=mask, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + table + first, mask=mask, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + table + second, mask=mask, other=0.0).to(tl.float32)
    if BACK:
        out_a, out_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        out_a, out_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(y_row + first * y_d, out_a, mask=mask)
    tl.store(y_row + second * y_d, out_b, mask=mask)
    for start in range(0, REST, BLOCK_P):
        at = 2 * pairs + start + p
        still = (t < T) & (start + p < REST)
        tl.store(y_row + at * y_d, tl.load(x_row + at * x_d, mask=still), mask=still)


def turn(x: Maybe, cos: Tensor, sin: Tensor, interleaved: bool, *, back: bool) -> Maybe:
    """As in rotary.py: x [B, H, T, d]; cos, sin [1 or B, 1, T, R]."""
    if x is None:
        return None
    (B, H, T, d), R = x.shape, cos.shape[-1]
    y = torch.empty_like(x)
    cos, sin = (t.contiguous() for t in (cos, sin))
    setting = config(R // 2)
    grid = (B * H, triton.cdiv(T, setting["BLOCK_T"]))
    launch(
        turn_kernel, grid, x, cos, sin, y, H, T, R // 2, *x.stride(), *y.stride(),
        0 if cos.shape[0] == 1 else cos.stride(0), R,
        INTERLEAVED=interleaved, BACK=back, REST=d - R, **setting,
    )  # fmt: skip
    return y


def forward(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensors]:
    return turn(x, cos, sin, interleaved, back=False), ()


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    return (turn(dy, *inputs[1:], back=True),)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Maybe, Tensors]:
    return turn(tangents[0], *inputs[1:], back=False), ()


def backward_jvp(
    inputs: tuple,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    dy: Tensor,
    dy_t: Maybe,
    needs: tuple[bool, ...],
) -> Tensors:
    return (turn(dy_t, *inputs[1:], back=True),)


rotary_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=1)
