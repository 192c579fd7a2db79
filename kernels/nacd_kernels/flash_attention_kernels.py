"""The Triton kernels of flash_attention: six passes over tiles of scores that never leave the registers.

Formulas and names as in flash_attention.py; x_t is the tangent of x. A program has one tile of one head:

    forward, forward_along   a tile of queries, over its keys, softmax online    O, lse        and O', mu
    dq, dq_along             a tile of queries, over its keys                    dQ, D         and dQ', D'
    dkdv, dkdv_along         a tile of keys, over the queries of its heads       dK, dV        and dK', dV'

so every sum has one owner and one order: no atomics, the same bits on every run. dq and dkdv can come without their
primal half (PRIMAL), the other kernels give both. dq goes first: it finds D, which dkdv reads.

A tile is (row b, begin and end of its segment, first token); tokens are counted in the row. q, k, v and dO, and their
tangents laid out alike, come with strides of row, head and token; O, dQ, dK, dV and their tangents lie as
[B, T, heads, d], lse, mu, D and D' as [B, heads, T]. Products are of the inputs' type, with P and dS rounded to it as
in FlashAttention, and summed in float32. Exponentials are powers of 2, and lse is a logarithm to base 2: it enters the
exponent without a rounding of its own. Its tangent mu is the natural one's.
"""

import triton
import triton.language as tl

from .linear_cross_entropy_triton import tanh_and_slope

LOG2E = tl.constexpr(1.4426950408889634)
LOW = tl.constexpr(-1e30)  # below every score, and finite: a row that has seen no key yet is no NaN


@triton.jit
def place(tiles_ptr, n_tiles):
    """The head and the tile of this program."""
    pid = tl.program_id(0)
    at = tiles_ptr + 4 * (pid % n_tiles)
    row = tl.load(at).to(tl.int64)
    return row, (pid // n_tiles).to(tl.int64), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def get(ptr, first, stride, end, d, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] of a head from token `first` on; zeros from token `end` and from column d on."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    at = ptr + tl.cast(first, tl.int64) * stride + row * stride + column
    return tl.load(at, mask=(first + row < end) & (column < d), other=0.0)


@triton.jit
def put(ptr, first, stride, end, d, x):
    """What `get` reads."""
    row, column = tl.arange(0, x.shape[0])[:, None], tl.arange(0, x.shape[1])[None, :]
    at = ptr + tl.cast(first, tl.int64) * stride + row * stride + column
    tl.store(at, x.to(ptr.dtype.element_ty), mask=(first + row < end) & (column < d))


@triton.jit
def dot(a, b, total):
    """total + a b, a rounded to b's type."""
    if b.dtype == tl.float32:
        return tl.dot(a, b, total, input_precision="tf32x3")
    else:
        return tl.dot(a.to(b.dtype), b, total)


@triton.jit
def product(a, b):
    return dot(a, b, tl.zeros((a.shape[0], b.shape[1]), tl.float32))


@triton.jit
def capped(s, c, cap):
    """Of s = q k^T: the score times log2(e), and t = tanh(c s / cap) and 1 - t^2 (0 and 1 without a cap)."""
    if cap is None:
        return s * (c * LOG2E), 0.0, 1.0
    else:
        t, slope = tanh_and_slope(s * (c / cap))
        return t * (cap * LOG2E), t, slope


@triton.jit
def sees(query, key, window):
    seen = key <= query
    if window is not None:
        seen = seen & (key > query - window)
    return seen


@triton.jit
def key_range(begin, end, first, window, ROWS: tl.constexpr):
    """(lo, hi): the keys that a tile of queries sees."""
    hi = tl.minimum(first + ROWS, end)
    if window is None:
        return begin, hi
    else:
        return tl.maximum(begin, first + 1 - window), hi


@triton.jit
def last_query(end, first, window, ROWS: tl.constexpr):
    """Where the queries end that see a tile of keys."""
    if window is None:
        return end
    else:
        return tl.minimum(end, first + ROWS - 1 + window)


@triton.jit
def rowsum(x, y):
    return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)


@triton.jit
def forward_step(
    q, k_head, v_head, i, j, kt, vt, end, d, c, cap, window, top, total, o, STEP: tl.constexpr, MASKED: tl.constexpr
):
    k = get(k_head, j, kt, end, d, STEP, q.shape[1])
    z, _, _ = capped(product(q, tl.trans(k)), c, cap)
    if MASKED:
        z = tl.where(sees(i[:, None], j + tl.arange(0, STEP)[None, :], window), z, LOW)
    higher = tl.maximum(top, tl.max(z, 1))
    shrink = tl.exp2(top - higher)
    p = tl.exp2(z - higher[:, None])
    v = get(v_head, j, vt, end, d, STEP, q.shape[1])
    return higher, total * shrink + tl.sum(p, 1), dot(p, v, o * shrink[:, None])


@triton.jit
def forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr,
    tiles_ptr, n_tiles, T, H, ratio, d, c, cap, window, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    b, h, begin, end, first = place(tiles_ptr, n_tiles)
    k_head, v_head = k_ptr + b * kb + h // ratio * kh, v_ptr + b * vb + h // ratio * vh
    q = get(q_ptr + b * qb + h * qh, first, qt, end, d, ROWS, WIDTH)
    i = first + tl.arange(0, ROWS)
    top, total = tl.full((ROWS,), LOW, tl.float32), tl.zeros((ROWS,), tl.float32)
    o = tl.zeros((ROWS, WIDTH), tl.float32)
    lo, hi = key_range(begin, end, first, window, ROWS)
    mid = lo
    if window is None:  # the steps that every query sees whole need no mask
        mid = lo + (first + 1 - lo) // STEP * STEP
        for j in range(lo, mid, STEP):
            top, total, o = forward_step(
                q, k_head, v_head, i, j, kt, vt, end, d, c, cap, window, top, total, o, STEP, False
            )
    for j in range(mid, hi, STEP):
        top, total, o = forward_step(q, k_head, v_head, i, j, kt, vt, end, d, c, cap, window, top, total, o, STEP, True)
    tl.store(lse_ptr + (b * H + h) * T + i, top + tl.log2(total), mask=i < end)
    put(o_ptr + (b * T * H + h) * d, first, H * d, end, d, o / total[:, None])


@triton.jit
def score_tangent(q, q_t, k, k_t, c, slope):
    """Z' [queries, keys] = slope c (Q' K^T + Q K'^T)."""
    return dot(q, tl.trans(k_t), product(q_t, tl.trans(k))) * (c * slope)


@triton.jit
def forward_along_kernel(
    q_ptr, q_t_ptr, k_ptr, k_t_ptr, v_ptr, v_t_ptr, o_ptr, o_t_ptr, lse_ptr, mu_ptr,
    tiles_ptr, n_tiles, T, H, ratio, d, c, cap, window, qb, qh, qt, kb, kh, kt, vb, vh, vt,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """O = P V and O' = (P o (Z' - mu)) V + P V'; lse and mu = rowsum(P o Z').

    mu, too, is that of the keys so far, and O' is corrected when it moves: what all keys have in common in Z' must be
    taken away before P o Z' is rounded.
    """
    b, h, begin, end, first = place(tiles_ptr, n_tiles)
    q_at, k_at, v_at, o_at = b * qb + h * qh, b * kb + h // ratio * kh, b * vb + h // ratio * vh, (b * T * H + h) * d
    q = get(q_ptr + q_at, first, qt, end, d, ROWS, WIDTH)
    q_t = get(q_t_ptr + q_at, first, qt, end, d, ROWS, WIDTH)
    i = first + tl.arange(0, ROWS)
    top, total, mu = tl.full((ROWS,), LOW, tl.float32), tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    o, o_t = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    lo, hi = key_range(begin, end, first, window, ROWS)
    for j in tl.range(lo, hi, STEP, disable_licm=True):
        k = get(k_ptr + k_at, j, kt, end, d, STEP, WIDTH)
        k_t = get(k_t_ptr + k_at, j, kt, end, d, STEP, WIDTH)
        z, _, slope = capped(product(q, tl.trans(k)), c, cap)
        z = tl.where(sees(i[:, None], j + tl.arange(0, STEP)[None, :], window), z, LOW)
        z_t = score_tangent(q, q_t, k, k_t, c, slope)
        higher = tl.maximum(top, tl.max(z, 1))
        shrink = tl.exp2(top - higher)
        p = tl.exp2(z - higher[:, None])
        top, total = higher, total * shrink + tl.sum(p, 1)
        move = tl.sum(p * (z_t - mu[:, None]), 1) / total
        mu += move
        v = get(v_ptr + v_at, j, vt, end, d, STEP, WIDTH)
        v_t = get(v_t_ptr + v_at, j, vt, end, d, STEP, WIDTH)
        o *= shrink[:, None]
        o_t = dot(p, v_t, dot(p * (z_t - mu[:, None]), v, o_t * shrink[:, None] - move[:, None] * o))
        o = dot(p, v, o)
    at = (b * H + h) * T + i
    tl.store(lse_ptr + at, top + tl.log2(total), mask=i < end)
    tl.store(mu_ptr + at, mu, mask=i < end)
    put(o_ptr + o_at, first, H * d, end, d, o / total[:, None])
    put(o_t_ptr + o_at, first, H * d, end, d, o_t / total[:, None])


@triton.jit
def dq_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, do_ptr, dq_ptr, delta_ptr,
    tiles_ptr, n_tiles, T, H, ratio, d, c, cap, window, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dQ = c dS K, and D = rowsum(dO o O) for dkdv_kernel."""
    b, h, begin, end, first = place(tiles_ptr, n_tiles)
    k_at, v_at, o_at = b * kb + h // ratio * kh, b * vb + h // ratio * vh, (b * T * H + h) * d
    q = get(q_ptr + b * qb + h * qh, first, qt, end, d, ROWS, WIDTH)
    do = get(do_ptr + b * ob + h * oh, first, ot, end, d, ROWS, WIDTH)
    i = first + tl.arange(0, ROWS)
    at = (b * H + h) * T + i
    lse = tl.load(lse_ptr + at, mask=i < end, other=0.0)
    delta = rowsum(do, get(o_ptr + o_at, first, H * d, end, d, ROWS, WIDTH))
    tl.store(delta_ptr + at, delta, mask=i < end)
    dq = tl.zeros((ROWS, WIDTH), tl.float32)
    lo, hi = key_range(begin, end, first, window, ROWS)
    for j in tl.range(lo, hi, STEP, disable_licm=True):
        k = get(k_ptr + k_at, j, kt, end, d, STEP, WIDTH)
        v = get(v_ptr + v_at, j, vt, end, d, STEP, WIDTH)
        z, _, slope = capped(product(q, tl.trans(k)), c, cap)
        p = tl.exp2(z - lse[:, None])
        p = tl.where(sees(i[:, None], j + tl.arange(0, STEP)[None, :], window), p, 0.0)
        dp = product(do, tl.trans(v)) - delta[:, None]
        dq = dot(p * dp * slope, k, dq)
    put(dq_ptr + o_at, first, H * d, end, d, dq * c)


@triton.jit
def dkdv_kernel(
    q_ptr, k_ptr, v_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr,
    tiles_ptr, n_tiles, T, H, ratio, d, c, cap, window, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dK = c dS^T Q and dV = P^T dO. Queries beyond the segment are zeros like their dO and D, and add nothing."""
    b, g, _begin, end, first = place(tiles_ptr, n_tiles)
    G = H // ratio
    k = get(k_ptr + b * kb + g * kh, first, kt, end, d, ROWS, WIDTH)
    v = get(v_ptr + b * vb + g * vh, first, vt, end, d, ROWS, WIDTH)
    j = first + tl.arange(0, ROWS)
    dk, dv = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for h in range(g * ratio, (g + 1) * ratio):
        q_at, do_at, at = b * qb + h * qh, b * ob + h * oh, (b * H + h) * T
        for start in tl.range(first, last_query(end, first, window, ROWS), STEP, disable_licm=True):
            i = start + tl.arange(0, STEP)
            q = get(q_ptr + q_at, start, qt, end, d, STEP, WIDTH)
            do = get(do_ptr + do_at, start, ot, end, d, STEP, WIDTH)
            lse = tl.load(lse_ptr + at + i, mask=i < end, other=0.0)
            delta = tl.load(delta_ptr + at + i, mask=i < end, other=0.0)
            z, _, slope = capped(product(k, tl.trans(q)), c, cap)
            p = tl.exp2(z - lse[None, :])
            p = tl.where(sees(i[None, :], j[:, None], window), p, 0.0)
            dv = dot(p, do, dv)
            dp = product(v, tl.trans(do)) - delta[None, :]
            dk = dot(p * dp * slope, q, dk)
    out = (b * T * G + g) * d
    put(dk_ptr + out, first, G * d, end, d, dk * c)
    put(dv_ptr + out, first, G * d, end, d, dv)


@triton.jit
def score_gradients(p, z_t, mu, dp, dp_t, t, slope, cap):
    """dS and dS', of dP - D and dP' - D'."""
    ds, ds_t = p * dp, p * ((z_t - mu) * dp + dp_t)
    if cap is None:
        return ds, ds_t
    else:
        return ds * slope, ds_t * slope - ds * z_t * t * (2 / cap)


@triton.jit
def dq_along_kernel(
    q_ptr, q_t_ptr, k_ptr, k_t_ptr, v_ptr, v_t_ptr, o_ptr, o_t_ptr, lse_ptr, mu_ptr, do_ptr, do_t_ptr,
    dq_ptr, dq_t_ptr, delta_ptr, delta_t_ptr,
    tiles_ptr, n_tiles, T, H, ratio, d, c, cap, window, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot,
    PRIMAL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dQ' and, if PRIMAL, dQ; D, and D' = rowsum(dO o O' + dO' o O), for dkdv_along_kernel."""
    b, h, begin, end, first = place(tiles_ptr, n_tiles)
    q_at, k_at, v_at = b * qb + h * qh, b * kb + h // ratio * kh, b * vb + h // ratio * vh
    do_at, o_at = b * ob + h * oh, (b * T * H + h) * d
    q = get(q_ptr + q_at, first, qt, end, d, ROWS, WIDTH)
    q_t = get(q_t_ptr + q_at, first, qt, end, d, ROWS, WIDTH)
    do = get(do_ptr + do_at, first, ot, end, d, ROWS, WIDTH)
    o = get(o_ptr + o_at, first, H * d, end, d, ROWS, WIDTH)
    i = first + tl.arange(0, ROWS)
    at = (b * H + h) * T + i
    lse = tl.load(lse_ptr + at, mask=i < end, other=0.0)
    mu = tl.load(mu_ptr + at, mask=i < end, other=0.0)
    delta, delta_t = rowsum(do, o), rowsum(do, get(o_t_ptr + o_at, first, H * d, end, d, ROWS, WIDTH))
    if do_t_ptr is not None:
        do_t = get(do_t_ptr + do_at, first, ot, end, d, ROWS, WIDTH)
        delta_t += rowsum(do_t, o)
    tl.store(delta_ptr + at, delta, mask=i < end)
    tl.store(delta_t_ptr + at, delta_t, mask=i < end)
    dq, dq_t = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    lo, hi = key_range(begin, end, first, window, ROWS)
    for j in tl.range(lo, hi, STEP, disable_licm=True):
        k = get(k_ptr + k_at, j, kt, end, d, STEP, WIDTH)
        k_t = get(k_t_ptr + k_at, j, kt, end, d, STEP, WIDTH)
        v = get(v_ptr + v_at, j, vt, end, d, STEP, WIDTH)
        v_t = get(v_t_ptr + v_at, j, vt, end, d, STEP, WIDTH)
        z, t, slope = capped(product(q, tl.trans(k)), c, cap)
        z_t = score_tangent(q, q_t, k, k_t, c, slope)
        p = tl.exp2(z - lse[:, None])
        p = tl.where(sees(i[:, None], j + tl.arange(0, STEP)[None, :], window), p, 0.0)
        dp = product(do, tl.trans(v)) - delta[:, None]
        dp_t = product(do, tl.trans(v_t))
        if do_t_ptr is not None:
            dp_t = dot(do_t, tl.trans(v), dp_t)
        ds, ds_t = score_gradients(p, z_t, mu[:, None], dp, dp_t - delta_t[:, None], t, slope, cap)
        if PRIMAL:
            dq = dot(ds, k, dq)
        dq_t = dot(ds, k_t, dot(ds_t, k, dq_t))
    if PRIMAL:
        put(dq_ptr + o_at, first, H * d, end, d, dq * c)
    put(dq_t_ptr + o_at, first, H * d, end, d, dq_t * c)


@triton.jit
def dkdv_along_kernel(
    q_ptr, q_t_ptr, k_ptr, k_t_ptr, v_ptr, v_t_ptr, lse_ptr, mu_ptr, do_ptr, do_t_ptr, delta_ptr, delta_t_ptr,
    dk_ptr, dk_t_ptr, dv_ptr, dv_t_ptr,
    tiles_ptr, n_tiles, T, H, ratio, d, c, cap, window, qb, qh, qt, kb, kh, kt, vb, vh, vt, ob, oh, ot,
    PRIMAL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """dK', dV' and, if PRIMAL, dK, dV."""
    b, g, _begin, end, first = place(tiles_ptr, n_tiles)
    G = H // ratio
    k_at, v_at = b * kb + g * kh, b * vb + g * vh
    k = get(k_ptr + k_at, first, kt, end, d, ROWS, WIDTH)
    k_t = get(k_t_ptr + k_at, first, kt, end, d, ROWS, WIDTH)
    v = get(v_ptr + v_at, first, vt, end, d, ROWS, WIDTH)
    v_t = get(v_t_ptr + v_at, first, vt, end, d, ROWS, WIDTH)
    j = first + tl.arange(0, ROWS)
    dk, dk_t = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    dv, dv_t = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for h in range(g * ratio, (g + 1) * ratio):
        q_at, do_at, at = b * qb + h * qh, b * ob + h * oh, (b * H + h) * T
        for start in tl.range(first, last_query(end, first, window, ROWS), STEP, disable_licm=True):
            i = start + tl.arange(0, STEP)
            q = get(q_ptr + q_at, start, qt, end, d, STEP, WIDTH)
            q_t = get(q_t_ptr + q_at, start, qt, end, d, STEP, WIDTH)
            do = get(do_ptr + do_at, start, ot, end, d, STEP, WIDTH)
            lse = tl.load(lse_ptr + at + i, mask=i < end, other=0.0)
            mu = tl.load(mu_ptr + at + i, mask=i < end, other=0.0)
            delta = tl.load(delta_ptr + at + i, mask=i < end, other=0.0)
            delta_t = tl.load(delta_t_ptr + at + i, mask=i < end, other=0.0)
            z, t, slope = capped(product(k, tl.trans(q)), c, cap)
            z_t = score_tangent(k, k_t, q, q_t, c, slope)
            p = tl.exp2(z - lse[None, :])
            p = tl.where(sees(i[None, :], j[:, None], window), p, 0.0)
            dp = product(v, tl.trans(do)) - delta[None, :]
            dp_t = product(v_t, tl.trans(do))
            dv_t = dot(p * (z_t - mu[None, :]), do, dv_t)
            if do_t_ptr is not None:
                do_t = get(do_t_ptr + do_at, start, ot, end, d, STEP, WIDTH)
                dp_t = dot(v, tl.trans(do_t), dp_t)
                dv_t = dot(p, do_t, dv_t)
            ds, ds_t = score_gradients(p, z_t, mu[None, :], dp, dp_t - delta_t[None, :], t, slope, cap)
            dk_t = dot(ds, q_t, dot(ds_t, q, dk_t))
            if PRIMAL:
                dk, dv = dot(ds, q, dk), dot(p, do, dv)
    out = (b * T * G + g) * d
    if PRIMAL:
        put(dk_ptr + out, first, G * d, end, d, dk * c)
        put(dv_ptr + out, first, G * d, end, d, dv)
    put(dk_t_ptr + out, first, G * d, end, d, dk_t * c)
    put(dv_t_ptr + out, first, G * d, end, d, dv_t)
