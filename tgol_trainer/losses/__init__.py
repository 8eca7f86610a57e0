"""Loss mathematics: tensors in, per-example tensors out. No model, no configuration, no logging."""

from .base import LossRecord
from .groups import group_differences, group_mates_mean, mutual_threshold_loss, preference_loss
from .ordinal import ordinal_loss
from .rivals import kto_loss, nft_loss, quantile_regression_loss, regression_loss, supervised_loss
from .threshold import threshold_guided_loss

__all__ = [
    "LossRecord",
    "group_differences",
    "group_mates_mean",
    "kto_loss",
    "mutual_threshold_loss",
    "nft_loss",
    "ordinal_loss",
    "preference_loss",
    "quantile_regression_loss",
    "regression_loss",
    "supervised_loss",
    "threshold_guided_loss",
]
