"""Compare samples of one prompt with each other, so that the prompt's baseline τ*(x) cancels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .base import LossRecord, check_vectors


def _mates(groups: torch.Tensor) -> torch.Tensor:
    """(B, B) bool, true where two different rows are of one group."""
    same = groups[:, None] == groups[None, :]
    return same & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)


def pair_margins(scores: torch.Tensor, margin: torch.Tensor) -> torch.Tensor:
    """
    Return the (B, B) margins of [`pairwise_threshold_loss`]: `s_i - s_j`, and s_i - τ where i = j.

    Args:
        scores (`torch.Tensor`): (B,) s.
        margin (`torch.Tensor`): (B,) s - τ.
    """
    among = scores[:, None] - scores[None, :]
    return torch.where(torch.eye(len(margin), dtype=torch.bool, device=margin.device), margin, among)


def pairwise_threshold_loss(
    log_ratio: torch.Tensor,
    margins: torch.Tensor,
    groups: torch.Tensor,
    weights: torch.Tensor,
    *,
    beta: float = 1.0,
) -> LossRecord:
    """
    The threshold-guided loss (paper, Eq. 10) with each other sample of the group as the threshold in turn:
    `mean_{j≠i} -w_ij·log σ(±(ŝ_i - ŝ_j))`, with plus where `margins[i, j] >= 0`.

    The prompt's baseline cancels in each difference, as it does in a pair. With weights of 1 this is
    [`preference_loss`], except that samples with equal scores are drawn together.

    Args:
        log_ratio (`torch.Tensor`): (B,) log π_θ/π_ref.
        margins (`torch.Tensor`):
            (B, B), see [`pair_margins`]. A sample that is alone in its group uses its diagonal entry, s - τ.
        groups (`torch.Tensor`): (B,) integers; equal ones form a group.
        weights (`torch.Tensor`): (B, B) weights w_ij >= 0.
        beta (`float`, *optional*, defaults to 1.0): β.

    Returns:
        [`LossRecord`]: `implicit_reward` is the mean of the sample's differences, `label` is true where the mean of
        its margins is at least 0, `weight` is the mean of its weights. At a log-ratio of 0 the loss is `weight·ln 2`.

    Raises:
        ValueError: for shapes that do not fit.
    """
    check_vectors(log_ratio=log_ratio, groups=groups)
    size = len(log_ratio)
    if margins.shape != (size, size) or weights.shape != (size, size):
        raise ValueError(
            f"`margins` and `weights` must be ({size}, {size}), got {tuple(margins.shape)} and {tuple(weights.shape)}."
        )
    implicit_reward = beta * log_ratio.float()
    mates = _mates(groups)
    alone = torch.diag(mates.sum(1) == 0)
    differences = implicit_reward[:, None] - torch.where(mates, implicit_reward[None, :], 0.0)
    losses = weights.float() * F.softplus(torch.where(margins >= 0, -differences, differences))
    counted = mates | alone
    count = counted.sum(1)
    loss, centred, margin, weight = (
        torch.where(counted, each, 0.0).sum(1) / count for each in (losses, differences, margins, weights.float())
    )
    return LossRecord(loss, centred, margin >= 0, weight)


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
    pairs = _mates(groups) & (sign != 0)
    count = pairs.sum(1)
    losses = F.softplus(-sign.float() * (implicit_reward[:, None] - implicit_reward[None, :]))
    loss = torch.where(pairs, losses, 0.0).sum(1) / count.clamp(min=1)
    wins = torch.where(pairs, sign, 0.0).sum(1)
    return LossRecord(loss, implicit_reward, wins > 0, (count > 0).float())
