"""linear_cross_entropy on a GPU: the products on the vendor's GEMM, what is done to a row of logits in Triton.

Formulas and names as in linear_cross_entropy.py. A program has one row of logits, goes through it in blocks twice, and
leaves what the second product takes in the row's own memory, in the GEMM's type; in between everything is float32:

    losses_kernel   log-sum-exp (online) and loss of a row;  s -> (P - onehot) o g
    tangents_kernel the same with the row of s':             s -> (P - onehot) o g,  s' -> P' o g + (P - onehot) o g'

Rows of the buffers are padded to a multiple of 16 elements, so that loads stay wide whatever V is; nothing reads what
the padding holds. Losses are summed in a fixed order: results are the same bit for bit on every run. A label outside
the vocabulary is never used as an address: its row becomes NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch
from .linear_cross_entropy import (
    backward,
    backward_jvp,
    chunks,
    longest,
    project_,
    put,
    supervised,
    take,
    wide,
)
from .twice import Tensors, twice_differentiable

CHUNK_ELEMENTS = 2**26  # logits and their tangents at a time: 128 MB in 16 bits
ALIGN = 16  # elements; what Triton must know to divide a row's stride to load 16 bytes at once
WARPS = 8


def config(vocabulary: int, dtype: torch.dtype) -> dict[str, int]:
    """BLOCK of a row, twice 16 bytes a thread, and SPAN, what the loops go through: V up to a multiple of it.

    Both chips alike. Chosen by registers; not timed on a GPU yet.
    """
    block = min(4096 if dtype.itemsize == 2 else 2048, max(ALIGN, triton.next_power_of_2(vocabulary)))
    return {"BLOCK": block, "SPAN": triton.cdiv(vocabulary, block) * block, "num_warps": WARPS}


@triton.jit
def tanh_and_slope(x):
    """tanh(x) and 1 - tanh(x)^2 without cancellation: near 0 the series, whose next term is below float32's eps."""
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    q = x * x
    near = 1 + q * (-1 / 3 + q * (2 / 15 + q * (-17 / 315 + q * (62 / 2835))))
    t = tl.where(q < 0.0625, x * near, tl.where(x < 0, -far, far))
    return t, 4 * e / ((1 + e) * (1 + e))


@triton.jit
def scores(s_row, bias_ptr, at, V, width, cap, CAPPED: tl.constexpr):
    """z, t and g at the columns `at` of a row; -inf, 0 and 0 (t and g without a cap: 0 and 1) beyond V."""
    s = tl.load(s_row + at, mask=at < width, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        s += tl.load(bias_ptr + at, mask=at < V, other=0.0).to(tl.float32)
    t = tl.zeros_like(s)
    g = t + 1
    z = s
    if CAPPED:
        t, g = tanh_and_slope(s / cap)
        z = cap * t
    return tl.where(at < V, z, -float("inf")), t, g


@triton.jit
def losses_kernel(
    s_ptr, out_ptr, labels_ptr, bias_ptr, loss_ptr, V, width, s_stride, out_stride, cap,
    CAPPED: tl.constexpr, GRADIENT: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s [m, V] -> loss [m] and, if GRADIENT, out [m, V] = (P - onehot) o g; out may be s."""
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * s_stride
    label = tl.load(labels_ptr + row)
    columns = tl.arange(0, BLOCK)
    top = -3.4e38  # below every logit, and finite: no infinity is subtracted from another
    total = 0.0
    for start in range(0, SPAN, BLOCK):
        z, _t, _g = scores(s_row, bias_ptr, start + columns, V, width, cap, CAPPED)
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    inside = (label >= 0) & (label < V)
    z_at, _t_at, _g_at = scores(s_row, bias_ptr, tl.where(inside, label, 0), V, width, cap, CAPPED)
    lse = tl.where(inside, top + tl.log(total), float("nan"))
    tl.store(loss_ptr + row, lse - z_at)
    if GRADIENT:
        out_row = out_ptr + row * out_stride
        for start in range(0, SPAN, BLOCK):
            at = start + columns
            z, _t, g = scores(s_row, bias_ptr, at, V, width, cap, CAPPED)
            out = (tl.exp(z - lse) - (at == label).to(tl.float32)) * g
            tl.store(out_row + at, out.to(out_ptr.dtype.element_ty), mask=at < width)


@triton.jit
def tangents_kernel(
    s_ptr, s_t_ptr, labels_ptr, bias_ptr, loss_ptr, loss_t_ptr, V, width, s_stride, s_t_stride, cap,
    CAPPED: tl.constexpr, PRIMAL: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """s, s' [m, V] -> loss, loss' [m]; P' o g + (P - onehot) o g' over s' and, if PRIMAL, (P - onehot) o g over s."""
    row = tl.program_id(0).to(tl.int64)
    s_row = s_ptr + row * s_stride
    s_t_row = s_t_ptr + row * s_t_stride
    label = tl.load(labels_ptr + row)
    columns = tl.arange(0, BLOCK)
    top = -3.4e38
    total = 0.0
    along = 0.0  # <exp(z - top), z'>
    for start in range(0, SPAN, BLOCK):
        at = start + columns
        z, _t, g = scores(s_row, bias_ptr, at, V, width, cap, CAPPED)
        z_t = tl.where(at < V, g * tl.load(s_t_row + at, mask=at < width, other=0.0).to(tl.float32), 0.0)
        higher = tl.maximum(top, tl.max(z, 0))
        shrink = tl.exp(top - higher)
        e = tl.exp(z - higher)
        total = total * shrink + tl.sum(e, 0)
        along = along * shrink + tl.sum(e * z_t, 0)
        top = higher
    inside = (label >= 0) & (label < V)
    safe = tl.where(inside, label, 0)
    z_at, _t_at, g_at = scores(s_row, bias_ptr, safe, V, width, cap, CAPPED)
    lse = tl.where(inside, top + tl.log(total), float("nan"))
    mu = along / total
    tl.store(loss_ptr + row, lse - z_at)
    tl.store(loss_t_ptr + row, mu - g_at * tl.load(s_t_row + safe).to(tl.float32))
    for start in range(0, SPAN, BLOCK):
        at = start + columns
        z, t, g = scores(s_row, bias_ptr, at, V, width, cap, CAPPED)
        z_t = g * tl.load(s_t_row + at, mask=at < width, other=0.0).to(tl.float32)
        p = tl.exp(z - lse)
        rest = p - (at == label).to(tl.float32)
        out_t = p * (z_t - mu) * g
        if CAPPED:
            out_t -= rest * t * z_t * (2 / cap)
        tl.store(s_t_row + at, out_t.to(s_t_ptr.dtype.element_ty), mask=at < width)
        if PRIMAL:
            tl.store(s_row + at, (rest * g).to(s_ptr.dtype.element_ty), mask=at < width)


def padded_empty(rows: int, w: Tensor) -> Tensor:
    """Room for logits: [rows, V, up to a multiple of ALIGN]."""
    return w.new_empty(rows, triton.cdiv(w.shape[0], ALIGN) * ALIGN)


def logits_(out: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """h W^T in the first rows of the padded out, which are returned with their padding."""
    out = out[: h.shape[0]]
    torch.mm(h, w.T, out=out[:, : w.shape[0]])
    return out


def losses_(s: Tensor, out: Tensor, inputs: tuple, at: Tensor, loss: Tensor, gradient: bool) -> None:
    """Launch losses_kernel on a chunk: s, out padded [m, V], labels at and loss [m]."""
    _, w, _, bias, softcap, *_ = inputs
    launch(
        losses_kernel, (s.shape[0],), s, out, at, bias, loss, w.shape[0], s.shape[1], s.stride(0), out.stride(0),
        1.0 if softcap is None else softcap, CAPPED=softcap is not None, GRADIENT=gradient,
        **config(w.shape[0], s.dtype),
    )  # fmt: skip


def tangents_(s: Tensor, s_t: Tensor, inputs: tuple, at: Tensor, loss: Tensor, loss_t: Tensor, primal: bool) -> None:
    """Launch tangents_kernel on a chunk: s, s_t padded [m, V], labels at, loss and loss_t [m]."""
    _, w, _, bias, softcap, *_ = inputs
    launch(
        tangents_kernel, (s.shape[0],), s, s_t, at, bias, loss, loss_t, w.shape[0], s.shape[1], s.stride(0),
        s_t.stride(0), 1.0 if softcap is None else softcap, CAPPED=softcap is not None, PRIMAL=primal,
        **config(w.shape[0], s.dtype),
    )  # fmt: skip


def forward(*inputs: Any) -> tuple[Tensor, Tensors]:
    """Statistics: u [M, D], the indices of the supervised rows [n] and, where retained, their logits s [n, V]."""
    h, w, labels, _, _, retain, wanted = inputs
    keep = supervised(labels)
    hk, at = take(h, keep), take(labels, keep).contiguous()
    parts = chunks(keep.numel(), w.shape[0], CHUNK_ELEMENTS)
    room = padded_empty(longest(parts), w)
    retained = (padded_empty(keep.numel(), w),) if retain and wanted else ()
    losses, unit = wide(hk.new_empty(keep.numel())), torch.empty_like(hk)
    for part in parts:
        s = logits_(retained[0][part] if retained else room, hk[part], w)
        out = room[: s.shape[0]]
        losses_(s, out, inputs, at[part], losses[part], wanted)
        if wanted:
            project_(unit[part], out[:, : w.shape[0]], w, keep.numel())
    loss = losses.sum() / max(keep.numel(), 1)
    return loss, (put(unit, keep, h), keep, *retained) if wanted else ()


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    h, w, labels, *_ = inputs
    _, keep, *retained = stats
    (h_t,) = tangents
    if h_t is None:
        return None, (None,) * len(stats)
    hk, hk_t, at = take(h, keep), take(h_t, keep), take(labels, keep).contiguous()
    parts = chunks(keep.numel(), (1 if retained else 2) * w.shape[0], CHUNK_ELEMENTS)
    room, room_t = padded_empty(0 if retained else longest(parts), w), padded_empty(longest(parts), w)
    losses, losses_t = wide(hk.new_empty(2, keep.numel()))
    out = torch.empty_like(hk)
    for part in parts:
        s = retained[0][part] if retained else logits_(room, hk[part], w)
        s_t = logits_(room_t, hk_t[part], w)
        tangents_(s, s_t, inputs, at[part], losses[part], losses_t[part], False)
        project_(out[part], s_t[:, : w.shape[0]], w, keep.numel())
    loss_t = losses_t.sum() / max(keep.numel(), 1)
    return loss_t, (put(out, keep, h), None, *(None for _ in retained))


def forward_dual(inputs: tuple, tangents: Tensors) -> tuple[Tensor, Tensors, Tensor | None, Tensors]:
    """Primal and tangent rows in one product of twice the rows, each way."""
    h, w, labels, *_ = inputs
    (h_t,) = tangents
    keep = supervised(labels)
    hk, hk_t, at = take(h, keep), take(h_t, keep), take(labels, keep).contiguous()
    parts = chunks(keep.numel(), 2 * w.shape[0], CHUNK_ELEMENTS)
    room = padded_empty(2 * longest(parts), w)
    losses, losses_t = wide(hk.new_empty(2, keep.numel()))
    unit, unit_t = torch.empty_like(hk), torch.empty_like(hk)
    for part in parts:
        both = logits_(room, torch.cat([hk[part], hk_t[part]]), w)
        s, s_t = both.chunk(2)
        tangents_(s, s_t, inputs, at[part], losses[part], losses_t[part], True)
        u = hk.new_empty(both.shape[0], hk.shape[1])
        project_(u, both[:, : w.shape[0]], w, keep.numel())
        unit[part], unit_t[part] = u.chunk(2)
    n = max(keep.numel(), 1)
    return losses.sum() / n, (put(unit, keep, h), keep), losses_t.sum() / n, (put(unit_t, keep, h), None)


linear_cross_entropy_op = twice_differentiable(
    forward, backward, jvp, backward_jvp, differentiable=1, forward_dual=forward_dual
)
