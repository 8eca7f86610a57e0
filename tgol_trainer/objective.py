"""Compute the loss of a batch from what policy and reference say about it: one loss function per loss type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from . import losses, thresholds
from .config import MethodArguments
from .losses import LossRecord


@dataclasses.dataclass(frozen=True)
class ScoredBatch:
    """
    A batch after the passes of the networks, all (B,).

    Args:
        log_ratio (`torch.Tensor`): float32 log π_θ/π_ref, with gradient; NaN for losses without a reference.
        error (`torch.Tensor`): float32 error of the policy, with gradient.
        batch (`dict[str, torch.Tensor]`): Batch of [`data.Collator`]: `score`, `margin`, `weight`, `group` and so on.
        mixed_error (`Callable[[float], torch.Tensor]`): Returns the (B,) error of `v_ref + b·(v_θ - v_ref)` for any b.
    """

    log_ratio: torch.Tensor
    error: torch.Tensor
    batch: dict[str, torch.Tensor]
    mixed_error: Callable[[float], torch.Tensor]


def training_loss(
    scored: ScoredBatch, args: MethodArguments, weighting: thresholds.Weighting, score_std: float = 1.0
) -> LossRecord:
    """
    Compute the loss of `args.loss_type` on a batch.

    Args:
        scored ([`ScoredBatch`]): The batch after both passes.
        args ([`MethodArguments`]): Loss type and its settings.
        weighting ([`thresholds.Weighting`]): Weights of margins that only the batch knows: those within a group.
        score_std (`float`, *optional*, defaults to 1.0):
            Standard deviation of the normalised scores, which NFT divides by.

    Returns:
        [`losses.LossRecord`]: all (B,).
    """
    batch, beta, log_ratio = scored.batch, args.beta, scored.log_ratio
    margin, weight = batch["margin"], batch["weight"]
    if args.loss_type == "tgol_pairs":
        margins = losses.pair_margins(batch["score"], margin, args.centering_strength)
        return losses.pairwise_threshold_loss(
            log_ratio, margins, batch["group"], weighting(margins), beta=beta, strength=args.centering_strength
        )
    if args.log_ratio_centering == "group":
        log_ratio, margin = losses.centred_in_group(
            log_ratio, margin, batch["score"], batch["group"], args.centering_strength
        )
        weight = weighting(margin)
    if args.loss_type == "tgol":
        return losses.threshold_guided_loss(log_ratio, margin, weight, beta=beta)
    if args.loss_type == "ordinal":
        offsets = thresholds.ordinal_offsets(args.ordinal_percentiles)
        return losses.ordinal_loss(log_ratio, margin, offsets, weight, beta=beta)
    if args.loss_type == "kto":
        return losses.kto_loss(log_ratio, margin, weight, beta=beta)
    if args.loss_type == "dro":
        return losses.regression_loss(log_ratio, margin, weight, beta=beta)
    if args.loss_type == "qrpo":
        return losses.quantile_regression_loss(log_ratio, batch["quantile"], weight, beta=beta)
    if args.loss_type == "dpo":
        return losses.preference_loss(log_ratio, batch["score"], batch["group"], beta=beta)
    if args.loss_type == "nft":
        towards, away = scored.mixed_error(args.nft_mix), scored.mixed_error(-args.nft_mix)
        return losses.nft_loss(towards, away, log_ratio, margin, score_std, beta=beta)
    return losses.supervised_loss(scored.error, margin, positives_only=args.loss_type == "sft")
