"""Compute the loss of a batch from what policy and reference say about it, and watch whether its temperature suits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from . import losses, thresholds
from .config import MethodArguments, TGOLConfig
from .likelihoods import Likelihood
from .losses import LossRecord
from .metrics import temperature_advice

logger = logging.getLogger(__name__)

SIGMOID_LOSSES = ("tgol", "tgol_pairs", "kto", "dpo")
"""Losses of a sigmoid of the implicit reward, which T must bring to about 1."""


@dataclasses.dataclass(frozen=True)
class ScoredBatch:
    """
    A batch after the passes of the networks, all (B,).

    Args:
        log_ratio (`torch.Tensor`): float32 log π_θ/π_ref, with gradient; NaN for losses without a reference.
        error (`torch.Tensor`): float32 error of the policy, with gradient.
        reference_error (`torch.Tensor`): float32 error of the reference on the same draw; NaN where it did not run.
        change (`torch.Tensor`): float32 distance of the two predictions; NaN where the reference's is not at hand.
        value (`torch.Tensor`, *optional*): float32 part of the advantage that the noised latents tell.
        batch (`dict[str, torch.Tensor]`): Batch of [`data.Collator`]: `score`, `margin`, `weight`, `group` and so on.
        mixed_error (`Callable[[float], torch.Tensor]`): Returns the (B,) error of `v_ref + b·(v_θ - v_ref)` for any b.
    """

    log_ratio: torch.Tensor
    error: torch.Tensor
    reference_error: torch.Tensor
    change: torch.Tensor
    value: torch.Tensor | None
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
            Standard deviation of the normalised scores, which 'tgol_anchored' and 'nft' divide by.

    Returns:
        [`losses.LossRecord`]: all (B,).
    """
    batch, beta, log_ratio = scored.batch, args.beta, scored.log_ratio
    margin, weight = batch["margin"], batch["weight"]
    if args.loss_type == "tgol_pairs":
        margins = losses.pair_margins(batch["score"], margin)
        return losses.pairwise_threshold_loss(log_ratio, margins, batch["group"], weighting(margins), beta=beta)
    if args.loss_type == "tgol":
        return losses.threshold_guided_loss(log_ratio, margin, weight, beta=beta)
    if args.loss_type == "tgol_anchored":
        errors = (scored.error, scored.reference_error, scored.change)
        return losses.anchored_loss(*errors, margin / score_std, anchor=args.anchor, value=scored.value)
    if args.loss_type == "kto":
        return losses.kto_loss(log_ratio, margin, weight, beta=beta)
    if args.loss_type == "dpo":
        return losses.preference_loss(log_ratio, batch["score"], batch["group"], beta=beta)
    if args.loss_type == "nft":
        towards, away = scored.mixed_error(args.nft_mix), scored.mixed_error(-args.nft_mix)
        return losses.nft_loss(towards, away, log_ratio, margin, score_std, beta=beta)
    return losses.supervised_loss(scored.error, margin, positives_only=args.loss_type == "sft")


class TemperatureWatch(TrainerCallback):
    """
    Warn once where T does not suit the model, by the implicit rewards that training logs.

    Args:
        likelihood ([`likelihoods.Likelihood`]): That of the model; nothing is said where T does not apply.
    """

    def __init__(self, likelihood: Likelihood) -> None:
        self.watching = likelihood.temperature_applies

    def on_log(
        self,
        args: TGOLConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: object,
    ) -> None:
        """Look at a log line of training."""
        if not self.watching or args.loss_type not in SIGMOID_LOSSES or logs is None or "loss" not in logs:
            return
        advice = temperature_advice(logs, args.temperature, last=state.global_step >= state.max_steps)
        if advice is not None:
            self.watching = False
            logger.warning(advice)
