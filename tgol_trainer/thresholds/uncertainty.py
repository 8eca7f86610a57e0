"""How sure a percentile is: its bootstrap distribution, drawn from order statistics instead of resampled data."""

from __future__ import annotations

import dataclasses

import numpy as np

from .base import ThresholdError, checked_scores


@dataclasses.dataclass(frozen=True)
class ThresholdInterval:
    """
    A bootstrap interval of τ.

    Args:
        low (`float`):
            Lower end, in the unit of the scores.
        high (`float`):
            Upper end.
        level (`float`):
            Share of the bootstrap distribution between the ends, 0 to 1.
    """

    low: float
    high: float
    level: float

    def num_flips(self, scores: np.ndarray) -> int:
        """
        Count the labels that differ between τ at the lower and τ at the upper end.

        Args:
            scores (`np.ndarray`):
                (N,) scores in the unit of the interval.
        """
        return int(np.count_nonzero((scores >= self.low) & (scores < self.high)))


def bootstrap_thresholds(
    scores: np.ndarray, *, percentile: float = 50.0, num_replicates: int = 20_000, seed: int = 0
) -> np.ndarray:
    """
    Draw what [`estimate_threshold`] gives for resamples of the scores, without resampling them.

    A resample of n sorted scores x is x[⌊n·u⌋] of n uniform numbers u. τ depends on two neighbouring order statistics
    of them and, where it has to leave the smallest score, on the smallest and the next distinct one; those are drawn
    directly (beta distributions), so that a replicate costs the same for ten scores and for ten million.

    Args:
        scores (`np.ndarray`):
            (N,) finite scores in ascending order.
        percentile (`float`, *optional*, defaults to 50.0):
            Between 0 and 100.
        num_replicates (`int`, *optional*, defaults to 20000):
            Resamples.
        seed (`int`, *optional*, defaults to 0):
            Of the draws.

    Returns:
        `np.ndarray`: (M,) float64; M is smaller than `num_replicates` where resamples were all equal and have no τ.
    """
    n, rng, count = scores.size, np.random.default_rng(seed), num_replicates
    position = (n - 1) * percentile / 100
    k = min(int(position), n - 1)
    fraction = position - k
    # Uniform order statistics: the k-th (from 0), the one after it, and the smallest; each given the ones before.
    at = rng.beta(k + 1, n - k, count)
    after = at + (1 - at) * rng.beta(1, n - k - 1, count) if k + 1 < n else at
    first = at * rng.beta(1, k, count) if k else at
    low, high, smallest = (scores[_index(u, n)] for u in (at, after, first))
    values = low + fraction * (high - low)
    stuck = (low == smallest) & ((high == smallest) | (fraction == 0))
    if stuck.any():
        second = _next_distinct(scores, smallest[stuck], after[stuck], high[stuck], n - k - 2, rng)
        values[stuck] = smallest[stuck] + (second - smallest[stuck]) / 2
    return values[np.isfinite(values)]


def _next_distinct(
    scores: np.ndarray, smallest: np.ndarray, above: np.ndarray, high: np.ndarray, rest: int, rng: np.random.Generator
) -> np.ndarray:
    """The smallest resampled score above the minimum; `rest` uniform numbers above `above` are not yet drawn."""
    n = scores.size
    end = np.searchsorted(scores, smallest, side="right") / n
    share = np.clip((1 - end) / np.maximum(1 - above, np.finfo(float).tiny), 0, 1)
    larger = rng.binomial(max(rest, 0), share)
    drawn = end + (1 - end) * rng.beta(1, np.maximum(larger, 1))
    second = np.where(larger > 0, scores[_index(drawn, n)], np.nan)
    return np.where(high > smallest, high, second)


def _index(uniform: np.ndarray, n: int) -> np.ndarray:
    return np.minimum((uniform * n).astype(np.int64), n - 1)


def bootstrap_interval(
    scores: np.ndarray, *, percentile: float = 50.0, level: float = 0.95, seed: int = 0
) -> ThresholdInterval:
    """
    Return the percentile bootstrap interval of τ.

    Args:
        scores (`np.ndarray`):
            (N,) finite scores, in any order; of the data that τ comes from.
        percentile (`float`, *optional*, defaults to 50.0):
            Between 0 and 100.
        level (`float`, *optional*, defaults to 0.95):
            Share of the bootstrap distribution inside, 0 to 1.
        seed (`int`, *optional*, defaults to 0):
            Of the 20,000 replicates.

    Returns:
        [`ThresholdInterval`]

    Raises:
        ThresholdError: for no scores, NaN or infinite ones, or all equal.
    """
    values = np.sort(checked_scores(scores))
    drawn = bootstrap_thresholds(values, percentile=percentile, seed=seed)
    if not drawn.size:
        raise ThresholdError(f"No resample of the {values.size} scores held two different ones.")
    # Ends that occur: between two replicates there may be no score at all.
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return ThresholdInterval(float(low), float(high), level)
