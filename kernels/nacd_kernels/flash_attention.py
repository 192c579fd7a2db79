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

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_mask import Mask
from .checks import check, check_like
from .dispatch import use_triton
from .twice import Maybe, Tensors, add, twice_differentiable

BLOCK = 128  # query rows of a tile, at most
TILE = 1 << 16  # scores of a tile, heads together: what a core's cache holds


class Tile(NamedTuple):
    """Some query rows of some heads, and the keys they see."""

    rows: tuple[slice, slice]  # heads and rows of [G, L * ratio, e]
    keys: tuple[slice, slice]  # heads and rows of [G, L, d]
    bias: Tensor  # 0 or -inf, [rows, w]: for the last w of the keys


class Tiles:
    """The tiles of a run of n G key heads, L tokens and `ratio` query heads a key head.

    Query rows are ordered by token, then by head of the group: row r is of token r // ratio. So a group shares its
    keys in one product, and a tile of every tensor is a slice.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: Mask):
        self.heads, self.L = k.shape[:2]
        self.ratio, self.softcap = q.shape[1] // self.L, mask.softcap
        self.before = self.L if mask.window is None else mask.window - 1  # keys a query sees before itself
        count = -(-self.L * self.ratio // BLOCK)
        self.step = -(-self.L // count)
        reach = min(self.L, self.before + self.step)
        self.together = max(1, TILE // (self.step * self.ratio * reach))
        # of a block's rows for the keys from the first hidden by the window, or from the block's own first key
        self.near = 0 if mask.window is None else self.before
        row = torch.arange(self.step, device=q.device).repeat_interleave(self.ratio)[:, None]
        ahead = torch.arange(-self.near, self.step, device=q.device) - row
        self.bias = q.new_zeros(ahead.shape).masked_fill_((ahead > 0) | (ahead < -self.before), -torch.inf)

    def __iter__(self) -> Iterator[Tile]:
        for h in range(0, self.heads, self.together):
            heads = slice(h, h + self.together)
            for i in range(0, self.L, self.step):
                j, near = min(i + self.step, self.L), min(i, self.near)
                bias = self.bias[: (j - i) * self.ratio, self.near - near : self.near + j - i]
                keys = slice(max(0, i - self.before), j)
                yield Tile((heads, slice(i * self.ratio, j * self.ratio)), (heads, keys), bias)

    def weights(self, tile: Tile, q: Tensor, k: Tensor) -> tuple[Tensor, Maybe]:
        """P, and tanh(S / softcap) or None, of one tile. q is scaled by c, here and everywhere below."""
        s, t = q[tile.rows] @ k[tile.keys].mT, None
        if self.softcap is not None:
            t = s.div_(self.softcap).tanh_()
            s = t * self.softcap
        s[..., s.shape[-1] - tile.bias.shape[-1] :] += tile.bias
        return torch.softmax(s, -1), t

    def score_tangent(self, tile: Tile, q: Tensor, k: Tensor, q_t: Maybe, k_t: Maybe, t: Maybe) -> Maybe:
        """S' of one tile, or None."""
        s_t = into(None, cut(q_t, tile.rows), k[tile.keys].mT)
        s_t = into(s_t, q[tile.rows], turned(cut(k_t, tile.keys)))
        return None if s_t is None else through_cap(s_t, t)


def cut(x: Maybe, at: tuple[slice, slice]) -> Maybe:
    return None if x is None else x[at]


def turned(x: Maybe) -> Maybe:
    return None if x is None else x.mT


def into(total: Maybe, a: Maybe, b: Maybe) -> Maybe:
    """total + a b, in place; None counts as zero."""
    if a is None or b is None:
        return total
    return a @ b if total is None else total.baddbmm_(a, b)


def through_cap(x: Tensor, t: Maybe) -> Tensor:
    """(1 - t^2) x, in place; x itself without a cap."""
    return x if t is None else x.addcmul_(x * t, t, value=-1)


def through_softmax(p: Tensor, s_t: Maybe) -> Maybe:
    """P' = P o (S' - mu), in place of S'."""
    if s_t is None:
        return None
    p_t = s_t.mul_(p)
    return p_t.addcmul_(p, p_t.sum(-1, keepdim=True), value=-1)


def rowsum(x: Maybe, y: Maybe) -> Maybe:
    return None if x is None or y is None else torch.linalg.vecdot(x, y).unsqueeze_(-1)


def by_run(work: Callable[..., Tensors], mask: Mask, c: float, like: Tensors, **tensors: Maybe) -> Tensors:
    """The results of work(tiles, tensors by name) for every run of the mask, pasted into zeros like `like`.

    tensors: [B, H or G, T, e]. A run's are [n G, L * ratio, e], contiguous, in float32 where they have 16 bits, and
    the queries scaled by c.
    """
    q, k = tensors["q"], tensors["k"]
    (B, _, T, _), G = q.shape, k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)

    def flat(x: Tensor) -> Tensor:
        return x.unflatten(1, (G, -1)).transpose(2, 3).flatten(2, 3).flatten(0, 1).to(dtype).contiguous()

    def unflat(y: Tensor, L: int) -> Tensor:
        y = y.unflatten(0, (-1, G)).unflatten(2, (L, -1)).transpose(2, 3).flatten(1, 2)
        return y.to(q.dtype)

    out = [None if x is None else torch.zeros_like(x) for x in like] if not mask.covers(B, T) or q.numel() == 0 else []
    for run in mask.runs():
        parts = {name: None if x is None else flat(run.cut(x)) for name, x in tensors.items()}
        for name in ("q", "q_t"):
            if parts.get(name) is not None:
                parts[name] = parts[name] * c
        found = [
            None if y is None else unflat(y, run.length) for y in work(Tiles(parts["q"], parts["k"], mask), **parts)
        ]
        if not out:
            return tuple(found)
        for whole, y in zip(out, found, strict=True):
            if whole is not None:
                run.cut(whole).copy_(y)
    return tuple(out)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, c: float) -> tuple[Tensor, Tensors]:
    def work(tiles: Tiles, q: Tensor, k: Tensor, v: Tensor) -> Tensors:
        o = torch.empty_like(q)
        for tile in tiles:
            p, _ = tiles.weights(tile, q, k)
            o[tile.rows] = p @ v[tile.keys]
        return (o,)

    return by_run(work, mask, c, (q,), q=q, k=k, v=v)[0], ()


def along(inputs: tuple, tangents: Tensors, primal: bool) -> Tensors:
    """O (if primal) and O'."""
    q, k, v, mask, c = inputs

    def work(tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe) -> Tensors:
        o, o_t = torch.empty_like(q) if primal else None, torch.empty_like(q)
        for tile in tiles:
            p, t = tiles.weights(tile, q, k)
            p_t = through_softmax(p, tiles.score_tangent(tile, q, k, q_t, k_t, t))
            if o is not None:
                o[tile.rows] = p @ v[tile.keys]
            o_t[tile.rows] = into(into(None, p_t, v[tile.keys]), p, cut(v_t, tile.keys))
        return o, o_t

    named = dict(zip(("q_t", "k_t", "v_t"), tangents))
    return by_run(work, mask, c, (q if primal else None, q), q=q, k=k, v=v, **named)


def jvp(inputs: tuple, saved: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    if all(x is None for x in tangents):
        return None, ()
    return along(inputs, tangents, primal=False)[1], ()


def forward_dual(inputs: tuple, tangents: Tensors) -> tuple[Tensor, Tensors, Tensor, Tensors]:
    o, o_t = along(inputs, tangents, primal=True)
    return o, (), o_t, ()


def backward(inputs: tuple, saved: Tensors, do: Tensor, needs: tuple[bool, ...]) -> Tensors:
    q, k, v, mask, c = inputs

    def work(tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor) -> Tensors:
        dq, dk, dv = (torch.zeros_like(x) if need else None for x, need in zip((q, k, v), needs))
        delta = rowsum(do, o)
        for tile in tiles:
            rows, keys = tile.rows, tile.keys
            p, t = tiles.weights(tile, q, k)
            into(cut(dv, keys), p.mT, do[rows])
            ds = through_cap((do[rows] @ v[keys].mT).sub_(delta[rows]).mul_(p), t)
            if dq is not None:
                dq[rows] = ds @ k[keys]
            into(cut(dk, keys), ds.mT, q[rows])
        return None if dq is None else dq.mul_(c), dk, dv

    return by_run(work, mask, c, wanted(inputs, needs), q=q, k=k, v=v, o=saved[0], do=do)


def wanted(inputs: tuple, needs: tuple[bool, ...]) -> Tensors:
    return tuple(x if need else None for x, need in zip(inputs, needs))


def along_backward(
    inputs: tuple,
    o: Tensor,
    tangents: Tensors,
    o_t: Maybe,
    do: Tensor,
    do_t: Maybe,
    needs: tuple[bool, ...],
    primal: bool,
) -> Tensors:
    """dQ, dK, dV (if primal) and dQ', dK', dV'; None where not needed."""
    q, k, v, mask, c = inputs
    first, then = (wanted(inputs, needs) if primal else (None, None, None)), wanted(inputs, needs)

    def work(
        tiles: Tiles, q: Tensor, k: Tensor, v: Tensor, q_t: Maybe, k_t: Maybe, v_t: Maybe, **rest: Maybe
    ) -> Tensors:
        o, o_t, do, do_t = (rest[name] for name in ("o", "o_t", "do", "do_t"))
        zeros = [None if x is None else torch.zeros_like(y) for x, y in zip((*first, *then), (q, k, v, q, k, v))]
        dq, dk, dv, dq_t, dk_t, dv_t = zeros
        delta, delta_t = rowsum(do, o), add(rowsum(do_t, o), rowsum(do, o_t))
        for tile in tiles:
            rows, keys = tile.rows, tile.keys
            q_b, q_tb, do_b, do_tb = (cut(x, rows) for x in (q, q_t, do, do_t))
            k_b, k_tb, v_b, v_tb = (cut(x, keys) for x in (k, k_t, v, v_t))
            p, t = tiles.weights(tile, q, k)
            s_t = tiles.score_tangent(tile, q, k, q_t, k_t, t)
            slope_t = None if s_t is None or t is None else (s_t * t).mul_(-2 / tiles.softcap)
            p_t = through_softmax(p, s_t)
            into(into(cut(dv_t, keys), p.mT, do_tb), turned(p_t), do_b)
            into(cut(dv, keys), p.mT, do_b)
            dp = (do_b @ v_b.mT).sub_(delta[rows])
            dp_t = into(into(None, do_tb, v_b.mT), do_b, turned(v_tb))
            dp_t = -delta_t[rows] if dp_t is None else dp_t.sub_(delta_t[rows])
            ds_t = dp_t * p if dp_t.shape != p.shape else dp_t.mul_(p)
            ds_t = ds_t if p_t is None else ds_t.addcmul_(p_t, dp)
            ds = dp.mul_(p)
            ds_t = through_cap(ds_t, t)
            if slope_t is not None:
                ds_t.addcmul_(slope_t, ds)
            ds = through_cap(ds, t)
            into(into(cut(dk_t, keys), ds_t.mT, q_b), ds.mT, q_tb)
            into(cut(dk, keys), ds.mT, q_b)
            if dq_t is not None:
                dq_t[rows] = into(ds_t @ k_b, ds, k_tb)
            if dq is not None:
                dq[rows] = ds @ k_b
        for x in (dq, dq_t):
            if x is not None:
                x.mul_(c)
        return dq, dk, dv, dq_t, dk_t, dv_t

    named = dict(zip(("q_t", "k_t", "v_t"), tangents))
    return by_run(work, mask, c, (*first, *then), q=q, k=k, v=v, **named, o=o, o_t=o_t, do=do, do_t=do_t)


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
    return along_backward(inputs, saved[0], tangents, saved_t[0], do, do_t, needs, primal=False)[3:]


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
    six = along_backward(inputs, saved[0], tangents, saved_t[0], do, do_t, needs, primal=True)
    return six[:3], six[3:]


_op = twice_differentiable(
    forward,
    backward,
    jvp,
    backward_jvp,
    differentiable=3,
    forward_dual=forward_dual,
    backward_dual=backward_dual,
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
    fits = k.ndim == 4 and q.shape[0] == k.shape[0] and q.shape[2:] == k.shape[2:] and q.shape[1] % k.shape[1] == 0
    check(
        fits,
        f"k is {tuple(k.shape)}, q {tuple(q.shape)}: must agree but for the heads, of which q has a multiple of k's",
    )
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    check(
        dropout == 0,
        f"dropout={dropout} is refused: the mask would be drawn anew where the second derivative runs attention again, "
        "and so be another function's; must be 0",
    )
    mask = Mask.of(q.shape[0], q.shape[2], cu_seqlens, key_padding, window, softcap)
    c = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if use_triton(q):
        from .flash_attention_triton import flash_attention_op  # Triton is needed only from here

        return flash_attention_op(q, k, v, mask, c)
    return _op(q, k, v, mask, c)
