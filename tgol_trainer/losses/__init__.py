"""Loss functions: tensors in, one value per example out. They know no model, no configuration and no log."""

from .anchored import anchored_loss, dspo_loss, linear_change
from .base import LossRecord
from .comparison import kto_loss, nft_loss, quantile_regression_loss, regression_loss, supervised_loss
from .groups import pair_margins, pairwise_threshold_loss, preference_loss
from .threshold import threshold_guided_loss

__all__ = [
    "LossRecord",
    "anchored_loss",
    "dspo_loss",
    "kto_loss",
    "linear_change",
    "nft_loss",
    "pair_margins",
    "pairwise_threshold_loss",
    "preference_loss",
    "quantile_regression_loss",
    "regression_loss",
    "supervised_loss",
    "threshold_guided_loss",
]
