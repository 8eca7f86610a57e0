"""Sample, score and log images during training."""

from .callback import SAMPLE_METRICS, RewardFuncs, SampleCallback, SampleSettings
from .drift import DRIFT_METRICS, DriftAlarm

__all__ = ["DRIFT_METRICS", "SAMPLE_METRICS", "DriftAlarm", "RewardFuncs", "SampleCallback", "SampleSettings"]
