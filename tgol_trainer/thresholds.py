"""Scores to threshold: percentile, fixed value, ties, one-sided labels and score normalisation. NumPy only."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

NormalizationMethod = Literal["none", "zscore", "robust"]


class ThresholdError(ValueError):
    """The scores cannot be divided into two classes as asked; the message says why and what to change."""


@dataclasses.dataclass(frozen=True)
class ScoreNormalization:
    """
    An affine change of unit: `(score - center) / scale`, in float64.

    Args:
        method (`str`):
            `"none"`, `"zscore"` (mean and standard deviation) or `"robust"` (median and interquartile range).
        center (`float`):
            Subtracted first, in the unit of the scores.
        scale (`float`):
            Divided by after, in the unit of the scores; never 0.
    """

    method: NormalizationMethod = "none"
    center: float = 0.0
    scale: float = 1.0

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return the scores (N,) in normalised units, float64."""
        return (np.asarray(scores, dtype=np.float64) - self.center) / self.scale


@dataclasses.dataclass(frozen=True)
class Threshold:
    """
    A threshold and the facts that came with it.

    Args:
        value (`float`):
            τ, in the (normalised) unit of the scores it was estimated from; a score equal to τ is positive.
        source (`str`):
            `"percentile"`, `"fixed"` or `"proxy"`.
        num_scores (`int`):
            Number of scores labelled.
        num_positive (`int`):
            Scores with `score >= value`.
        num_ties (`int`):
            Scores equal to `value`.
        percentile (`float`, *optional*):
            The percentile asked for, 0 to 100; `None` for a fixed value.
        moved_from (`float`, *optional*):
            The percentile's own value where it left the negative side empty and was moved; else `None`.
    """

    value: float
    source: str
    num_scores: int
    num_positive: int
    num_ties: int
    percentile: float | None = None
    moved_from: float | None = None

    @property
    def num_negative(self) -> int:
        """Scores below the threshold."""
        return self.num_scores - self.num_positive

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class WeightSummary:
    """Confidence weights of a whole dataset: their mean, their maximum and the share that the largest 1 % carry."""

    mean: float
    max: float
    top_1_percent_share: float


def _checked(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    if values.size == 0:
        raise ThresholdError("There are no scores: a threshold needs at least two different ones.")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        rows = ", ".join(f"row {row}: {values[row]}" for row in bad[:5])
        raise ThresholdError(
            f"{bad.size} of {values.size} scores are NaN or infinite ({rows}). Remove those rows before estimating."
        )
    if values.min() == values.max():
        raise ThresholdError(
            f"All {values.size} scores equal {values[0]}: nothing separates good from bad samples. Check that the "
            "right column was named, score with another reward, or add samples of other quality."
        )
    return values


def _labelled(values: np.ndarray, value: float, source: str, **facts: float | None) -> Threshold:
    positive = int((values >= value).sum())
    return Threshold(
        value=float(value),
        source=source,
        num_scores=int(values.size),
        num_positive=positive,
        num_ties=int((values == value).sum()),
        **facts,
    )


def estimate_threshold(scores: Sequence[float] | np.ndarray, *, percentile: float = 50.0) -> Threshold:
    """
    Estimate τ as a percentile of the scores (paper, Eq. 10 and Sec. 3.3), in float64 with NumPy's "linear" rule.

    Ratings are full of ties: where the percentile is the smallest score, `s >= τ` would make every sample positive.
    Then τ moves to the midpoint between the smallest score and the next distinct one, and `moved_from` keeps the
    percentile's own value; the caller decides how loudly to say so.

    Args:
        scores (`Sequence[float]`):
            (N,) finite scores of any unit.
        percentile (`float`, *optional*, defaults to 50.0):
            Between 0 and 100; 50 is the paper's median.

    Returns:
        [`Threshold`]: with `value` τ and both sides non-empty.

    Raises:
        ThresholdError: for no scores, NaN or infinite ones, or all equal.
        ValueError: for a percentile outside [0, 100].
    """
    if not 0 <= percentile <= 100:
        raise ValueError(f"`percentile` must lie between 0 and 100, got {percentile}.")
    values = _checked(scores)
    value = float(np.percentile(values, percentile))
    smallest = values.min()
    if value > smallest:
        return _labelled(values, value, "percentile", percentile=percentile)
    second = values[values > smallest].min()
    midpoint = smallest + (second - smallest) / 2
    midpoint = midpoint if midpoint > smallest else second  # neighbouring floats have none between them
    return _labelled(values, midpoint, "percentile", percentile=percentile, moved_from=value)


def apply_threshold(
    scores: Sequence[float] | np.ndarray, value: float, *, source: str = "fixed", percentile: float | None = None
) -> Threshold:
    """
    Label scores with a τ that came from elsewhere: a fixed number, or the percentile of a proxy set.

    Args:
        scores (`Sequence[float]`):
            (N,) finite scores, in the unit of `value`.
        value (`float`):
            τ.
        source (`str`, *optional*, defaults to `"fixed"`):
            Kept in the record.
        percentile (`float`, *optional*):
            Kept in the record.

    Returns:
        [`Threshold`]: counts are those of `scores`.

    Raises:
        ThresholdError: for no scores, NaN or infinite ones, all equal, or one side left empty.
    """
    values = _checked(scores)
    threshold = _labelled(values, value, source, percentile=percentile)
    if threshold.num_positive in (0, threshold.num_scores):
        low, high = values.min(), values.max()
        side, remedy = ("negative", f"above {low:g}") if threshold.num_positive else ("positive", f"at most {high:g}")
        raise ThresholdError(
            f"The {source} threshold {value:g} leaves the {side} side empty: the {values.size} scores run from "
            f"{low:g} to {high:g}. Choose a threshold {remedy}, or leave it out to use a percentile of them."
        )
    return threshold


def fit_normalization(scores: Sequence[float] | np.ndarray, method: NormalizationMethod) -> ScoreNormalization:
    """
    Fit a score normalisation, so that the confidence scale c means the same for every reward.

    Args:
        scores (`Sequence[float]`):
            (N,) finite scores.
        method (`str`):
            `"none"`, `"zscore"`, or `"robust"` (median; interquartile range / 1.349, which equals the standard
            deviation for normal scores; where that range is 0, the standard deviation).

    Returns:
        [`ScoreNormalization`]

    Raises:
        ThresholdError: for no scores, NaN or infinite ones, or all equal.
    """
    if method == "none":
        return ScoreNormalization()
    values = _checked(scores)
    if method == "zscore":
        return ScoreNormalization("zscore", float(values.mean()), float(values.std()))
    if method == "robust":
        low, center, high = np.percentile(values, [25, 50, 75])
        spread = (high - low) / 1.3489795003921634
        return ScoreNormalization("robust", float(center), float(spread if spread > 0 else values.std()))
    raise ValueError(f"`score_normalization` must be 'none', 'zscore' or 'robust', got {method!r}.")


def summarize_weights(
    scores: Sequence[float] | np.ndarray, value: float, *, confidence_scale: float = 5.0
) -> WeightSummary:
    """
    Summarise the weights `1 + c·|s - τ|` that a dataset's scores get (paper, Eq. 10).

    Args:
        scores (`Sequence[float]`):
            (N,) finite scores, in the unit of `value`.
        value (`float`):
            τ.
        confidence_scale (`float`, *optional*, defaults to 5.0):
            c.

    Returns:
        [`WeightSummary`]: equal weights give a `top_1_percent_share` of 0.01 (for N a multiple of 100).
    """
    weights = 1 + confidence_scale * np.abs(np.asarray(scores, dtype=np.float64) - value)
    top = max(1, round(weights.size / 100))
    largest = np.partition(weights, weights.size - top)[weights.size - top :]
    return WeightSummary(float(weights.mean()), float(weights.max()), float(largest.sum() / weights.sum()))
