"""The nearest row of an embedding table to each query, exactly, and its distance.

    index_i = argmin_v ||p_i - t_v||        distance_i = ||p_i - t_index||

Scores |t|^2 - 2 p t from one matrix product rank the rows; every row whose score lies within the rounding error of the
best is measured again in float64, so the index is that of the exact distances. Ties take the lowest index.

P queries, V rows, D features. Memory O(queries at a time x V).
"""

import torch
from torch import Tensor

from .checks import check

CHUNK_ELEMENTS = 2**24  # scores at a time: 64 MB in float32
CANDIDATES = 8  # rows measured again for every query; more if rounding leaves more in doubt


def exact_squares(p: Tensor, rows: Tensor) -> Tensor:
    """||p - rows||^2 in float64; p [m, 1, D], rows [m, c, D] or [V, D]."""
    return (p.double() - rows.double()).square().sum(-1)


def nearest(p: Tensor, table: Tensor, norms: Tensor, banned: Tensor | None) -> Tensor:
    """Indices for a few queries p [m, D]; norms [V] are the rows' squared lengths in float32 or wider."""
    wide = torch.promote_types(table.dtype, torch.float32)
    scores = torch.addmm(norms, p.to(wide), table.to(wide).T, alpha=-2)
    if banned is not None:
        scores[:, banned] = torch.inf
    count = min(CANDIDATES, scores.shape[1])
    best, rows = scores.topk(count, largest=False)
    # |fl(x . y) - x . y| <= D eps |x| |y| (Higham 2002, section 3.1); the score adds the norm's own error
    scale = norms[banned.logical_not()].max() if banned is not None else norms.max()
    bound = 4 * p.shape[1] * torch.finfo(wide).eps * (scale + p.to(wide).square().sum(-1))
    squares = exact_squares(p[:, None], table[rows]).masked_fill_(best.isinf(), torch.inf)
    squares = squares.masked_fill_(best > best[:, :1] + 2 * bound[:, None], torch.inf)
    ties = torch.where(squares == squares.min(-1, keepdim=True).values, rows, table.shape[0])
    index = ties.min(-1).values
    if count < scores.shape[1]:
        for i in (best[:, -1] <= best[:, 0] + 2 * bound).nonzero().squeeze(-1).tolist():
            all_squares = exact_squares(p[i], table)
            index[i] = (all_squares if banned is None else all_squares.masked_fill_(banned, torch.inf)).argmin()
    return index


def nearest_embedding(p: Tensor, table: Tensor, *, banned: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Row of `table` nearest to each row of p by L2 distance, and that distance.

    p [P, D], table [V, D]: float, one device; banned [V] bool marks rows never taken. Returns index [P] int64 (ties
    take the lowest) and distance [P] in p's dtype, differentiable in p, with gradient 0 where the distance is 0. Raises
    ValueError on shapes or devices that disagree, on queries that are not finite and when every row is banned.
    """
    check(
        p.ndim == 2 and table.ndim == 2 and p.shape[1] == table.shape[1],
        f"p is {tuple(p.shape)}, table {tuple(table.shape)}: must be [P, D] and [V, D]",
    )
    check(table.device == p.device, f"table is on {table.device}, p on {p.device}")
    check(bool(p.isfinite().all()), "p holds NaN or infinite values")
    if banned is not None:
        check(
            banned.dtype == torch.bool and tuple(banned.shape) == (table.shape[0],),
            f"banned must be bool [{table.shape[0]}]",
        )
    check(table.shape[0] > 0 and (banned is None or not bool(banned.all())), "every row of table is banned")
    with torch.no_grad():
        norms = torch.linalg.vecdot(table, table) if table.dtype == torch.float64 else table.float().square().sum(-1)
        step = max(1, CHUNK_ELEMENTS // table.shape[0])
        parts = [nearest(p[i : i + step].detach(), table, norms, banned) for i in range(0, p.shape[0], step)]
        index = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=p.device)
    return index, distance_to(p, table[index].to(p.dtype))


def distance_to(p: Tensor, rows: Tensor) -> Tensor:
    """||p - rows|| over the last axis, with gradient 0 where it is 0."""
    squares = (p - rows).square().sum(-1)
    return torch.where(squares > 0, torch.where(squares > 0, squares, 1.0).sqrt(), 0.0)
