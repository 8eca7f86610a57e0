"""Normalise scores, so that τ and c mean the same for every reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from .base import checked_scores, deviation

NormalizationMethod = Literal["none", "zscore", "robust"]


@dataclasses.dataclass(frozen=True)
class ScoreNormalization:
    """
    An affine change of unit: `(score - center) / scale`, in float64.

    Args:
        method (`str`):
            `"none"`, `"zscore"` (mean and standard deviation) or `"robust"` (median and interquartile range).
        center (`float`): Subtracted first, in the unit of the scores.
        scale (`float`): Divisor after that, in the unit of the scores; never 0.
    """

    method: NormalizationMethod = "none"
    center: float = 0.0
    scale: float = 1.0

    def __call__(self, scores: np.ndarray | np.floating) -> np.ndarray:
        """Return the scores (N,) in normalised units, float64."""
        values = np.asarray(scores, dtype=np.float64)
        return values if self.method == "none" else (values - self.center) / self.scale


def fit_normalization(scores: Sequence[float] | np.ndarray, method: NormalizationMethod) -> ScoreNormalization:
    """
    Fit a score normalisation, so that the confidence scale c means the same for every reward.

    Args:
        scores (`Sequence[float]`): (N,) finite scores.
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
    values = checked_scores(scores)
    if method == "zscore":
        return ScoreNormalization("zscore", float(values.mean()), deviation(values))
    if method == "robust":
        low, center, high = np.percentile(values, [25, 50, 75])
        spread = (high - low) / 1.3489795003921634
        return ScoreNormalization("robust", float(center), float(spread if spread > 0 else deviation(values)))
    raise ValueError(f"`score_normalization` must be 'none', 'zscore' or 'robust', got {method!r}.")
