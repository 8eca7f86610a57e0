"""Estimate one threshold per group (a prompt, a domain, a generator) with partial pooling towards the global one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from .base import checked_groups
from .percentile import estimate_threshold

GroupStatistic = Literal["percentile", "mean"]


@dataclasses.dataclass(frozen=True)
class GroupThresholds:
    """
    Thresholds of groups, in the (normalised) unit of the scores.

    Args:
        values (`numpy.ndarray`): (G,) float64, τ of each group.
        pooled (`float`): The global τ, for groups of one score or equal scores and for groups never seen.
        reliability (`numpy.ndarray`):
            (G,) float64 in [0, 1], the weight of a group's own statistic; 0 where the pooled τ is taken.
        within_variance (`float`): σ², of scores about their group's mean; NaN where no group has two scores.
        between_variance (`float`): ω², of the groups' true means; at least 0.
        num_one_sided (`int`): Groups whose scores all get one label.
    """

    values: np.ndarray
    pooled: float
    reliability: np.ndarray
    within_variance: float
    between_variance: float
    num_one_sided: int


def group_ids(keys: Sequence[str] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Number groups in order of first appearance.

    Args:
        keys (`Sequence[str]` or `numpy.ndarray`): (N,) names of the rows' groups.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: (N,) int64 numbers 0 .. G - 1, and the (G,) names.
    """
    # Not np.unique, which would store each text with the length of the longest one.
    seen: dict[Any, int] = {}
    numbers = np.fromiter((seen.setdefault(key, len(seen)) for key in keys), dtype=np.int64, count=len(keys))
    names = np.empty(len(seen), dtype=object)
    names[:] = list(seen)
    return numbers, names


def variance_components(scores: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """
    Estimate the variance within and between groups by the analysis of variance with unequal group sizes.

    With G groups of n_g scores, N = Σ n_g and `n₀ = (N - Σ n_g²/N)/(G - 1)`: σ² is the mean square within groups and
    `ω² = max(0, (MS_between - σ²)/n₀)`.

    Args:
        scores (`numpy.ndarray`): (N,) float64.
        groups (`numpy.ndarray`): (N,) integers 0 .. G - 1.

    Returns:
        `tuple[float, float]`: σ² and ω²; σ² is NaN and ω² 0 where no group has two scores, ω² is 0 for one group.
    """
    sizes = np.bincount(groups).astype(np.float64)
    total, count = sizes.sum(), len(sizes)
    if total <= count:
        return math.nan, 0.0
    means = np.bincount(groups, weights=scores) / sizes
    squares = means[groups]
    np.subtract(scores, squares, out=squares)
    within = float(np.square(squares, out=squares).sum() / (total - count))
    del squares
    if count < 2:
        return within, 0.0
    mean_square = float((sizes * (means - scores.mean()) ** 2).sum() / (count - 1))
    effective_size = (total - (sizes**2).sum() / total) / (count - 1)
    return within, max(0.0, (mean_square - within) / effective_size)


def estimate_group_thresholds(
    scores: Sequence[float] | np.ndarray,
    groups: np.ndarray,
    *,
    percentile: float = 50.0,
    statistic: GroupStatistic = "percentile",
) -> GroupThresholds:
    """
    Estimate a threshold for each group with partial pooling, an empirical-Bayes rule.

    A group's own statistic m_g has the sampling variance `v·σ²/n_g`, where v = 1 for the mean and
    `p(1 - p)/φ(z_p)²` for the p-th percentile of normal scores (π/2 for the median). Groups differ with variance ω².
    The posterior mean of a normal model is `τ_g = τ + λ_g·(m_g - τ)` with the reliability
    `λ_g = ω²/(ω² + v·σ²/n_g)`: a small group, or groups that hardly differ, keep the global τ. Groups of one score or
    of equal scores take τ itself. Where a group's percentile is its minimum, m_g moves to the midpoint of its two
    smallest distinct scores, as [`estimate_threshold`] does. Groups with one label alone are allowed.

    Args:
        scores (`Sequence[float]`): (N,) finite scores.
        groups (`numpy.ndarray`): (N,) integers 0 .. G - 1, each number present; see [`group_ids`].
        percentile (`float`, *optional*, defaults to 50.0):
            Percentile of the scores of a group, and of all scores, in (0, 100).
        statistic (`str`, *optional*, defaults to `"percentile"`):
            `"percentile"`, or `"mean"`, with which the global τ is a mean too.

    Returns:
        [`GroupThresholds`]

    Raises:
        ThresholdError: for scores that cannot be divided in two, or `groups` of another length.
        ValueError: for a percentile out of range or an unknown statistic.
    """
    if statistic not in ("percentile", "mean"):
        raise ValueError(f"`statistic` must be 'percentile' or 'mean', got {statistic!r}.")
    if not 0 < percentile < 100:
        raise ValueError(f"`percentile` must lie between 0 and 100, both excluded, got {percentile}.")
    values, groups = checked_groups(scores, groups)
    sizes = np.bincount(groups)
    order = np.lexsort((values, groups))
    ordered, starts = values[order], np.concatenate(([0], np.cumsum(sizes)[:-1]))
    lowest, highest = ordered[starts], ordered[starts + sizes - 1]
    if statistic == "mean":
        pooled = float(values.mean())
        own = np.bincount(groups, weights=values) / sizes
    else:
        pooled = estimate_threshold(values, percentile=percentile).value
        share = percentile / 100
        own = _moved_off_minimum(_percentiles(ordered, starts, sizes, share), ordered, starts, sizes, groups[order])
    within, between = variance_components(values, groups)
    reliability = np.zeros(len(sizes))
    informative = highest > lowest
    if between > 0:
        variance = sampling_variance(percentile, statistic) * within
        reliability[informative] = between / (between + variance / sizes[informative])
    thresholds = pooled + reliability * (own - pooled)
    one_sided = int(((lowest >= thresholds) | (highest < thresholds)).sum())
    return GroupThresholds(thresholds, pooled, reliability, within, between, one_sided)


def sampling_variance(percentile: float, statistic: GroupStatistic) -> float:
    """Return v, the sampling variance of a group's statistic divided by σ²/n, for normal scores."""
    if statistic == "mean":
        return 1.0
    share = percentile / 100
    return share * (1 - share) / NormalDist().pdf(NormalDist().inv_cdf(share)) ** 2


def _percentiles(ordered: np.ndarray, starts: np.ndarray, sizes: np.ndarray, share: float) -> np.ndarray:
    """Return the percentile of each run of sorted scores by NumPy's "linear" rule."""
    position = share * (sizes - 1)
    below = np.floor(position).astype(np.int64)
    above = np.minimum(below + 1, sizes - 1)
    low, high = ordered[starts + below], ordered[starts + above]
    return low + (position - below) * (high - low)


def _moved_off_minimum(
    own: np.ndarray, ordered: np.ndarray, starts: np.ndarray, sizes: np.ndarray, groups: np.ndarray
) -> np.ndarray:
    lowest = ordered[starts]
    above = ordered > lowest[groups]  # in sorted order: false up to the first score above the minimum
    second = starts + sizes - np.bincount(groups[above], minlength=len(sizes))
    second = ordered[np.minimum(second, starts + sizes - 1)]
    return np.where(own > lowest, own, lowest + (second - lowest) / 2)
