"""Scores to thresholds: percentile, fixed value, ties, one-sided labels, score normalisation, weights. NumPy only."""

from .base import Threshold, ThresholdError
from .normalization import NormalizationMethod, ScoreNormalization, fit_normalization
from .percentile import apply_threshold, estimate_threshold
from .weights import WeightSummary, summarize_weights

__all__ = [
    "NormalizationMethod",
    "ScoreNormalization",
    "Threshold",
    "ThresholdError",
    "WeightSummary",
    "apply_threshold",
    "estimate_threshold",
    "fit_normalization",
    "summarize_weights",
]
