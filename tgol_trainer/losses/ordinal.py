"""Several thresholds at once, so that the loss sees the order of scores and not one side alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .base import LossRecord
from .threshold import threshold_guided_loss


def ordinal_loss(
    log_ratio: torch.Tensor,
    margins: torch.Tensor,
    offsets: Sequence[float],
    weights: torch.Tensor,
    *,
    beta: float = 1.0,
) -> LossRecord:
    """
    Mean over m cut points of the threshold-guided loss, each with its offset:
    `(1/m)·Σ_k w_k·softplus(-(2·1[s >= τ_k] - 1)·(ŝ - b_k))`. With m = 1 it is Eq. 10 of the paper.

    Args:
        log_ratio (`torch.Tensor`): (B,) log π_θ/π_ref.
        margins (`torch.Tensor`): (B, m) s - τ_k.
        offsets (`Sequence[float]`): m numbers b_k, from [`thresholds.ordinal_offsets`].
        weights (`torch.Tensor`): (B, m) weights w_k.
        beta (`float`, *optional*, defaults to 1.0): β.

    Returns:
        [`LossRecord`]: `label` is that of the middle cut point (the lower of two), `weight` the mean over cut points.

    Raises:
        ValueError: for shapes that do not fit.
    """
    count = len(offsets)
    if margins.shape != (*log_ratio.shape, count) or weights.shape != margins.shape or log_ratio.dim() != 1:
        raise ValueError(
            f"`log_ratio` must be (B,), `margins` and `weights` (B, {count}), got {tuple(log_ratio.shape)}, "
            f"{tuple(margins.shape)} and {tuple(weights.shape)}."
        )
    if count == 1:
        return threshold_guided_loss(log_ratio, margins[:, 0], weights[:, 0], beta=beta)
    implicit_reward = beta * log_ratio.float()
    above = margins >= 0
    distance = implicit_reward[:, None] - torch.tensor(offsets, dtype=torch.float32, device=log_ratio.device)
    losses = weights.float() * F.softplus(torch.where(above, -distance, distance))
    return LossRecord(losses.mean(1), implicit_reward, above[:, (count - 1) // 2], weights.float().mean(1))
