"""The language-model loss from hidden states, without ever storing the logits whole; twice differentiable in h.

    s = h W^T + bias    z = s, or cap tanh(s / cap)    loss = mean over supervised i of logsumexp(z_i) - z_i[label_i]

Only rows with label != -100 reach the vocabulary product, in chunks. As in Liger's fused_linear_cross_entropy the
forward pass already forms the gradient u of a unit cotangent. With P = softmax(z), g = dz/ds (1 without a cap),
t = tanh(s / cap) and n supervised rows:

    u = ((P - onehot) o g) W / n         dh = dl u         loss' = <u, h'>         dh' = dl' u + dl u'
    u' = (P' o g + (P - onehot) o g') W / n,    P' = P o (z' - <P, z'>),   z' = g o (h' W^T)
    g = 1 - t^2,   g' = -2 t z' / cap

Products with the vocabulary: two for a loss and its gradient (one where no gradient is asked for), four for a dual
pass, five in reverse over reverse mode; four there, too, where the graph retains P.

M rows, m supervised rows of a chunk, D hidden, V vocabulary. Extra memory O(chunk V + M D).
"""

import torch
from torch import Tensor

from .checks import check, check_frozen, check_like
from .dispatch import use_triton
from .twice import Tensors, add, autocast, times, twice_differentiable, wants_gradient

IGNORE = -100
CHUNK_ELEMENTS = 2**24  # logits and their tangents at a time: 64 MB in float32


def chunks(rows: int, width: int, elements: int) -> list[slice]:
    """Slices of nearly equal size through the rows, of at most `elements` numbers where a row has `width` of them."""
    count = max(1, -(-rows // max(1, elements // width)))
    step = max(1, -(-rows // count))
    return [slice(i, min(i + step, rows)) for i in range(0, rows, step)]


def longest(parts: list[slice]) -> int:
    return parts[0].stop if parts else 0


def supervised(labels: Tensor) -> Tensor:
    """Indices of the rows that have a label; on a GPU the one place that waits for it."""
    return (labels != IGNORE).nonzero().squeeze(-1)


def targets(labels: Tensor, keep: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Labels of the supervised rows [m], within the vocabulary, and which of them were not.

    Raises ValueError for one outside on the CPU; on a GPU, where that would wait for it, such a row's loss becomes NaN.
    """
    at = take(labels, keep)
    outside = (at < 0) | (at >= vocabulary)
    if at.device.type == "cpu" and outside.any():
        raise ValueError(f"labels has {int(at[outside][0])}: must be {IGNORE}, or from 0 to {vocabulary - 1}")
    return at.clamp(0, vocabulary - 1), outside


def take(x: Tensor, keep: Tensor) -> Tensor:
    """The supervised rows of x; x itself where all are."""
    return x if keep.numel() == x.shape[0] else x[keep]


def put(rows: Tensor, keep: Tensor, like: Tensor) -> Tensor:
    """The rows at their places among zeros in the shape of `like`."""
    if keep.numel() == like.shape[0]:
        return rows
    return torch.zeros_like(like).index_copy_(0, keep, rows)


def wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def wide_empty(rows: int, w: Tensor) -> Tensor:
    """Room for logits [rows, V] in float32 or wider."""
    dtype = torch.float32 if w.dtype in (torch.float16, torch.bfloat16) else w.dtype
    return torch.empty(rows, w.shape[0], dtype=dtype, device=w.device)


def logits_(out: Tensor, h: Tensor, w: Tensor) -> Tensor:
    """h W^T [m, V], in the first rows of out, which may be wider than h."""
    out = out[: h.shape[0]]
    return torch.mm(h, w.T, out=out) if h.dtype == out.dtype else out.copy_(h @ w.T)


def capped(s: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """z and t, in new memory; without a cap s itself and None."""
    if softcap is None:
        return s, None
    t = (s / softcap).tanh_()
    return t * softcap, t


def softmax_(z: Tensor) -> Tensor:
    """P in the memory of z: one pass a row, which stays in the cache."""
    return torch.softmax(z, -1, out=z)


def losses_and_softmax_(z: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """logsumexp(z) - z[label] [m, 1], and P in the memory of z.

    Of P the log-sum-exp comes back through its largest element, which cannot underflow.
    """
    top, picked = z.amax(-1, keepdim=True), z.gather(1, at)
    p = softmax_(z)
    return (top - picked) - p.amax(-1, keepdim=True).log(), p


def gradient_(p: Tensor, t: Tensor | None, at: Tensor) -> Tensor:
    """(P - onehot) o g in the memory of P."""
    p.scatter_add_(1, at, torch.full_like(at, -1, dtype=p.dtype))
    return p if t is None else p.mul_(1 - t * t)


def gradient_tangent_(p: Tensor, t: Tensor | None, s_t: Tensor, at: Tensor, softcap: float | None) -> Tensor:
    """P' o g + (P - onehot) o g' in the memory of s' = h' W^T."""
    if t is None:
        # P o (s' - <P, s'>) in one pass a row
        return torch._softmax_backward_data(s_t, p, -1, p.dtype, grad_input=s_t)
    assert softcap is not None
    slope = 1 - t * t
    z_t = s_t.mul_(slope)
    rest = (t * z_t).mul_(-2 / softcap)
    rest.mul_(p.scatter_add(1, at, torch.full_like(at, -1, dtype=p.dtype)))
    return torch._softmax_backward_data(z_t, p, -1, p.dtype, grad_input=z_t).mul_(slope).add_(rest)


def project_(out: Tensor, g: Tensor, w: Tensor, n: int) -> None:
    """out = g W / n, the division before the result is rounded."""
    torch.addmm(out, g.to(w.dtype), w, beta=0, alpha=1 / n, out=out)


def forward(
    h: Tensor, w: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None, retain: bool, wanted: bool
) -> tuple[Tensor, Tensors]:
    """wanted: whether a gradient is. Statistics: u [M, D] and, where it is retained, P [n, V]; with a cap s instead."""
    keep = supervised(labels)
    n = max(keep.numel(), 1)
    hk = take(h, keep)
    at, outside = targets(labels, keep, w.shape[0])
    parts = chunks(keep.numel(), w.shape[0], CHUNK_ELEMENTS)
    retain = retain and wanted
    room = wide_empty(keep.numel() if retain else longest(parts), w)
    unit = torch.empty_like(hk)
    loss = torch.zeros((), dtype=room.dtype, device=h.device)
    for part in parts:
        s = logits_(room[part] if retain else room, hk[part], w)
        s = s if bias is None else s.add_(bias)
        z, t = capped(s, softcap)
        losses, p = losses_and_softmax_(z, at[part, None])
        loss += losses.masked_fill_(outside[part, None], torch.nan).sum()
        if wanted:
            p_at = p.gather(1, at[part, None])
            project_(unit[part], gradient_(p, t, at[part, None]), w, n)
            if retain and t is None:
                p.scatter_(1, at[part, None], p_at)
    loss = loss.div_(n)
    if not wanted:
        return loss, ()
    return loss, (put(unit, keep, h), room) if retain else (put(unit, keep, h),)


def backward(inputs: tuple, stats: Tensors, dy: Tensor, needs: tuple[bool, ...]) -> Tensors:
    return ((stats[0] * dy).to(stats[0].dtype),)


def jvp(inputs: tuple, stats: Tensors, tangents: Tensors) -> tuple[Tensor | None, Tensors]:
    h, w, labels, bias, softcap, _, _ = inputs
    unit, *retained = stats
    (h_t,) = tangents
    if h_t is None:
        return None, (None,) * len(stats)
    keep = supervised(labels)
    hk, hk_t = take(h, keep), take(h_t, keep)
    at, _ = targets(labels, keep, w.shape[0])
    parts = chunks(keep.numel(), (1 if retained else 2) * w.shape[0], CHUNK_ELEMENTS)
    room, room_t = wide_empty(0 if retained else longest(parts), w), wide_empty(longest(parts), w)
    out = torch.empty_like(hk)
    for part in parts:
        if retained:
            s = retained[0][part]
        else:
            s = logits_(room, hk[part], w)
            s = s if bias is None else s.add_(bias)
        z, t = capped(s, softcap)
        p = z if retained and softcap is None else softmax_(z)
        s_t = logits_(room_t, hk_t[part], w)
        project_(out[part], gradient_tangent_(p, t, s_t, at[part, None], softcap), w, max(keep.numel(), 1))
    return (unit * h_t).sum(dtype=wide(h).dtype), (put(out, keep, h), *(None for _ in retained))


def forward_dual(inputs: tuple, tangents: Tensors) -> tuple[Tensor, Tensors, Tensor | None, Tensors]:
    """Primal and tangent rows in one product of twice the rows, each way."""
    h, w, labels, bias, softcap, _, _ = inputs
    (h_t,) = tangents
    keep = supervised(labels)
    n = max(keep.numel(), 1)
    hk, hk_t = take(h, keep), take(h_t, keep)
    at, outside = targets(labels, keep, w.shape[0])
    parts = chunks(keep.numel(), 2 * w.shape[0], CHUNK_ELEMENTS)
    room = wide_empty(2 * longest(parts), w)
    unit, unit_t = torch.empty_like(hk), torch.empty_like(hk)
    loss = torch.zeros((), dtype=room.dtype, device=h.device)
    for part in parts:
        both = logits_(room, torch.cat([hk[part], hk_t[part]]), w)
        s, s_t = both.chunk(2)
        s = s if bias is None else s.add_(bias)
        z, t = capped(s, softcap)
        losses, p = losses_and_softmax_(z, at[part, None])
        loss += losses.masked_fill_(outside[part, None], torch.nan).sum()
        gradient_tangent_(p, t, s_t, at[part, None], softcap)
        s.copy_(gradient_(p, t, at[part, None]))
        u = hk.new_empty(both.shape[0], hk.shape[1])
        project_(u, both, w, n)
        unit[part], unit_t[part] = u.chunk(2)
    unit, unit_t = put(unit, keep, h), put(unit_t, keep, h)
    return loss.div_(n), (unit,), (unit * h_t).sum(dtype=loss.dtype), (unit_t,)


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
    dx = add(times(wide(unit), dy_t), None if unit_t is None else wide(unit_t) * dy)
    return (None if dx is None else dx.to(unit.dtype),)


_op = twice_differentiable(forward, backward, jvp, backward_jvp, differentiable=1, forward_dual=forward_dual)


def linear_cross_entropy(
    h: Tensor,
    w: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    z_loss: float = 0.0,
    retain: bool = False,
) -> Tensor:
    """Mean cross-entropy of softmax(h W^T + bias) against labels, over the rows whose label is not -100.

    h [M, D], w [V, D] (frozen), bias [V] (frozen) or None: one float dtype; labels [M] int64, already shifted (row i's
    own target). softcap: z = softcap tanh(s / softcap) are the logits, as in Gemma 2. retain: a graph for reverse over
    reverse mode keeps the logits of all the supervised rows, at the price of m x V numbers for as long as it lives (in
    float32 or wider on the CPU, in h's own type on a GPU), and a second derivative costs two vocabulary products then
    instead of three. Returns a scalar, float32 for 16-bit inputs, 0 if no row is supervised.

    Raises ValueError on shapes or dtypes that disagree, a softcap that is not positive, and, on the CPU, a label
    outside the vocabulary; on a GPU, where the check would wait for it, such a label makes the loss NaN. z_loss is
    refused rather than ignored.
    """
    h, w, bias = autocast(h, w, bias)
    check(
        h.ndim == 2 and w.ndim == 2 and h.shape[1] == w.shape[1],
        f"h is {tuple(h.shape)}, w {tuple(w.shape)}: must be [M, D] and [V, D]",
    )
    check(
        tuple(labels.shape) == (h.shape[0],) and labels.dtype == torch.int64,
        f"labels is {labels.dtype} {tuple(labels.shape)}: must be int64 [{h.shape[0]}]",
    )
    check(labels.device == h.device, f"labels is on {labels.device}, h on {h.device}")
    check(bias is None or tuple(bias.shape) == (w.shape[0],), f"bias must be [{w.shape[0]}], one number a row of w")
    for name, x in (("w", w), ("bias", bias)):
        if x is not None:
            check_like(name, x, "h", h)
        check_frozen(name, x)
    check(softcap is None or softcap > 0, f"softcap={softcap}: must be positive, or None")
    check(z_loss == 0, f"z_loss={z_loss} is refused rather than ignored: this loss has no such term; leave it 0")
    cap = None if softcap is None else float(softcap)
    if use_triton(h):
        from .linear_cross_entropy_triton import linear_cross_entropy_op  # Triton is needed only from here

        return linear_cross_entropy_op(h, w, labels, bias, cap, retain, wants_gradient(h))
    return _op(h, w, labels, bias, cap, retain, wants_gradient(h))
