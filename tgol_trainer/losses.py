"""Loss mathematics: tensors in, per-example tensors out. No model, no configuration, no logging."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F


class LossRecord(NamedTuple):
    """
    What a loss function returns, one value an example.

    Args:
        loss (`torch.Tensor`):
            (B,) float32 loss; its mean is minimised.
        implicit_reward (`torch.Tensor`):
            (B,) float32 ŝ = β·log(π_θ/π_ref), with gradient.
        label (`torch.Tensor`):
            (B,) bool pseudo-label, true where the score reaches the threshold.
        weight (`torch.Tensor`):
            (B,) float32 confidence weight.
    """

    loss: torch.Tensor
    implicit_reward: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor


def threshold_guided_loss(
    log_ratio: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor | float,
    *,
    beta: float = 1.0,
    confidence_scale: float = 5.0,
) -> LossRecord:
    """
    Threshold-guided optimization (paper, Eq. 10).

    With `l = 1[s >= τ]`, `w = 1 + c·|s - τ|` and `ŝ = β·log_ratio`, the loss of an example is
    `-w·(l·log σ(ŝ) + (1 - l)·log(1 - σ(ŝ)))`. It is evaluated as `-w·logsigmoid(±ŝ)`: the paper's listing adds 1e-12
    inside the logarithm, which loses the gradient once σ saturates. At a log-ratio of 0 the loss is exactly `w·ln 2`.

    Args:
        log_ratio (`torch.Tensor`):
            (B,) `log π_θ(y|x) - log π_ref(y|x)`; computed in float32 whatever its dtype.
        scores (`torch.Tensor`):
            (B,) scores. They meet the threshold in their own dtype, so float64 scores are labelled in float64.
        threshold (`torch.Tensor` or `float`):
            τ, one value or (B,), in the unit of the scores. A score equal to τ is positive.
        beta (`float`, *optional*, defaults to 1.0):
            β, the scale of the implicit reward.
        confidence_scale (`float`, *optional*, defaults to 5.0):
            c >= 0, in one over the unit of the scores.

    Returns:
        [`LossRecord`]: all (B,).

    Raises:
        ValueError: if `log_ratio` and `scores` are not both (B,).
    """
    if log_ratio.dim() != 1 or log_ratio.shape != scores.shape:
        raise ValueError(
            f"`log_ratio` and `scores` must both be (B,), got {tuple(log_ratio.shape)} and {tuple(scores.shape)}."
        )
    label = scores >= threshold
    weight = (1 + confidence_scale * (scores - threshold).abs()).float()
    implicit_reward = beta * log_ratio.float()
    loss = -weight * F.logsigmoid(torch.where(label, implicit_reward, -implicit_reward))
    return LossRecord(loss, implicit_reward, label, weight)
