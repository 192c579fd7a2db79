"""The language-model loss from hidden states, without ever storing the logits whole; twice differentiable in h.

    loss = mean over supervised i of  logsumexp(W h_i) - (W h_i)[label_i]

Only rows with label != -100 reach the vocabulary product, in chunks. As in Liger's fused_linear_cross_entropy the
forward pass already forms the gradient u = (P - onehot) W / n of a unit cotangent; so

    dh = dl u      loss' = <u, h'>      u'_i = (P o (z' - <P, z'>)) W / n,  z' = W h'_i      dh' = dl' u + dl u'

M rows, D hidden, V vocabulary. Extra memory O(chunk V + M D).
"""

import torch
from torch import Tensor

from .checks import check, check_frozen, check_like
from .twice import Tensors, add, times, twice_differentiable

IGNORE = -100
CHUNK_ELEMENTS = 2**24  # logits at a time: 64 MB in float32


def chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def supervised(labels: Tensor) -> Tensor:
    """Indices of the rows that have a label."""
    return (labels != IGNORE).nonzero().squeeze(-1)


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def probabilities(h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """softmax(h W^T) [m, V] in float32 or wider, and the log-sum-exp [m]."""
    z = wide(h @ w.T)
    lse = torch.logsumexp(z, -1)
    return z.sub_(lse[:, None]).exp_(), lse


def forward(h: Tensor, w: Tensor, labels: Tensor) -> tuple[Tensor, Tensors]:
    keep = supervised(labels)
    n = max(keep.numel(), 1)
    hk, lk = h[keep], labels[keep]
    unit = torch.zeros_like(h)
    unit_k = torch.empty_like(hk)
    loss = torch.zeros((), dtype=wide(h).dtype, device=h.device)
    for part in chunks(keep.numel(), w.shape[0]):
        p, lse = probabilities(hk[part], w)
        at = lk[part, None]
        loss += (lse - (hk[part] * w[lk[part]]).sum(-1, dtype=lse.dtype)).sum()
        p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
        torch.mm(p.to(w.dtype), w, out=unit_k[part])
    unit[keep] = unit_k.div_(n)
    return loss.div_(n), (unit,)


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    (unit,) = stats
    return ((unit * dy).to(unit.dtype),)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    h, w, labels = inputs
    (unit,) = stats
    (h_t,) = tangents
    if h_t is None:
        return None, (None,)
    keep = supervised(labels)
    hk, hk_t = h[keep], h_t[keep]
    out = torch.empty_like(hk)
    for part in chunks(keep.numel(), w.shape[0]):
        p, _ = probabilities(hk[part], w)
        z_t = wide(hk_t[part] @ w.T)
        p_t = p.mul_(z_t.sub_(torch.linalg.vecdot(p, z_t)[:, None]))
        torch.mm(p_t.to(w.dtype), w, out=out[part])
    unit_t = torch.zeros_like(unit)
    unit_t[keep] = out.div_(max(keep.numel(), 1))
    return (unit * h_t).sum(dtype=wide(h).dtype), (unit_t,)


def backward_jvp(
    inputs: tuple,
    stats: Tensors,
    tangents: Tensors,
    stats_t: Tensors,
    dy: Tensor,
    dy_t: Tensor | None,
    needs: tuple[bool, ...],
) -> Tensors:
    unit, unit_t = stats[0], stats_t[0]
    dx = add(times(unit, dy_t), times(unit_t, dy))
    return (None if dx is None else dx.to(unit.dtype),)


_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=1)


def linear_cross_entropy(h: Tensor, w: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of softmax(h W^T) against labels, over the rows whose label is not -100.

    h [M, D], w [V, D] (frozen): one float dtype; labels [M] int64, already shifted (row i's own target). Returns a
    scalar, float32 for 16-bit inputs, 0 if no row is supervised. Raises ValueError on shapes or dtypes that disagree.
    """
    check(
        h.ndim == 2 and w.ndim == 2 and h.shape[1] == w.shape[1],
        f"h is {tuple(h.shape)}, w {tuple(w.shape)}: must be [M, D] and [V, D]",
    )
    check(tuple(labels.shape) == (h.shape[0],), f"labels is {tuple(labels.shape)}: must be [{h.shape[0]}]")
    check_like("w", w, "h", h)
    check_frozen("w", w)
    return _op(h, w, labels)
