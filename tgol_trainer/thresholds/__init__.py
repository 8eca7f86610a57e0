"""Scores to thresholds: percentile, fixed value, ties, one-sided labels, score normalisation, weights. NumPy only."""

from .base import Threshold, ThresholdError
from .groups import GroupStatistic, GroupThresholds, estimate_group_thresholds, group_ids, variance_components
from .normalization import NormalizationMethod, ScoreNormalization, fit_normalization
from .oracle import OracleThresholds, estimate_oracle_thresholds
from .percentile import apply_threshold, estimate_threshold
from .running import RunningPercentile
from .weights import WeightSummary, summarize_weights

__all__ = [
    "GroupStatistic",
    "GroupThresholds",
    "NormalizationMethod",
    "OracleThresholds",
    "RunningPercentile",
    "ScoreNormalization",
    "Threshold",
    "ThresholdError",
    "WeightSummary",
    "apply_threshold",
    "estimate_group_thresholds",
    "estimate_oracle_thresholds",
    "estimate_threshold",
    "fit_normalization",
    "group_ids",
    "summarize_weights",
    "variance_components",
]
