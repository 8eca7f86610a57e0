"""Bootstrap intervals: how far τ could lie from where it does, for all rows and for groups with their own τ."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from .base import checked_scores
from .groups import GroupStatistic, sampling_variance
from .oracle import log_mean

_LEVEL = 0.95
_FEW_SCORES = 100  # up to so many, scores are resampled one by one
_GROUP_REPLICATES, _GROUP_ROWS = 400, 2000

Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Scores of a group and a generator to replicates of its τ."""


@dataclasses.dataclass(frozen=True)
class ThresholdInterval:
    """
    A bootstrap interval of τ.

    Args:
        low (`float`): Lower end, in the unit of the scores.
        high (`float`): Upper end.
        level (`float`): Share of the bootstrap distribution between the ends, 0 to 1.
    """

    low: float
    high: float
    level: float

    def num_flips(self, scores: np.ndarray) -> int:
        """Count the scores (N,) whose label differs between τ at the lower and τ at the upper end."""
        return int(np.count_nonzero((scores >= self.low) & (scores < self.high)))


@dataclasses.dataclass(frozen=True)
class GroupIntervals:
    """Bootstrap intervals of the τ of M groups."""

    keys: np.ndarray  # (M,), ascending
    low: np.ndarray  # (M,) float64, lower ends
    high: np.ndarray  # (M,) float64, upper ends

    def flip_share(self, scores: np.ndarray, keys: np.ndarray) -> float:
        """Return the share of these groups' rows (scores and keys, both (N,)) whose label differs between the ends."""
        place, inside = _find(keys, self.keys)
        place, scores = place[inside], scores[inside]
        return float(np.mean((scores >= self.low[place]) & (scores < self.high[place]))) if scores.size else 0.0


def bootstrap_thresholds(
    scores: np.ndarray, *, percentile: float = 50.0, num_replicates: int = 20_000, seed: int = 0
) -> np.ndarray:
    """
    Draw what [`estimate_threshold`] gives for resamples of ascending scores (N,), NaN for a resample of equal scores.

    Up to 100 scores are resampled. A resample of n > 100 sorted scores x is x[⌊n·u⌋] of n uniform numbers u, and its
    percentile needs two neighbouring order statistics of u. They are drawn from their beta distributions, so that ten
    million scores cost no more than a thousand. Replicates at the smallest score then move to the midpoint of the two
    smallest distinct scores of the data, though a resample may lack the second of them.
    """
    n, rng = scores.size, np.random.default_rng(seed)
    if n <= _FEW_SCORES:
        resamples = scores[rng.integers(n, size=(num_replicates, n))]
        values, lowest = np.percentile(resamples, percentile, axis=1), resamples.min(axis=1)
        second = np.where(resamples > lowest[:, None], resamples, np.nan)
        second = np.fmin.reduce(second, axis=1)  # NaN if all are equal
        return np.where(values > lowest, values, lowest + (second - lowest) / 2)
    position = (n - 1) * percentile / 100
    k = int(position)
    at = rng.beta(k + 1, n - k, num_replicates)
    after = at + (1 - at) * rng.beta(1, max(n - k - 1, 1), num_replicates)
    low, high = (scores[np.minimum((u * n).astype(np.int64), n - 1)] for u in (at, after))
    values = low + (position - k) * (high - low)
    second = scores[np.searchsorted(scores, scores[0], side="right")]
    return np.where(values > scores[0], values, scores[0] + (second - scores[0]) / 2)


def bootstrap_interval(scores: np.ndarray, *, percentile: float = 50.0) -> ThresholdInterval:
    """
    Return the percentile bootstrap interval of τ, with 95 % of 20,000 replicates inside.

    Args:
        scores (`np.ndarray`): (N,) finite scores that τ comes from, in any order.
        percentile (`float`, *optional*, defaults to 50.0): Between 0 and 100.

    Returns:
        [`ThresholdInterval`]

    Raises:
        ThresholdError: for no scores, NaN or infinite ones, or all equal.
    """
    values = np.sort(checked_scores(scores))
    drawn = bootstrap_thresholds(values, percentile=percentile)
    low, high = _interval(drawn[~np.isnan(drawn)])
    return ThresholdInterval(low, high, _LEVEL)


def bootstrap_groups(
    scores: np.ndarray, keys: np.ndarray, draw: Draw, *, max_groups: int = 2000, seed: int = 0
) -> GroupIntervals:
    """
    Return percentile bootstrap intervals of the τ of groups, with 95 % of 400 replicates inside.

    Each group is resampled within itself.

    Args:
        scores (`numpy.ndarray`): (N,) finite scores that the thresholds come from.
        keys (`numpy.ndarray`): (N,) integers, equal for rows of a group.
        draw (`Callable`):
            The sorted scores of a group and a generator to replicates of its τ: [`group_draw`] or [`oracle_draw`].
        max_groups (`int`, *optional*, defaults to 2000): If there are more groups, so many are chosen at random.
        seed (`int`, *optional*, defaults to 0): Seed of that choice and of the draws.

    Returns:
        [`GroupIntervals`]
    """
    rng = np.random.default_rng(seed)
    chosen = np.unique(keys)
    if chosen.size > max_groups:
        chosen = np.sort(rng.choice(chosen, max_groups, replace=False))
    place, inside = _find(keys, chosen)
    place, scores = place[inside], scores[inside]
    order = np.lexsort((scores, place))
    parts = np.split(scores[order], np.cumsum(np.bincount(place, minlength=chosen.size))[:-1])
    ends = np.array([_interval(draw(part, rng)) for part in parts])
    return GroupIntervals(chosen, ends[:, 0], ends[:, 1])


def group_draw(
    pooled: float, within: float, between: float, *, percentile: float = 50.0, statistic: GroupStatistic = "percentile"
) -> Draw:
    """
    Return the function that draws the τ of a group under partial pooling, see [`estimate_group_thresholds`].

    The global τ `pooled`, σ² `within` and ω² `between` are held fixed.
    """

    def draw(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if values[0] == values[-1] or not between > 0:
            return np.full(_GROUP_REPLICATES, pooled)
        reliability = between / (between + sampling_variance(percentile, statistic) * within / values.size)
        if statistic == "mean":
            own = _resampled(values, rng, lambda resamples: resamples.mean(axis=1))
        else:
            seed = int(rng.integers(2**31))
            own = bootstrap_thresholds(values, percentile=percentile, num_replicates=_GROUP_REPLICATES, seed=seed)
        # A resample of equal scores takes the pooled τ, as a group of equal scores does.
        return np.where(np.isnan(own), pooled, pooled + reliability * (own - pooled))

    return draw


def oracle_draw(pooled: float, beta: float) -> Draw:
    """
    Return the function that draws the log-mean-exp of a group's samples, see [`estimate_oracle_thresholds`].

    β_r and `pooled`, the τ of a group of equal scores, are held fixed.
    """

    def log_mean_exp(resamples: np.ndarray) -> np.ndarray:
        largest = resamples.max(axis=1, keepdims=True)
        exponentials = np.exp((resamples - largest) / beta)
        size = np.asarray(exponentials.shape[1])
        return np.asarray(largest[:, 0] + beta * log_mean(exponentials.sum(1), (exponentials**2).sum(1), size))

    def draw(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if values[0] == values[-1]:
            return np.full(_GROUP_REPLICATES, pooled)
        own = _resampled(values, rng, log_mean_exp)
        return np.where(np.isnan(own), pooled, own)

    return draw


def _resampled(
    values: np.ndarray, rng: np.random.Generator, statistic: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Return a statistic of resamples; NaN for those of equal scores."""
    size = min(values.size, _GROUP_ROWS)
    resamples = values[rng.integers(values.size, size=(_GROUP_REPLICATES, size))]
    found = np.where(np.ptp(resamples, axis=1) > 0, statistic(resamples), np.nan)
    # A resample of a large group has fewer rows; deviations shrink with the root of the size ("m out of n" bootstrap).
    centre = statistic(values[None]) if size < values.size else 0.0
    return np.asarray(centre + math.sqrt(size / values.size) * (found - centre))


def _interval(drawn: np.ndarray) -> tuple[float, float]:
    # The ends are replicates: between two of them there may be no score at all.
    low, high = np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], method="inverted_cdf")
    return float(low), float(high)


def _find(keys: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where in ascending `chosen` each key stands, and whether it does."""
    place = np.minimum(np.searchsorted(chosen, keys), chosen.size - 1)
    return place, chosen[place] == keys
