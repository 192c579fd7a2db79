"""Which rows may be the nearest, and which of them are: the exact part of nearest_embedding, on any device.

Scores s = |t|^2 / 2 - p t of m queries and some rows come from a product in float32 or float64. With u the
product's unit roundoff and g = n u / (1 - n u), a score is off by at most

    e = g (|t|^2 / 2 + |p| |t|) + n tiny,    n = D + 4

whatever the order of the sum (Higham 2002, section 3.1; one step each for the rounded |t|^2 / 2, the difference, and
the two roundings of the limit below; tiny for underflow). Every row whose score is at most the k-th best plus 2 e is a
candidate. Candidates are measured as sum (p - t)^2 in float64, and the k least of them by (distance, row) are kept.

P queries, m of them at a time, V rows, D features, k neighbours.
"""

import torch
from torch import Tensor

SCORES = 2**21  # of a chunk, at most: 8 MB in float32
ROWS = 1024  # of a chunk, at most: MKL's product of 96 queries takes 1.7 times longer with all 50,272 rows at once
NUMBERS = 2**20  # of what is converted or measured at a time: 8 MB in float64
WAITING = 2**18  # candidates in the queue, at most
DOUBTFUL = 16  # candidates a query in one chunk: with more of them the product is done again in float64


def squared_lengths(x: Tensor) -> Tensor:
    """|x|^2 of every row of x [n, D], in float64 [n]; NaN or infinite where x or its square is."""
    rows = max(1, NUMBERS // max(1, x.shape[1]))
    parts = [torch.linalg.vecdot(part, part) for part in (part.double() for part in x.split(rows))]
    return torch.cat(parts) if parts else x.new_zeros(0, dtype=torch.float64)


def error(p_squares: Tensor, largest: float, D: int, u: float, inputs: Tensor | float = 0.0) -> Tensor:
    """e of every query, float64 [m], for rows of squared length `largest` at most.

    u: unit roundoff of the sums. inputs: what the product rounds p and t by, together, relative to |p| |t|.
    """
    n = D + 4
    g = n * u / (1 - n * u)
    reach = p_squares.sqrt() * largest**0.5
    return g * (largest / 2 + reach) + inputs * reach + n * torch.finfo(torch.float32).tiny


class Nearest:
    """The k nearest of the rows of `table` that were added, to each of m queries p; exact."""

    def __init__(self, p: Tensor, table: Tensor, k: int):
        self.p, self.table, self.k = p, table, k
        self.squares = p.new_full((p.shape[0], k), torch.inf, dtype=torch.float64)
        self.index = torch.full((p.shape[0], k), table.shape[0], device=p.device)
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.waiting = 0

    def add(self, query: Tensor, row: Tensor) -> None:
        """Pairs of a query and a row, int64 [n] each; no pair twice."""
        self.queue.append((query, row))
        self.waiting += row.numel()
        if self.waiting > WAITING:
            self.measure()

    def measure(self) -> None:
        """Empty the queue."""
        m, k = self.index.shape
        old = torch.arange(m, device=self.p.device).repeat_interleave(k)
        query, row = (torch.cat(parts) for parts in zip((old, self.index.flatten()), *self.queue, strict=True))
        measured = exact_squares(self.p, self.table, query[m * k :], row[m * k :])
        squares = torch.cat([self.squares.flatten(), measured])
        order = row.argsort()
        for key in (squares, query):
            order = order[key[order].argsort(stable=True)]
        query = query[order]
        rank = torch.arange(query.numel(), device=query.device) - torch.searchsorted(query, query)
        order = order[rank < k]  # of every query there are k at least: those found before
        self.squares, self.index = squares[order].view(m, k), row[order].view(m, k)
        self.queue, self.waiting = [], 0

    def found(self) -> tuple[Tensor, Tensor]:
        """Index and squared distance [m, k], by distance and then by index."""
        if self.queue:
            self.measure()
        return self.index, self.squares


def exact_squares(p: Tensor, table: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """sum (p - t)^2 in float64 for pairs of a query and a row [n], a few at a time."""
    size = max(1, NUMBERS // max(1, p.shape[1]))
    pairs = zip(query.split(size), row.split(size), strict=True)
    parts = [p[q].double().sub_(table[r].double()).square_().sum(-1) for q, r in pairs]  # p[q] is a copy
    return torch.cat(parts) if parts else p.new_zeros(0, dtype=torch.float64)


def scan(p: Tensor, table: Tensor, half: Tensor, p_squares: Tensor, largest: float, found: Nearest) -> None:
    """Add to `found` whatever may be among its k nearest; half [V] is |t|^2 / 2 in float64, infinite where banned."""
    dtype, D, k = score_dtype(p, table, p_squares, largest), p.shape[1], found.k
    margin = 2 * error(p_squares, largest, D, torch.finfo(dtype).eps / 2, input_error(dtype))
    p_wide, half_wide = p.to(dtype), half.to(dtype)
    best = p_wide.new_full((p.shape[0], k), torch.inf)  # scores of the k best so far
    top = torch.finfo(dtype).max  # not infinity, the score of a banned row
    rows = chunk_rows(p.shape[0], table, dtype)
    room = p_wide.new_empty(p.shape[0], min(rows, table.shape[0]))
    limit, waiting = best[:, -1], 0
    hits: list[tuple[Tensor, Tensor, Tensor]] = []  # query, row, score

    def hand_over() -> None:
        """Those of the hits that the limit, which has come down meanwhile, still lets through."""
        if hits:
            query, row, score = (torch.cat(parts) for parts in zip(*hits, strict=True))
            still = score <= limit[query]
            found.add(query[still], row[still])
            hits.clear()

    for start in range(0, table.shape[0], rows):
        part = table[start : start + rows]
        s = room[:, : part.shape[0]]
        torch.addmm(half_wide[start : start + rows], p_wide, part.to(dtype).T, alpha=-1, out=s)
        low = s.amin(1)
        best = merged(best, s, low)
        limit = (best[:, -1].double() + margin).clamp_(max=top).to(dtype)
        open_ = (low <= limit).nonzero().squeeze(-1)
        hit = s[open_] <= limit[open_, None]
        together = p.shape[0]
        if int(hit.count_nonzero()) > (DOUBTFUL + k) * p.shape[0]:
            doubted(p, part, half[start : start + rows], p_squares, largest, open_, hit, k)
            together = max(1, WAITING // part.shape[0])
        for queries, among in zip(open_.split(together), hit.split(together), strict=True):
            query, column = among.nonzero(as_tuple=True)
            query = queries[query]
            hits.append((query, column + start, s[query, column]))
            waiting += query.numel()
            if waiting > WAITING:
                hand_over()
                waiting = 0
    hand_over()


def score_dtype(p: Tensor, table: Tensor, p_squares: Tensor, largest: float) -> torch.dtype:
    """float32, or float64 where an input is or where squares could overflow."""
    wide = torch.promote_types(torch.promote_types(p.dtype, table.dtype), torch.float32)
    far = max(largest, float(p_squares.max()) if p_squares.numel() else 0.0)
    return torch.float64 if far > torch.finfo(torch.float32).max / 8 else wide


def input_error(dtype: torch.dtype) -> float:
    """What torch.set_float32_matmul_precision lets a product round its inputs by, of both together."""
    rounded = {"highest": 0.0, "high": 2**-9, "medium": 2**-6}[torch.get_float32_matmul_precision()]
    return rounded if dtype == torch.float32 else 0.0


def chunk_rows(m: int, table: Tensor, dtype: torch.dtype) -> int:
    """Rows of the table at a time: so many scores, and so many numbers where the rows must be converted."""
    rows = min(ROWS, SCORES // max(1, m))
    if table.dtype != dtype:
        rows = min(rows, 4 * NUMBERS // max(1, table.shape[1]))
    return max(1, rows)


def merged(best: Tensor, s: Tensor, low: Tensor) -> Tensor:
    """The k lowest scores of each query, [m, k] ascending, of those and of s [m, rows] with the minima `low`."""
    k = best.shape[1]
    if k == 1:
        return torch.minimum(best, low[:, None])
    open_ = (low < best[:, -1]).nonzero().squeeze(-1)
    lowest = s[open_].topk(min(k, s.shape[1]), largest=False).values
    best[open_] = torch.cat([best[open_], lowest], 1).topk(k, largest=False).values.sort(-1).values
    return best


def doubted(
    p: Tensor, rows: Tensor, half: Tensor, p_squares: Tensor, largest: float, open_: Tensor, hit: Tensor, k: int
) -> None:
    """Take out of hit [queries in open_, rows] what a product in float64 rules out, in place."""
    margin = 2 * error(p_squares, largest, p.shape[1], torch.finfo(torch.float64).eps / 2)
    pieces = rows.split(max(1, NUMBERS // max(1, p.shape[1])))
    size = max(1, NUMBERS // max(1, p.shape[1], rows.shape[0]))
    for some, part in zip(open_.split(size), hit.split(size), strict=True):
        wide = p[some].double()
        s = torch.cat([wide @ piece.double().T for piece in pieces], 1).neg_().add_(half)
        kth = s.topk(min(k, s.shape[1]), largest=False).values[:, -1]
        part &= s <= (kth if s.shape[1] >= k else torch.full_like(kth, torch.inf))[:, None] + margin[some, None]
