"""The paper's loss: push a sample up or down by the side of the threshold that its score lies on."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import LossRecord, check_vectors


def threshold_guided_loss(
    log_ratio: torch.Tensor,
    scores: torch.Tensor,
    threshold: torch.Tensor | float,
    *,
    beta: float = 1.0,
    confidence_scale: float = 5.0,
    weight: torch.Tensor | None = None,
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
        weight (`torch.Tensor`, *optional*):
            (B,) weights to use instead of `1 + c·|s - τ|`.

    Returns:
        [`LossRecord`]: all (B,).

    Raises:
        ValueError: if `log_ratio` and `scores` are not both (B,).
    """
    check_vectors(log_ratio=log_ratio, scores=scores)
    label = scores >= threshold
    if weight is None:
        weight = 1 + confidence_scale * (scores - threshold).abs()
    weight = weight.float()
    implicit_reward = beta * log_ratio.float()
    loss = -weight * F.logsigmoid(torch.where(label, implicit_reward, -implicit_reward))
    return LossRecord(loss, implicit_reward, label, weight)
