"""Estimate the paper's baseline τ*(x) = β·log Z(x) from scored samples of the reference policy."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from .base import ThresholdError, checked_groups
from .groups import variance_components
from .percentile import estimate_threshold


@dataclasses.dataclass(frozen=True)
class OracleThresholds:
    """
    Monte-Carlo thresholds, in the (normalised) unit of the scores.

    Args:
        values (`numpy.ndarray`): (G,) float64, τ̂* of each group from all its samples, for other samples of the group.
        leave_one_out (`numpy.ndarray`): (N,) float64, τ̂* of each sample from the others of its group.
        pooled (`float`): The global percentile, for groups of one sample or equal scores and for groups never seen.
        beta (`float`): β_r, in the unit of the scores.
    """

    values: np.ndarray
    leave_one_out: np.ndarray
    pooled: float
    beta: float


def estimate_oracle_thresholds(
    scores: Sequence[float] | np.ndarray, groups: np.ndarray, *, beta: float | None = None, percentile: float = 50.0
) -> OracleThresholds:
    """
    Estimate `τ*(x) = β_r·log E_{y~π_ref}[exp(R(x,y)/β_r)]` by `β_r·log((1/K)·Σ_k exp(R_k/β_r))`.

    τ* is the normaliser of the KL-regularised optimum, which the paper replaces by one percentile.

    The logarithm of a mean of K samples is too low on average, by about `β_r·v/(2K)` with v the squared coefficient of
    variation of `exp(R/β_r)`. That is added, with v estimated from the same samples.

    The K samples of a group must come from the reference policy. β_r → ∞ gives their mean, β_r → 0 their maximum.
    A sample's own score is left out of the baseline that it meets, since it would pull τ towards itself. Groups with
    one sample or equal scores take the pooled percentile.

    Args:
        scores (`Sequence[float]`): (N,) finite scores of samples of the reference.
        groups (`numpy.ndarray`): (N,) integers 0 .. G - 1, each number present: the prompt of each sample.
        beta (`float`, *optional*):
            β_r > 0 in the unit of the scores, the KL temperature of the objective; by default the pooled standard
            deviation within groups.
        percentile (`float`, *optional*, defaults to 50.0): Percentile of all scores that is the pooled value.

    Returns:
        [`OracleThresholds`]

    Raises:
        ThresholdError: for scores that cannot be divided in two, or where no group has two different scores.
        ValueError: for a `beta` that is not positive.
    """
    if beta is not None and not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"`beta` must be larger than 0 and finite, got {beta}.")
    values, groups = checked_groups(scores, groups)
    within, _ = variance_components(values, groups)
    if not within > 0:
        raise ThresholdError(
            "No prompt has two samples with different scores, so no prompt has a baseline of its own. Score several "
            "samples per prompt, or use the global threshold."
        )
    temperature = math.sqrt(within) if beta is None else beta
    pooled = estimate_threshold(values, percentile=percentile).value
    sizes = np.bincount(groups)
    count = sizes[groups]
    # Scores are taken relative to the largest of their group, or to the second largest where the largest is left out:
    # every sum of exponentials then lies between 1 and K, whatever β_r is.
    order = np.lexsort((values, groups))
    ends = np.cumsum(sizes) - 1
    top_row = order[ends]
    largest = values[top_row]
    second = values[order[np.maximum(ends - 1, ends - sizes + 1)]]
    exponentials = np.exp((values - largest[groups]) / temperature)
    sums, squares = (np.bincount(groups, weights=exponentials**power) for power in (1, 2))
    full = largest + temperature * log_mean(sums, squares, sizes)
    with np.errstate(divide="ignore", invalid="ignore"):
        rests = log_mean(sums[groups] - exponentials, squares[groups] - exponentials**2, count - 1)
        others = largest[groups] + temperature * rests
        without_top = np.exp((np.minimum(values, second[groups]) - second[groups]) / temperature)
        without_top[top_row] = 0.0
        sums, squares = (np.bincount(groups, weights=without_top**power) for power in (1, 2))
        others[top_row] = second + temperature * log_mean(sums, squares, sizes - 1)
    lowest = values[order[ends - sizes + 1]]
    silent = largest == lowest
    return OracleThresholds(
        np.where(silent, pooled, full), np.where(silent[groups], pooled, others), pooled, temperature
    )


def log_mean(sums: np.ndarray, squares: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """
    Estimate the logarithm of a mean, with the bias of the plain estimate removed to first order in 1/K.

    By Taylor's formula `E[log m] = log μ - var/(2Kμ²) + ...` for the mean m of K samples.

    Args:
        sums (`numpy.ndarray`): Sum of the K samples, larger than 0.
        squares (`numpy.ndarray`): Sum of their squares.
        counts (`numpy.ndarray`): K. One sample has no variance, and no correction.

    Returns:
        `numpy.ndarray`: in the shape of `sums`.
    """
    means = sums / counts
    spread = np.maximum(squares / counts - means**2, 0.0) / means**2
    return np.asarray(np.log(means) + spread / (2 * np.maximum(counts - 1, 1)))
