"""Find one threshold for all scores: a percentile of them, or a value that was given."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .base import Threshold, ThresholdError, checked_scores, labelled


def estimate_threshold(scores: Sequence[float] | np.ndarray, *, percentile: float = 50.0) -> Threshold:
    """
    Estimate τ as a percentile of the scores (paper, Eq. 10 and Sec. 3.3), in float64 with NumPy's "linear" rule.

    Ratings are full of ties. If the percentile is the smallest score, `s >= τ` would make every sample positive. Then
    τ moves to the midpoint between the smallest score and the next distinct one, and `moved_from` keeps the
    percentile's own value.

    Args:
        scores (`Sequence[float]`): (N,) finite scores of any unit.
        percentile (`float`, *optional*, defaults to 50.0): Between 0 and 100; 50 is the paper's median.

    Returns:
        [`Threshold`]: with `value` τ and both sides non-empty.

    Raises:
        ThresholdError: for no scores, NaN or infinite ones, or all equal.
        ValueError: for a percentile outside [0, 100].
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"`percentile` must lie between 0 and 100, got {percentile}.")
    values = checked_scores(scores)
    value = float(np.percentile(values, percentile))
    smallest = values.min()
    if value > smallest:
        return labelled(values, value, "percentile", percentile=percentile)
    second = values[values > smallest].min()
    midpoint = smallest + (second - smallest) / 2
    midpoint = midpoint if midpoint > smallest else second  # neighbouring floats have none between them
    return labelled(values, midpoint, "percentile", percentile=percentile, moved_from=value)


def apply_threshold(
    scores: Sequence[float] | np.ndarray, value: float, *, source: str = "fixed", percentile: float | None = None
) -> Threshold:
    """
    Label scores with a given τ: a fixed number, or the percentile of a proxy set.

    Args:
        scores (`Sequence[float]`): (N,) finite scores, in the unit of `value`.
        value (`float`): τ.
        source (`str`, *optional*, defaults to `"fixed"`): Becomes `source` of the result.
        percentile (`float`, *optional*): Becomes `percentile` of the result.

    Returns:
        [`Threshold`]: counts are those of `scores`.

    Raises:
        ThresholdError: for no scores, NaN or infinite ones, all equal, or one side left empty.
    """
    values = checked_scores(scores)
    threshold = labelled(values, value, source, percentile=percentile)
    if threshold.num_positive in (0, threshold.num_scores):
        low, high = values.min(), values.max()
        side, remedy = ("negative", f"above {low:g}") if threshold.num_positive else ("positive", f"at most {high:g}")
        raise ThresholdError(
            f"The {source} threshold {value:g} leaves the {side} side empty: the {values.size} scores run from "
            f"{low:g} to {high:g}. Choose a threshold {remedy}, or leave it out to use a percentile of them."
        )
    return threshold
