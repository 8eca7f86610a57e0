"""Turn scores into thresholds τ, labels and weights, with NumPy alone."""

from .base import Threshold, ThresholdError, shown
from .combination import CombinationMethod, ScoreCombination, check_combination, combined_name, fit_combination
from .counts import GroupCounts, count_differing, count_groups
from .groups import GroupStatistic, GroupThresholds, estimate_group_thresholds, group_ids, variance_components
from .normalization import NormalizationMethod, ScoreNormalization, fit_normalization
from .oracle import OracleThresholds, estimate_oracle_thresholds
from .percentile import apply_threshold, estimate_threshold
from .running import RunningPercentile
from .uncertainty import (
    GroupIntervals,
    ThresholdInterval,
    bootstrap_groups,
    bootstrap_interval,
    bootstrap_thresholds,
    group_draw,
    oracle_draw,
)
from .weights import WEIGHT_FORMS, WeightForm, Weighting, WeightSummary, confidence_weights, summarize_weights

__all__ = [
    "WEIGHT_FORMS",
    "CombinationMethod",
    "GroupCounts",
    "GroupIntervals",
    "GroupStatistic",
    "GroupThresholds",
    "NormalizationMethod",
    "OracleThresholds",
    "RunningPercentile",
    "ScoreCombination",
    "ScoreNormalization",
    "Threshold",
    "ThresholdError",
    "ThresholdInterval",
    "WeightForm",
    "WeightSummary",
    "Weighting",
    "apply_threshold",
    "bootstrap_groups",
    "bootstrap_interval",
    "bootstrap_thresholds",
    "check_combination",
    "combined_name",
    "confidence_weights",
    "count_differing",
    "count_groups",
    "estimate_group_thresholds",
    "estimate_oracle_thresholds",
    "estimate_threshold",
    "fit_combination",
    "fit_normalization",
    "group_draw",
    "group_ids",
    "oracle_draw",
    "shown",
    "summarize_weights",
    "variance_components",
]
