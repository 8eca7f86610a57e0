"""The paper's loss, Eq. 10: raise samples at or above the threshold, lower the others, by their weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import LossRecord, check_vectors


def threshold_guided_loss(
    log_ratio: torch.Tensor, margin: torch.Tensor, weight: torch.Tensor, *, beta: float = 1.0
) -> LossRecord:
    """
    Threshold-guided optimization (paper, Eq. 10).

    With the label `l = 1[s >= τ]` and `ŝ = β·log_ratio`, the loss of an example is
    `-w·(l·log σ(ŝ) + (1 - l)·log(1 - σ(ŝ)))`. It is computed as `-w·logsigmoid(±ŝ)`: the paper's listing adds 1e-12
    inside the logarithm, which loses the gradient once σ saturates. At a log-ratio of 0 the loss is exactly `w·ln 2`.

    Args:
        log_ratio (`torch.Tensor`): (B,) `log π_θ(y|x) - log π_ref(y|x)`; computed in float32 whatever its dtype.
        margin (`torch.Tensor`): (B,) s - τ. A margin of 0 is positive.
        weight (`torch.Tensor`): (B,) w >= 0; in the paper `1 + c·|s - τ|`, see [`thresholds.confidence_weights`].
        beta (`float`, *optional*, defaults to 1.0): β, the scale of the implicit reward.

    Returns:
        [`LossRecord`]: all (B,).

    Raises:
        ValueError: if the tensors are not all (B,).
    """
    check_vectors(log_ratio=log_ratio, margin=margin, weight=weight)
    label = margin >= 0
    implicit_reward = beta * log_ratio.float()
    signed_reward = torch.where(label, implicit_reward, -implicit_reward)
    return LossRecord(-weight.float() * F.logsigmoid(signed_reward), implicit_reward, label, weight.float())
