"""Products with a thin matrix and their tangents, (p q)' = p' q + p q': all of LoRA but the frozen product.

`pair` makes x A^T, dy B, g^T x and dy^T h; `add_pair` adds h B^T to y and g A to dx. Primal and tangent come together
where a dual pass wants both.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .twice import Maybe


class Kit(NamedTuple):
    """The two products, by the reference or by kernels."""

    pair: Callable[..., tuple[Maybe, Maybe]]
    add_pair: Callable[..., None]


def pair(p: Tensor, p_t: Maybe, q: Tensor, q_t: Maybe, primal: bool, scale: float = 1.0) -> tuple[Maybe, Maybe]:
    """(scale p q, scale (p' q + p q')), the first only if `primal`; p [m, k], q [k, n], of which one is thin.

    A missing tangent is zero. The types may differ: the product is in the wider one. The thin matrix and its tangent
    are stacked, so that the wide one is read once. Neither result is a view: autograd would copy its tangent.
    """
    p, p_t, q, q_t = same_type(p, p_t, q, q_t)
    wide_first = q.shape[1] <= p.shape[0]
    first, second = (p, p_t), (q, q_t)
    (wide, wide_t), (thin, thin_t) = (first, second) if wide_first else (second, first)
    axis = int(wide_first)

    def product(wide: Tensor, thin: Tensor) -> Tensor:
        return wide @ thin if wide_first else thin @ wide

    c: Maybe
    c_t: Maybe
    if primal and thin_t is not None:
        c, c_t = product(wide, torch.cat([thin, thin_t], axis)).chunk(2, axis)
        c = c.clone(memory_format=torch.contiguous_format)
    else:
        c = product(wide, thin) if primal else None
        c_t = None if thin_t is None else product(wide, thin_t)
    if wide_t is not None:
        along_wide = product(wide_t, thin)
        c_t = along_wide if c_t is None else along_wide.add_(c_t)
    for result in (c, c_t):
        if result is not None and scale != 1:
            result.mul_(scale)
    return c, c_t


def add_pair(
    c: Maybe, c_t: Maybe, p: Tensor, p_t: Maybe, q: Tensor, q_t: Maybe, primal: bool, scale: float = 1.0
) -> None:
    """c += scale p q if `primal`, c' += scale (p' q + p q'), in place; p [m, k] and q [k, n], with k small.

    The two terms of the tangent are one product over 2 k, so that c' is read and written once. Where p and q are
    wider than c the product is rounded with the sum, not before.
    """
    p, p_t, q, q_t = same_type(p, p_t, q, q_t)

    def add(c: Tensor, p: Tensor, q: Tensor) -> None:
        if p.dtype == c.dtype:
            c.addmm_(p, q, alpha=scale)
        else:
            c.add_(p @ q, alpha=scale)

    if primal:
        add(c, p, q)
    if p_t is not None and q_t is not None:
        add(c_t, torch.cat([p_t, p], 1), torch.cat([q, q_t]))
    elif p_t is not None or q_t is not None:
        add(c_t, p if p_t is None else p_t, q if q_t is None else q_t)


REFERENCE = Kit(pair, add_pair)


def same_type(p: Tensor, p_t: Maybe, q: Tensor, q_t: Maybe) -> tuple[Any, Any, Any, Any]:
    dtype = torch.promote_types(p.dtype, q.dtype)
    p_t, q_t = (None if t is None else t.to(dtype) for t in (p_t, q_t))
    return p.to(dtype), p_t, q.to(dtype), q_t
