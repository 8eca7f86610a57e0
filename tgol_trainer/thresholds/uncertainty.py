"""How sure a percentile is: its bootstrap distribution, drawn from order statistics instead of resampled data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from .base import ThresholdError, checked_scores
from .groups import GroupStatistic, sampling_variance


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
    values = checked_scores(scores)
    values = values if (values[1:] >= values[:-1]).all() else np.sort(values)
    drawn = bootstrap_thresholds(values, percentile=percentile, seed=seed)
    if not drawn.size:
        raise ThresholdError(f"No resample of the {values.size} scores held two different ones.")
    # Ends that occur: between two replicates there may be no score at all.
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf")
    return ThresholdInterval(float(low), float(high), level)


Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]
_REPLICATES, _LARGE_GROUP = 400, 2000


@dataclasses.dataclass(frozen=True)
class GroupIntervals:
    """
    Bootstrap intervals of the τ of groups, of all or of a random part of them.

    Args:
        keys (`numpy.ndarray`):
            (M,) of the groups, ascending.
        low (`numpy.ndarray`):
            (M,) float64.
        high (`numpy.ndarray`):
            (M,) float64.
    """

    keys: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def flip_share(self, scores: np.ndarray, keys: np.ndarray) -> float:
        """
        Share of the rows of these groups, 0 to 1, whose label differs between the ends of their group's interval.

        Args:
            scores (`numpy.ndarray`):
                (N,) of any rows, in the unit of the intervals.
            keys (`numpy.ndarray`):
                (N,) their groups.
        """
        place, inside = _among(keys, self.keys)
        place, scores = place[inside], scores[inside]
        return float(np.mean((scores >= self.low[place]) & (scores < self.high[place]))) if scores.size else 0.0


def bootstrap_groups(
    scores: np.ndarray, keys: np.ndarray, draw: Draw, *, level: float = 0.95, max_groups: int = 2000, seed: int = 0
) -> GroupIntervals:
    """
    Return percentile bootstrap intervals of the τ of groups, each resampled within itself.

    Args:
        scores (`numpy.ndarray`):
            (N,) finite scores that the thresholds come from.
        keys (`numpy.ndarray`):
            (N,) integers, equal for rows of a group.
        draw (`Callable`):
            The sorted scores of a group and a generator to replicates of its τ: [`group_draw`] or [`oracle_draw`].
        level (`float`, *optional*, defaults to 0.95):
            Share of the bootstrap distribution inside, 0 to 1.
        max_groups (`int`, *optional*, defaults to 2000):
            Of more groups, so many are taken at random.
        seed (`int`, *optional*, defaults to 0):
            Of that choice and of the draws.

    Returns:
        [`GroupIntervals`]
    """
    rng = np.random.default_rng(seed)
    chosen = np.unique(keys)
    if chosen.size > max_groups:
        chosen = np.sort(rng.choice(chosen, max_groups, replace=False))
    place, inside = _among(keys, chosen)
    place, scores = place[inside], scores[inside]
    order = np.lexsort((scores, place))
    parts = np.split(scores[order], np.cumsum(np.bincount(place, minlength=chosen.size))[:-1])
    ends = np.array(
        [np.quantile(draw(part, rng), [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf") for part in parts]
    )
    return GroupIntervals(chosen, ends[:, 0], ends[:, 1])


def _among(keys: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where in ascending `chosen` each key stands, and whether it does."""
    place = np.minimum(np.searchsorted(chosen, keys), chosen.size - 1)
    return place, chosen[place] == keys


def group_draw(
    pooled: float, within: float, between: float, *, percentile: float = 50.0, statistic: GroupStatistic = "percentile"
) -> Draw:
    """
    Return what draws the τ of a group under partial pooling, see [`estimate_group_thresholds`].

    Args:
        pooled (`float`):
            The global τ, held fixed.
        within (`float`):
            σ², held fixed.
        between (`float`):
            ω², held fixed.
        percentile (`float`, *optional*, defaults to 50.0):
            Of a group.
        statistic (`str`, *optional*, defaults to `"percentile"`):
            Or `"mean"`.
    """

    def draw(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if values[0] == values[-1] or not between > 0:
            return np.full(_REPLICATES, pooled)
        reliability = between / (between + sampling_variance(percentile, statistic) * within / values.size)
        if statistic == "percentile":
            seed = int(rng.integers(2**31))
            own = bootstrap_thresholds(values, percentile=percentile, num_replicates=_REPLICATES, seed=seed)
        elif values.size > _LARGE_GROUP:
            own = _normal_means(values, rng)
        else:
            own = _informative(values, rng).mean(axis=1)
        # A resample of equal scores takes the pooled τ, as a group of equal scores does.
        return np.concatenate([pooled + reliability * (own - pooled), np.full(_REPLICATES - len(own), pooled)])

    return draw


def oracle_draw(pooled: float, beta: float) -> Draw:
    """
    Return what draws the log-mean-exp of a group's samples, see [`estimate_oracle_thresholds`].

    Args:
        pooled (`float`):
            τ of a group that says nothing, held fixed.
        beta (`float`):
            β_r, held fixed.
    """

    def draw(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if values[0] == values[-1]:
            return np.full(_REPLICATES, pooled)
        if values.size > _LARGE_GROUP:
            means = _normal_means(np.exp((values - values[-1]) / beta), rng)
            return np.asarray(values[-1] + beta * np.log(np.maximum(means, np.finfo(float).tiny)))
        resamples = _informative(values, rng)
        largest = resamples.max(axis=1, keepdims=True)
        own = largest[:, 0] + beta * np.log(np.exp((resamples - largest) / beta).mean(axis=1))
        return np.concatenate([own, np.full(_REPLICATES - len(own), pooled)])

    return draw


def _informative(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return those of `_REPLICATES` resamples (a row each) that hold two different scores."""
    resamples = values[rng.integers(values.size, size=(_REPLICATES, values.size))]
    return np.asarray(resamples[resamples.max(axis=1) > resamples.min(axis=1)])


def _normal_means(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return means of resamples of a large group, from the normal distribution that they then have."""
    return np.asarray(values.mean() + values.std() / math.sqrt(values.size) * rng.normal(size=_REPLICATES))
