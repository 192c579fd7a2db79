"""Causal attention in blocks, twice differentiable, with memory linear in the sequence length.

FlashAttention-2 (arXiv 2307.08691) recomputes the weights P instead of keeping them; the tangents do the same. With c
the scale, S = c Q K^T (causal), mu = rowsum(P o S') (which is also the tangent of the log-sum-exp), D = rowsum(dO o O):

    P  = softmax(S)                 S' = c (Q' K^T + Q K'^T)      P' = P o (S' - mu)
    O  = P V                        O' = P' V + P V'
    dP = dO V^T                     dS = P o (dP - D)
    dQ = c dS K                     dK = c dS^T Q                 dV = P^T dO
    dP' = dO' V^T + dO V'^T         D' = rowsum(dO' o O + dO o O')
    dS' = P' o (dP - D) + P o (dP' - D')
    dQ' = c (dS' K + dS K')         dK' = c (dS'^T Q + dS^T Q')   dV' = P'^T dO + P^T dO'

A softcap C puts S <- C t with t = tanh(S / C), so S' <- (1 - t^2) S' and dS <- (1 - t^2) dS; the slope's tangent is
-2 t / C times the capped S'.

B batch, H query heads, G key heads (grouped: H a multiple of G), T tokens, d head width. This is the reference, on any
device and in any float type: tiles of whole rows of S, so P is their softmax and no statistics are kept. 16-bit inputs
are computed in float32.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_mask import Mask
from .attention_tiles import Tile, Tiles, by_run
from .checks import check, check_like
from .dispatch import use_triton
from .twice import Maybe, Tensors, add, autocast, times, twice_differentiable


def cut(x: Maybe, rows: slice) -> Maybe:
    return None if x is None else x[:, rows]


def turned(x: Maybe) -> Maybe:
    return None if x is None else x.mT


def rowsum(x: Maybe, y: Maybe) -> Maybe:
    return None if x is None or y is None else torch.linalg.vecdot(x, y).unsqueeze_(-1)


def where(needs: Sequence[bool], values: Sequence[Maybe]) -> Tensors:
    return tuple(x if need else None for x, need in zip(values, needs, strict=True))


def into(total: Maybe, a: Maybe, b: Maybe, scale: float = 1.0) -> None:
    """total += scale a b; nothing where the total is not wanted (None), or a or b is zero (None)."""
    if total is not None and a is not None and b is not None:
        total.baddbmm_(a, b, alpha=scale)


def product_along(a: Tensor, b: Tensor, a_t: Maybe, b_t: Maybe) -> Maybe:
    """The tangent a' b + a b' of a product, or None."""
    if a_t is None:
        return None if b_t is None else a @ b_t
    tangent = a_t @ b
    return tangent if b_t is None else tangent.baddbmm_(a, b_t)


def through_cap(x: Tensor, t: Maybe) -> Tensor:
    """(1 - t^2) x, in place; x itself without a cap."""
    return x if t is None else x.addcmul_(x * t, t, value=-1)


def weights(tile: Tile, q: Tensor, k: Tensor, softcap: float | None) -> tuple[Tensor, Maybe]:
    """P, and t = tanh(S / softcap) or None, of one tile."""
    s, t = q[:, tile.rows] @ k[:, tile.keys].mT, None
    if softcap is not None:
        t = s.div_(softcap).tanh_()
        s = t * softcap
    s[..., s.shape[-1] - tile.bias.shape[-1] :] += tile.bias
    return torch.softmax(s, -1), t


def weights_along(
    tile: Tile, q: Tensor, k: Tensor, q_t: Maybe, k_t: Maybe, softcap: float | None
) -> tuple[Tensor, Maybe, Maybe, Maybe]:
    """P, P', t and the tangent of the cap's slope 1 - t^2, of one tile; all but P may be None."""
    p, t = weights(tile, q, k, softcap)
    p_t = product_along(q[:, tile.rows], k[:, tile.keys].mT, cut(q_t, tile.rows), turned(cut(k_t, tile.keys)))
    if p_t is None:
        return p, None, t, None
    p_t, slope_t = through_cap(p_t, t), None
    if softcap is not None:
        slope_t = (p_t * t).mul_(-2 / softcap)
    p_t.mul_(p)
    return p, p_t.addcmul_(p, p_t.sum(-1, keepdim=True), value=-1), t, slope_t


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, c: float) -> tuple[Tensor, Tensors]:
    def work(tiles: Tiles, results: Tensors, q: Tensor, k: Tensor, v: Tensor) -> None:
        (o,), q = results, q * c
        for tile in tiles:
            p, _ = weights(tile, q, k, mask.softcap)
            into(o[:, tile.rows], p, v[:, tile.keys])

    return by_run(work, mask, (q,), (q, k, v))[0], ()


def backward(inputs: tuple, saved: Tensors, do: Tensor, needs: tuple[bool, ...]) -> Tensors:
    *qkv, mask, c = inputs

    def work(tiles: Tiles, results: Tensors, q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor) -> None:
        dq, dk, dv = results
        q, delta = q * c, rowsum(do, o)
        for tile in tiles:
            rows, keys = tile.rows, tile.keys
            p, t = weights(tile, q, k, mask.softcap)
            into(cut(dv, keys), p.mT, do[:, rows])
            ds = through_cap((do[:, rows] @ v[:, keys].mT).sub_(delta[:, rows]).mul_(p), t)
            into(cut(dq, rows), ds, k[:, keys], c)
            into(cut(dk, keys), ds.mT, q[:, rows])

    return by_run(work, mask, where(needs, qkv), [*qkv, saved[0], do])


def attend_along(inputs: tuple, tangents: Tensors, primal: bool) -> Tensors:
    """O (if primal) and O', in one pass."""
    *qkv, mask, c = inputs

    def work(
        tiles: Tiles, results: Tensors, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe
    ) -> None:
        o, o_t = results
        q, q_t = q * c, times(q_t, c)
        for tile in tiles:
            rows, keys = tile.rows, tile.keys
            p, p_t, _, _ = weights_along(tile, q, k, q_t, k_t, mask.softcap)
            into(cut(o, rows), p, v[:, keys])
            into(o_t[:, rows], p_t, v[:, keys])
            into(o_t[:, rows], p, cut(v_t, keys))

    return by_run(work, mask, where((primal, True), (qkv[0], qkv[0])), [*qkv, *tangents])


def differentiate_along(
    inputs: tuple,
    o: Tensor,
    tangents: Tensors,
    o_t: Maybe,
    do: Tensor,
    do_t: Maybe,
    needs: tuple[bool, ...],
    primal: bool,
    result: bool = False,
) -> Tensors:
    """dQ, dK, dV (if primal), dQ', dK', dV', and O' (if `result`; else it is o_t), in one pass; None if not needed."""
    *qkv, mask, c = inputs
    seven = (*(primal and need for need in needs), *needs, result)

    def work(tiles: Tiles, results: Tensors, *run: Maybe) -> None:
        dq, dk, dv, dq_t, dk_t, dv_t, along = results
        q, k, v, q_t, k_t, v_t, o, o_t, do, do_t = run
        delta, delta_t = rowsum(do, o), add(rowsum(do_t, o), rowsum(do, o_t))
        q, q_t = q * c, times(q_t, c)
        for tile in tiles:
            rows, keys = tile.rows, tile.keys
            q_b, q_tb, do_b, do_tb = (cut(x, rows) for x in (q, q_t, do, do_t))
            k_b, k_tb, v_b, v_tb = (cut(x, keys) for x in (k, k_t, v, v_t))
            p, p_t, t, slope_t = weights_along(tile, q, k, q_t, k_t, mask.softcap)
            into(cut(dv, keys), p.mT, do_b)
            into(cut(dv_t, keys), p.mT, do_tb)
            into(cut(dv_t, keys), turned(p_t), do_b)
            dp = (do_b @ v_b.mT).sub_(delta[:, rows])
            dp_t = product_along(do_b, v_b.mT, do_tb, turned(v_tb))
            into(cut(along, rows), p_t, v_b)
            into(cut(along, rows), p, v_tb)
            delta_tb = delta_t[:, rows] if along is None else rowsum(do_b, along[:, rows])
            ds_t = p * -delta_tb if dp_t is None else dp_t.sub_(delta_tb).mul_(p)
            if p_t is not None:
                ds_t.addcmul_(p_t, dp)
            ds, ds_t = dp.mul_(p), through_cap(ds_t, t)
            if slope_t is not None:
                ds_t.addcmul_(slope_t, ds)
            ds = through_cap(ds, t)
            into(cut(dq, rows), ds, k_b, c)
            into(cut(dq_t, rows), ds, k_tb, c)
            into(cut(dq_t, rows), ds_t, k_b, c)
            into(cut(dk, keys), ds.mT, q_b)
            into(cut(dk_t, keys), ds.mT, q_tb)
            into(cut(dk_t, keys), ds_t.mT, q_b)

    return by_run(work, mask, where(seven, (*qkv, *qkv, qkv[0])), [*qkv, *tangents, o, o_t, do, do_t])


def jvp(inputs: tuple, saved: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    if all(x is None for x in tangents):
        return None, ()
    return attend_along(inputs, tangents, primal=False)[1], ()


def forward_dual(inputs: tuple, tangents: Tensors) -> tuple[Tensor, Tensors, Tensor, Tensors]:
    o, o_t = attend_along(inputs, tangents, primal=True)
    return o, (), o_t, ()


def backward_jvp(
    inputs: tuple,
    saved: Tensors,
    tangents: Tensors,
    saved_t: Tensors,
    do: Tensor,
    do_t: Tensor | None,
    needs: tuple[bool, ...],
) -> Tensors:
    if saved_t[0] is None and do_t is None:
        return None, None, None
    return differentiate_along(inputs, saved[0], tangents, saved_t[0], do, do_t, needs, primal=False)[3:6]


def backward_dual(
    inputs: tuple,
    saved: Tensors,
    tangents: Tensors,
    saved_t: Tensors,
    do: Tensor,
    do_t: Tensor | None,
    needs: tuple[bool, ...],
) -> tuple[Tensors, Tensors]:
    if saved_t[0] is None and do_t is None:
        return backward(inputs, saved, do, needs), (None, None, None)
    found = differentiate_along(inputs, saved[0], tangents, saved_t[0], do, do_t, needs, primal=True)
    return found[:3], found[3:6]


def double_backward(inputs: tuple, saved: Tensors, u: Tensors, do: Tensor, needs: tuple[bool, ...]) -> Tensors:
    if all(x is None for x in u):
        return None, None, None, None
    found = differentiate_along(inputs, saved[0], u, None, do, None, needs, primal=False, result=True)
    return found[6], *found[3:6]


_op = twice_differentiable(
    forward,
    backward,
    jvp,
    backward_jvp,
    differentiable=3,
    forward_dual=forward_dual,
    backward_dual=backward_dual,
    double_backward=double_backward,
    saves_output=True,
)


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    *,
    cu_seqlens: Sequence[int] | Tensor | None = None,
    key_padding: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal softmax(scale q k^T) v, twice differentiable in q, k and v.

    q [B, H, T, d], k, v [B, G, T, d] with H a multiple of G (query head h reads key head h // (H/G)): one float dtype
    and device. scale defaults to d^-1/2. Returns [B, H, T, d].

    cu_seqlens: B = 1, samples laid end to end; borders [S + 1] from 0 to T, increasing. Each sample sees itself only.
    A list or a CPU tensor is best: a tensor on a GPU is read back, which waits for the GPU (key_padding likewise).
    key_padding: bool [B, T], True at real tokens, one run of them a row (left or right padding). Elsewhere the result
    and the gradients are 0. window: query i sees the keys i - window < j <= i. softcap: scores s become
    softcap * tanh(s / softcap), before the mask.

    Raises ValueError on shapes, dtypes, devices or options that do not fit, and on dropout.
    """
    check(
        q.ndim == 4 and k.shape == v.shape,
        f"q is {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: must be [B, H, T, d], and k and v alike",
    )
    fits = k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:]
    check(
        fits and k.shape[1] > 0 and q.shape[1] % k.shape[1] == 0,
        f"k is {tuple(k.shape)}, q {tuple(q.shape)}: must agree but for the heads, of which q has a multiple of k's",
    )
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    check(
        dropout == 0,
        f"dropout={dropout} is refused: the mask would be drawn anew where the second derivative runs attention again, "
        "and so be another function's; must be 0",
    )
    q, k, v = autocast(q, k, v)
    mask = Mask.of(q.shape[0], q.shape[2], cu_seqlens, key_padding, window, softcap)
    c = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if use_triton(q):
        from .flash_attention_triton import flash_attention_op  # Triton is needed only from here

        return flash_attention_op(q, k, v, mask, c)
    return _op(q, k, v, mask, c)
