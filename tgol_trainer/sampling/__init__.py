"""Sample, score and log images during training."""

from .callback import SAMPLE_METRICS, RewardFuncs, SampleCallback, SampleSettings

__all__ = ["SAMPLE_METRICS", "RewardFuncs", "SampleCallback", "SampleSettings"]
