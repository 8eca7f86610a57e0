"""Loss functions: tensors in, one value per example out. They know no model, no configuration and no log."""

from .base import LossRecord
from .comparison import kto_loss, nft_loss, quantile_regression_loss, regression_loss, supervised_loss
from .groups import (
    centred_in_group,
    group_differences,
    group_mates_mean,
    pair_margins,
    pairwise_threshold_loss,
    preference_loss,
)
from .ordinal import ordinal_loss
from .threshold import threshold_guided_loss

__all__ = [
    "LossRecord",
    "centred_in_group",
    "group_differences",
    "group_mates_mean",
    "kto_loss",
    "nft_loss",
    "ordinal_loss",
    "pair_margins",
    "pairwise_threshold_loss",
    "preference_loss",
    "quantile_regression_loss",
    "regression_loss",
    "supervised_loss",
    "threshold_guided_loss",
]
