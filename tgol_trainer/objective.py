"""From what policy and reference say about a batch to its loss: one function a loss type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from tgol_trainer import losses, thresholds
from tgol_trainer.config import MethodArguments
from tgol_trainer.labels import Labelling
from tgol_trainer.losses import LossRecord


@dataclasses.dataclass(frozen=True)
class Scored:
    """
    A batch after both passes, all (B,).

    Args:
        log_ratio (`torch.Tensor`):
            float32 log π_θ/π_ref, with gradient.
        error (`torch.Tensor`):
            float32 error of the policy, with gradient.
        batch (`dict[str, torch.Tensor]`):
            Of [`data.Collator`]: `margin`, `score`, `group` and so on.
        mixed_error (`Callable[[float], torch.Tensor]`):
            The (B,) error of `v_ref + b·(v_θ - v_ref)`, for any b.
    """

    log_ratio: torch.Tensor
    error: torch.Tensor
    batch: dict[str, torch.Tensor]
    mixed_error: Callable[[float], torch.Tensor]


def training_loss(scored: Scored, args: MethodArguments, labelling: Labelling | None) -> LossRecord:
    """
    The loss of `args.loss_type` on a batch.

    With `log_ratio_centering="group"` and strength κ, the log-ratio is less κ times the mean of the group's others in
    the batch, and the margin `(1 - κ)·(s_i - τ) + κ·(s_i - mean_{j≠i} s_j)`; a sample that is alone keeps both.
    "pairs" does the same with each of the others by itself.

    Args:
        scored ([`Scored`]):
            The batch after both passes.
        args ([`MethodArguments`]):
            Loss type and its settings.
        labelling ([`data.Labelling`], *optional*):
            Weights and the spread of the scores; `None` without training data.

    Returns:
        [`losses.LossRecord`]: all (B,).
    """
    batch, beta = scored.batch, args.beta
    weighting, score_std = (labelling.weighting, labelling.score_std) if labelling else (args.weighting, 1.0)
    log_ratio, margin = scored.log_ratio, batch["margin"]
    if args.log_ratio_centering == "group":
        others, has = losses.group_mates_mean(log_ratio, batch["group"])
        among = losses.group_differences(batch["score"], batch["group"])
        log_ratio = log_ratio - args.centering_strength * others
        margin = torch.where(has, margin + args.centering_strength * (among - margin), margin)
    elif args.log_ratio_centering == "pairs":
        among = batch["score"][:, None] - batch["score"][None, :]
        margins = margin[:, None] + args.centering_strength * (among - margin[:, None])
        margins = torch.where(torch.eye(len(margin), dtype=torch.bool, device=margin.device), margin, margins)
        return losses.mutual_threshold_loss(
            log_ratio, margins, batch["group"], weighting(margins), beta=beta, strength=args.centering_strength
        )
    weight = weighting(margin)
    if args.loss_type == "tgol":
        return losses.threshold_guided_loss(log_ratio, margin, 0.0, beta=beta, weight=weight)
    if args.loss_type == "ordinal":
        margins, offsets = batch["cut_margins"], thresholds.ordinal_offsets(args.ordinal_percentiles)
        return losses.ordinal_loss(log_ratio, margins, offsets, weighting(margins), beta=beta)
    if args.loss_type == "kto":
        return losses.kto_loss(log_ratio, margin, beta=beta, weight=weight)
    if args.loss_type == "dro":
        return losses.regression_loss(log_ratio, margin, beta=beta, weight=weight)
    if args.loss_type == "qrpo":
        return losses.quantile_regression_loss(log_ratio, batch["quantile"], beta=beta, weight=weight)
    if args.loss_type == "dpo":
        return losses.preference_loss(log_ratio, batch["score"], batch["group"], beta=beta)
    if args.loss_type == "nft":
        towards, away = scored.mixed_error(args.nft_mix), scored.mixed_error(-args.nft_mix)
        return losses.nft_loss(towards, away, log_ratio, margin, score_std, beta=beta)
    return losses.supervised_loss(scored.error, log_ratio, margin, beta=beta, positives_only=args.loss_type == "sft")
