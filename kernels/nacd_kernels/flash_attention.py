"""Causal attention in blocks, twice differentiable, with memory linear in the sequence length.

FlashAttention-2 (arXiv 2307.08691) recomputes P from the saved log-sum-exp; the tangents do the same. With c the scale,
S = c Q K^T (causal), P = exp(S - lse), mu = rowsum(P o S') (which is also the tangent of lse), D = rowsum(dO o O):

    O  = P V                        S' = c (Q' K^T + Q K'^T)      O' = (P o S') V - mu O + P V'
    dP = dO V^T                     dS = P o (dP - D)
    dQ = c dS K                     dK = c dS^T Q                 dV = P^T dO
    P' = P o (S' - mu)              dP' = dO' V^T + dO V'^T       D' = rowsum(dO' o O + dO o O')
    dS' = P' o (dP - D) + P o (dP' - D')
    dQ' = c (dS' K + dS K')         dK' = c (dS'^T Q + dS^T Q')   dV' = P'^T dO + P^T dO'

B batch, H query heads, G key heads (grouped: H a multiple of G), T tokens, d head width. This is the reference: blocks
of query rows against the keys before them, on any device and in any float type.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .checks import check, check_like
from .twice import Maybe, Tensors, add, matmul, times, twice_differentiable

BLOCK = 256  # query rows at a time


class Blocks:
    """Query blocks of one attention call: [B, G, m, .] slices, m = H/G * rows of the block, and the keys they see."""

    def __init__(self, q: Tensor, k: Tensor):
        self.shape, (self.B, self.H, self.T, self.d), self.G = q.shape, q.shape, k.shape[1]
        self.ratio = self.H // self.G

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((i, min(i + BLOCK, self.T)) for i in range(0, self.T, BLOCK))

    def cut(self, x: Maybe, i: int, j: int) -> Maybe:
        """Rows i..j of x [B, H, T, e] as [B, G, ratio * (j - i), e]."""
        return None if x is None else x[:, :, i:j].reshape(self.B, self.G, self.ratio * (j - i), x.shape[-1])

    def paste(self, out: Tensor, i: int, j: int, x: Tensor) -> None:
        out[:, :, i:j] = x.view(self.B, self.H, j - i, out.shape[-1])

    def hide(self, s: Tensor, i: int, j: int, value: float) -> Tensor:
        """Fill the scores s [B, G, ratio * (j - i), j] of keys that come after their query, in place."""
        later = torch.ones(j - i, j - i, dtype=torch.bool, device=s.device).triu_(1)
        s.view(self.B, self.G, self.ratio, j - i, j)[..., i:].masked_fill_(later, value)
        return s


def forward(q: Tensor, k: Tensor, v: Tensor, c: float) -> tuple[Tensor, Tensors]:
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(*q.shape[:-1], 1, dtype=q.dtype, device=q.device)
    blocks = Blocks(q, k)
    for i, j in blocks:
        s = blocks.hide((blocks.cut(q, i, j) * c) @ k[:, :, :j].mT, i, j, float("-inf"))
        top = torch.logsumexp(s, -1, keepdim=True)
        blocks.paste(lse, i, j, top)
        blocks.paste(o, i, j, s.sub_(top).exp_() @ v[:, :, :j])
    # the result is a statistic too; two outputs need two tensors
    return o, (o.clone(), lse)


def weights(blocks: Blocks, q: Tensor, k: Tensor, lse: Tensor, i: int, j: int, c: float) -> Tensor:
    """P of one block, [B, G, m, j]."""
    s = ((blocks.cut(q, i, j) * c) @ k[:, :, :j].mT).sub_(blocks.cut(lse, i, j)).exp_()
    return blocks.hide(s, i, j, 0.0)


def rowsum(x: Tensor, y: Tensor) -> Tensor:
    return torch.linalg.vecdot(x, y).unsqueeze_(-1)


def backward(inputs: tuple, stats: Tensors, do: Tensor, needs: tuple[bool, ...]) -> Tensors:
    q, k, v, c = inputs
    o, lse = stats
    dq, dk, dv = torch.empty_like(q, memory_format=torch.contiguous_format), torch.zeros_like(k), torch.zeros_like(v)
    delta = rowsum(do, o)
    blocks = Blocks(q, k)
    for i, j in blocks:
        p, do_b = weights(blocks, q, k, lse, i, j, c), blocks.cut(do, i, j)
        dv[:, :, :j] += p.mT @ do_b
        ds = (do_b @ v[:, :, :j].mT).sub_(blocks.cut(delta, i, j)).mul_(p)
        blocks.paste(dq, i, j, (ds @ k[:, :, :j]).mul_(c))
        dk[:, :, :j] += (ds.mT @ blocks.cut(q, i, j)).mul_(c)
    return dq, dk, dv


def score_tangent(blocks: Blocks, q: Tensor, k: Tensor, q_t: Maybe, k_t: Maybe, i: int, j: int, c: float) -> Maybe:
    """S' of one block, or None."""
    s_t = None if q_t is None else (blocks.cut(q_t, i, j) * c) @ k[:, :, :j].mT
    return add(s_t, None if k_t is None else (blocks.cut(q, i, j) * c) @ k_t[:, :, :j].mT)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    q, k, v, c = inputs
    o, lse = stats
    q_t, k_t, v_t = tangents
    if q_t is None and k_t is None and v_t is None:
        return None, (None, None)
    o_t, mu = torch.empty_like(o), torch.zeros_like(lse)
    blocks = Blocks(q, k)
    for i, j in blocks:
        p = weights(blocks, q, k, lse, i, j, c)
        s_t = score_tangent(blocks, q, k, q_t, k_t, i, j, c)
        out: Maybe = None if v_t is None else p @ v_t[:, :, :j]
        if s_t is not None:
            ps = s_t.mul_(p)
            mu_b = ps.sum(-1, keepdim=True)
            blocks.paste(mu, i, j, mu_b)
            out = add(out, (ps @ v[:, :, :j]).sub_(mu_b * blocks.cut(o, i, j)))
        blocks.paste(o_t, i, j, out)
    return o_t, (o_t.clone(), mu)


def backward_jvp(
    inputs: tuple,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    do: Tensor,
    do_t: Tensor | None,
    needs: tuple[bool, ...],
) -> Tensors:
    q, k, v, c = inputs
    (o, lse), (o_t, mu) = stats, stats_t
    q_t, k_t, v_t = tangents
    dq, dk, dv = torch.empty_like(q, memory_format=torch.contiguous_format), torch.zeros_like(k), torch.zeros_like(v)
    delta = rowsum(do, o)
    delta_t = add(None if do_t is None else rowsum(do_t, o), None if o_t is None else rowsum(do, o_t))
    if delta_t is None:
        return None, None, None
    blocks = Blocks(q, k)
    for i, j in blocks:
        cut = [blocks.cut(x, i, j) for x in (q, q_t, do, do_t, delta, delta_t, mu)]
        q_b, q_tb, do_b, do_tb, delta_b, delta_tb, mu_b = cut
        k_b, v_b = k[:, :, :j], v[:, :, :j]
        k_tb, v_tb = (None if x is None else x[:, :, :j] for x in (k_t, v_t))
        p = weights(blocks, q, k, lse, i, j, c)
        s_t = score_tangent(blocks, q, k, q_t, k_t, i, j, c)
        p_t = None if s_t is None else s_t.sub_(mu_b).mul_(p)
        dp = (do_b @ v_b.mT).sub_(delta_b)
        dp_t = add(matmul(do_tb, v_b.mT), None if v_tb is None else do_b @ v_tb.mT)
        dp_t = -delta_tb if dp_t is None else dp_t.sub_(delta_tb)
        ds_t = add(times(p_t, dp), dp_t * p)
        ds = dp.mul_(p)
        blocks.paste(dq, i, j, add(ds_t @ k_b, matmul(ds, k_tb)).mul_(c))
        dk[:, :, :j] += add(ds_t.mT @ q_b, matmul(ds.mT, q_tb)).mul_(c)
        through_v = add(matmul(None if p_t is None else p_t.mT, do_b), matmul(p.mT, do_tb))
        if through_v is not None:
            dv[:, :, :j] += through_v
    return dq, dk, dv


_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=3)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal softmax(scale q k^T) v, twice differentiable in q, k and v.

    q [B, H, T, d], k, v [B, G, T, d] with H a multiple of G (query head h reads key head h // (H/G)): one float dtype
    and device. scale defaults to d^-1/2. Returns [B, H, T, d]. Raises ValueError on shapes, dtypes or devices that
    disagree.
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
    return _op(q, k, v, float(q.shape[-1] ** -0.5 if scale is None else scale))
