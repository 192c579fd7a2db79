"""A linear layer whose weight is frozen, twice differentiable in x: y = x W^T + bias.

The tangents are the same product (y' = x' W^T, dx' = dy' W). PyTorch's own linear computes this too, but its tangents
record a graph that a dual pass never reads, and its weight is dense.

`through` and `back_through` are the products for several layers that read one x (M rows), side by side; so that
`lora_linear.py` can build on them. Primal and tangent rows are one product of twice the rows on a GPU, which a few
hundred rows leave half empty. On a CPU they are two, which are as fast (2 x 520 and 2 x 1028 rows, D 512 and 768:
within 3 %) and copy nothing.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from .checks import check_linear
from .frozen_weight import FrozenWeight, dense, frozen_weight
from .twice import Maybe, Tensors, autocast, twice_differentiable


def rows(x: Maybe) -> Maybe:
    """[..., D] -> [M, D]."""
    return None if x is None else x.reshape(-1, x.shape[-1])


def spans(sizes: Sequence[int]) -> list[slice]:
    """Where parts of these sizes lie, one after the other."""
    ends = list(accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends)]


def one_product(x: Tensor) -> bool:
    """Whether primal and tangent rows go through the weight as one product; see above."""
    return x.is_cuda


def blocks(x: Maybe, x_t: Maybe) -> list[Tensor]:
    """The rows that go through the weights, in as many products as the list is long."""
    found = [t for t in (x, x_t) if t is not None]
    return [torch.cat(found)] if len(found) == 2 and one_product(found[0]) else found


def results(like: list[Tensor], x: Maybe, x_t: Maybe, width: int) -> tuple[list[Tensor], list[Maybe]]:
    """Room for what comes of the blocks `like`: by block [rows, width], and [of x, of x'] [..., width].

    The latter are no views, so that they may be changed in place. The halves of one product get a storage each:
    autograd copies a tangent that lies elsewhere in its storage than the primal does.
    """
    found = [t for t in (x, x_t) if t is not None]
    if len(like) == len(found):
        whole = [t.new_empty(*t.shape[:-1], width) for t in found]
        by_block = [t.view(block.shape[0], width) for t, block in zip(whole, like)]
    else:
        both = like[0].new_empty(2, *found[0].shape[:-1], width)
        whole, by_block = [from_dlpack(half) for half in both], [both.view(like[0].shape[0], width)]
    queue = iter(whole)
    return by_block, [None if t is None else next(queue) for t in (x, x_t)]


def through(x: Maybe, x_t: Maybe, weights: Sequence[FrozenWeight], biases: Sequence[Maybe]) -> list[Maybe]:
    """x W^T + bias and x' W^T of every layer, side by side; x, x' [..., D_in] -> [..., sum of D_out]."""
    flat = rows(x)
    xs = blocks(flat, rows(x_t))
    if not xs:
        return [None, None]
    columns = spans([w.shape[0] for w in weights])
    ys, (y, y_t) = results(xs, x, x_t, columns[-1].stop)
    for w, bias, place in zip(weights, biases, columns):
        w_t = dense(w, xs[0].dtype).T
        for block, out in zip(xs, ys):
            if block is flat and bias is not None:
                torch.addmm(bias, block, w_t, out=out[:, place])
            else:
                torch.mm(block, w_t, out=out[:, place])
    if x is not None and xs[0] is not flat:
        for bias, place in zip(biases, columns):
            if bias is not None:
                y[..., place].add_(bias)
    return [y, y_t]


def back_through(dy: Maybe, dy_t: Maybe, weights: Sequence[FrozenWeight]) -> list[Maybe]:
    """dy W and dy' W, summed over the layers; dy, dy' [..., sum of D_out] -> [..., D_in]."""
    dys = blocks(rows(dy), rows(dy_t))
    if not dys:
        return [None, None]
    dxs, pair = results(dys, dy, dy_t, weights[0].shape[1])
    for w, place in zip(weights, spans([w.shape[0] for w in weights])):
        full = dense(w, dys[0].dtype)
        for block, out in zip(dys, dxs):
            torch.addmm(out, block[:, place], full, beta=int(place.start > 0), out=out)
    return pair


def forward(x: Tensor, w: FrozenWeight, bias: Tensor | None) -> tuple[Tensor, Tensors]:
    return through(x, None, [w], [bias])[0], ()


def backward(inputs: Tensors, stats: Tensors, dy: Tensor, needs: Tensors) -> Tensors:
    return (back_through(dy, None, [inputs[1]])[0],)


def jvp(inputs: Tensors, stats: Tensors, tangents: Tensors) -> tuple[Maybe, Tensors]:
    return through(None, tangents[0], [inputs[1]], [None])[1], ()


def backward_jvp(
    inputs: Tensors, stats: Tensors, tangents: Tensors, stats_t: Tensors, dy: Tensor, dy_t: Maybe, needs: Tensors
) -> Tensors:
    return (back_through(None, dy_t, [inputs[1]])[1],)


def forward_dual(inputs: Tensors, tangents: Tensors) -> tuple[Tensor, Tensors, Maybe, Tensors]:
    x, w, bias = inputs
    y, y_t = through(x, tangents[0], [w], [bias])
    return y, (), y_t, ()


def backward_dual(
    inputs: Tensors, stats: Tensors, tangents: Tensors, stats_t: Tensors, dy: Tensor, dy_t: Maybe, needs: Tensors
) -> tuple[Tensors, Tensors]:
    dx, dx_t = back_through(dy, dy_t, [inputs[1]])
    return (dx,), (dx_t,)


_op = twice_differentiable(
    forward,
    backward,
    jvp,
    backward_jvp,
    differentiable=1,
    forward_dual=forward_dual,
    backward_dual=backward_dual,
)


def frozen_linear(x: Tensor, w: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + bias, twice differentiable in x; w and bias are frozen.

    x [..., D_in], w [D_out, D_in] (dense in x's dtype, or quantised: `frozen_weight.py`), bias [D_out] in x's dtype or
    None. Returns [..., D_out]. Under torch.autocast the product is in its type. Raises ValueError if shapes, dtypes or
    devices disagree, and if w is not quantised yet.
    """
    (x,) = autocast(x)
    w, bias = cast(frozen_weight(w), bias)
    check_linear(x, w, bias)
    return _op(x, w, bias)


def cast(w: FrozenWeight, bias: Tensor | None) -> Tensors:
    """As torch.nn.functional.linear under torch.autocast. A quantised weight is dequantised in x's type as it is."""
    return autocast(w, bias) if isinstance(w, Tensor) else (w, bias if bias is None else autocast(bias)[0])
