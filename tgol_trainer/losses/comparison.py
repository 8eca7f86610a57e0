"""Other losses on the same scored samples, for honest comparison; each one function."""

from __future__ import annotations

import math

import torch

from .base import LossRecord, check_vectors


def supervised_loss(error: torch.Tensor, margin: torch.Tensor, *, positives_only: bool = True) -> LossRecord:
    """
    Supervised fine-tuning on the denoising (or token) error: on positives alone (SFT), or on all (CSFT, where the
    prompt carries the label). There is no reference, so the implicit reward of the record is NaN.

    Args:
        error (`torch.Tensor`): (B,) the policy's error.
        margin (`torch.Tensor`): (B,) s - τ; 0 is positive.
        positives_only (`bool`, *optional*, defaults to `True`):
            Leave negatives out. They still count in the mean, so that a batch without positives gives 0.

    Returns:
        [`LossRecord`]: the loss is the error, 0 for a negative left out.
    """
    check_vectors(error=error, margin=margin)
    label = margin >= 0
    weight = label.float() if positives_only else torch.ones_like(error, dtype=torch.float32)
    return LossRecord(weight * error.float(), torch.full_like(error, math.nan, dtype=torch.float32), label, weight)


def kto_loss(
    log_ratio: torch.Tensor, margin: torch.Tensor, weight: torch.Tensor | None = None, *, beta: float = 1.0
) -> LossRecord:
    """
    Diffusion-KTO (arXiv 2404.04465) with the sigmoid utility: `w·(1 - σ(±(ŝ - Q)))`, plus for positives.

    Q = max(0, mean ŝ of the batch), without gradient, is the reference point. The mean is that of the micro-batch on
    this process, so accumulation and process count change it.

    Args:
        log_ratio (`torch.Tensor`): (B,) log π_θ/π_ref.
        margin (`torch.Tensor`): (B,) s - τ; 0 is positive.
        beta (`float`, *optional*, defaults to 1.0): β.
        weight (`torch.Tensor`, *optional*): (B,) weights; by default 1, as in the paper.

    Returns:
        [`LossRecord`]: at a log-ratio of 0 the loss is `w/2`.
    """
    check_vectors(log_ratio=log_ratio, margin=margin)
    label = margin >= 0
    implicit_reward = beta * log_ratio.float()
    reference_point = implicit_reward.detach().mean().clamp(min=0)
    gain = torch.where(label, implicit_reward - reference_point, reference_point - implicit_reward)
    weight = torch.ones_like(implicit_reward) if weight is None else weight.float()
    return LossRecord(weight * torch.sigmoid(-gain), implicit_reward, label, weight)


def regression_loss(
    log_ratio: torch.Tensor, margin: torch.Tensor, weight: torch.Tensor | None = None, *, beta: float = 1.0
) -> LossRecord:
    """
    Direct reward optimization (DRO, arXiv 2405.19107): `w·½·(ŝ - (s - τ))²`, with τ in place of its value function.

    Args:
        log_ratio (`torch.Tensor`): (B,) log π_θ/π_ref.
        margin (`torch.Tensor`): (B,) s - τ.
        beta (`float`, *optional*, defaults to 1.0): β, in the unit of the scores.
        weight (`torch.Tensor`, *optional*): (B,) weights; by default 1.

    Returns:
        [`LossRecord`]: at a log-ratio of 0 the loss is `w·½·(s - τ)²`.
    """
    check_vectors(log_ratio=log_ratio, margin=margin)
    implicit_reward = beta * log_ratio.float()
    weight = torch.ones_like(implicit_reward) if weight is None else weight.float()
    return LossRecord(weight * 0.5 * (implicit_reward - margin.float()) ** 2, implicit_reward, margin >= 0, weight)


def quantile_regression_loss(
    log_ratio: torch.Tensor, quantile: torch.Tensor, weight: torch.Tensor | None = None, *, beta: float = 1.0
) -> LossRecord:
    """
    Quantile reward policy optimization (QRPO, arXiv 2507.08068): `w·(q - β·log Z - ŝ)²`.

    Rewards replaced by their quantile q under the reference are uniform on [0, 1], so that
    `Z = E[exp(q/β)] = β·(exp(1/β) - 1)` is known. Here q is the quantile among the scores τ is estimated from.

    Args:
        log_ratio (`torch.Tensor`): (B,) log π_θ/π_ref.
        quantile (`torch.Tensor`): (B,) q in [0, 1].
        beta (`float`, *optional*, defaults to 1.0): β > 0.
        weight (`torch.Tensor`, *optional*): (B,) weights; by default 1.

    Returns:
        [`LossRecord`]: at a log-ratio of 0 the loss is `w·(q - β·log Z)²`; `label` is true where that target is at
        least 0.
    """
    check_vectors(log_ratio=log_ratio, quantile=quantile)
    implicit_reward = beta * log_ratio.float()
    # β·log(β·(exp(1/β) - 1)) as 1 + β·log(β·(1 - exp(-1/β))), which does not overflow for a small β
    target = quantile.float() - (1 + beta * math.log(beta * -math.expm1(-1 / beta)))
    weight = torch.ones_like(implicit_reward) if weight is None else weight.float()
    return LossRecord(weight * (target - implicit_reward) ** 2, implicit_reward, target >= 0, weight)


def nft_loss(
    positive_error: torch.Tensor,
    negative_error: torch.Tensor,
    log_ratio: torch.Tensor,
    margin: torch.Tensor,
    score_std: float,
    *,
    beta: float = 1.0,
    score_range: float = 1.0,
) -> LossRecord:
    """
    DiffusionNFT's forward-process loss (arXiv 2509.16117): `r·‖v⁺ - v‖² + (1 - r)·‖v⁻ - v‖²`.

    `r = ½ + ½·clip((s - τ)/(K·Z), -1, 1)`, and `v⁺ = (1 - b)·v_ref + b·v_θ`, `v⁻ = (1 + b)·v_ref - b·v_θ` are made by
    the caller, who knows the predictions.

    Args:
        positive_error (`torch.Tensor`): (B,) mean squared error of v⁺.
        negative_error (`torch.Tensor`): (B,) mean squared error of v⁻.
        log_ratio (`torch.Tensor`): (B,) log π_θ/π_ref, for the record.
        margin (`torch.Tensor`): (B,) s - τ.
        score_std (`float`): Z > 0, the standard deviation of the scores, in their unit.
        beta (`float`, *optional*, defaults to 1.0): β, for the record.
        score_range (`float`, *optional*, defaults to 1.0): K > 0; the authors' code has 5.

    Returns:
        [`LossRecord`]: at a log-ratio of 0 the loss is the reference's error; `weight` is r.
    """
    check_vectors(positive_error=positive_error, negative_error=negative_error, log_ratio=log_ratio, margin=margin)
    share = 0.5 + 0.5 * (margin.float() / (score_range * score_std)).clip(-1, 1)
    loss = share * positive_error.float() + (1 - share) * negative_error.float()
    return LossRecord(loss, beta * log_ratio.float(), margin >= 0, share)
