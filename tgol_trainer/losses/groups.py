"""Compare samples of one prompt with each other, so that the prompt's baseline τ*(x) cancels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import LossRecord, check_vectors


def preference_loss(
    log_ratio: torch.Tensor, scores: torch.Tensor, groups: torch.Tensor, *, beta: float = 1.0
) -> LossRecord:
    """
    Diffusion-DPO (arXiv 2311.12908) on the pairs that scores make within a group: -log σ(β·(log-ratio of the winner -
    log-ratio of the loser)).

    The loss of an example is the mean over its pairs with a different score; a pair of two so gives its DPO loss twice
    and the mean over both rows is DPO's. An example without such a pair gives 0. At a log-ratio of 0 the loss is ln 2
    where there are pairs. `β/T` here is the product `β·T·ω(λ)` of that paper, for a constant ω.

    Args:
        log_ratio (`torch.Tensor`): (B,) log π_θ/π_ref.
        scores (`torch.Tensor`): (B,) scores; a difference of 0 makes no pair.
        groups (`torch.Tensor`): (B,) integers; equal ones form a group.
        beta (`float`, *optional*, defaults to 1.0): β.

    Returns:
        [`LossRecord`]: `label` is true where the score is above the mean of its opponents', `weight` 1 where the
        example has a pair, else 0.
    """
    check_vectors(log_ratio=log_ratio, scores=scores, groups=groups)
    implicit_reward = beta * log_ratio.float()
    sign = torch.sign(scores[:, None] - scores[None, :])
    pairs = (groups[:, None] == groups[None, :]) & (sign != 0)
    count = pairs.sum(1)
    losses = F.softplus(-sign.float() * (implicit_reward[:, None] - implicit_reward[None, :]))
    loss = torch.where(pairs, losses, 0.0).sum(1) / count.clamp(min=1)
    wins = torch.where(pairs, sign, 0.0).sum(1)
    return LossRecord(loss, implicit_reward, wins > 0, (count > 0).float())
