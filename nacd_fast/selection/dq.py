"""Dataset quantization (Zhou et al., arXiv 2308.10524): bins of falling submodular gain, sampled evenly.

With s(i, j) the similarity of two samples, here the product of their unit embeddings, and R those that are in no bin
yet, a bin takes one sample after the other by the largest graph-cut gain

    G(x) = sum over i in R of s(i, x) - 2 sum over i in the bin of s(i, x)        (section 3.2; R as the bin began)

until it holds its share. So the first bins hold what stands for the set, the last ones what is left; the kept samples
are drawn from all of them in equal numbers. As s is a product, a gain is one product with a sum of embeddings, and a
pick costs one product of the table with the picked row: n picks from n samples cost n^2 D, hence the blocks.
"""

from collections.abc import Sequence

import numpy as np

from ..config import SelectConfig
from ..examples import Example
from ..progress import Bar, progress_bar
from ..student import load_model
from .embeddings import embed
from .method import Context, Selected, check_fit, kept_count
from .stratified import quotas


def check(pool: Sequence[Example], context: Context) -> None:
    """The model loads, and every sample fits it."""
    base, tokenizer = load_model(context.model.path, context.model.dtype, "cpu")
    check_fit(pool, base, tokenizer, context)


def bins_of(points: np.ndarray, bins: int, bar: Bar | None = None) -> tuple[list[np.ndarray], np.ndarray]:
    """The bins, each with the places of its samples in the order of their picks, and every sample's gain when picked.

    points [n, D], n >= bins. Sizes differ by one at most, the first are the larger. Ties take the lowest place.
    """
    n = len(points)
    found, gains = [], np.empty(n)
    left = np.arange(n)
    for size in (n // bins + (b < n % bins) for b in range(bins)):
        rows = points[left]
        gain = rows @ rows.sum(0, dtype=np.float64)
        picks = np.empty(size, np.int64)
        for step in range(size):
            pick = int(gain.argmax())
            picks[step], gains[left[pick]] = pick, gain[pick]
            gain -= 2.0 * (rows @ rows[pick])
            gain[picks[: step + 1]] = -np.inf
            if bar:
                bar.advance()
        found.append(left[picks])
        left = np.delete(left, picks)
    return found, gains


def select(pool: Sequence[Example], config: SelectConfig, seed: int, context: Context) -> Selected:
    """round(fraction * n) samples; the scores are the gains, of which the kept are no maximum."""
    points = embed(pool, context, config.dq.batch).astype(np.float64)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(pool))
    blocks = np.array_split(order, -(-len(pool) // config.dq.block))
    numbers = quotas(np.array([len(block) for block in blocks]), kept_count(len(pool), config.fraction))
    scores, kept = np.empty(len(pool)), []
    with progress_bar("quantise", len(pool)) as bar:
        for block, number in zip(blocks, numbers):
            bins, scores[block] = bins_of(points[block], min(config.dq.bins, len(block)), bar)
            shares = quotas(np.array([len(b) for b in bins]), int(number))
            kept += [i for b, share in zip(bins, shares) for i in block[draw.choice(b, share, replace=False)]]
    return Selected([pool[i].id for i in sorted(kept)], scores.tolist())
