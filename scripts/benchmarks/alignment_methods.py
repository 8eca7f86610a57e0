"""The methods of the alignment benchmark: how a batch becomes a loss, and the settings that are searched for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from tgol_trainer import losses, thresholds
from tgol_trainer.config import MethodArguments
from tgol_trainer.objective import ScoredBatch, training_loss

GROUP = 4
"""Images of one prompt side by side in a batch, for every method."""
CSFT_SUFFIXES = [", high quality", ", low quality"]


@dataclasses.dataclass(frozen=True)
class Passed:
    """
    A batch after both passes, all (B,) but the predictions.

    Args:
        prediction (`torch.Tensor`): (B, C, h, w) of the policy, with gradient.
        reference (`torch.Tensor`): (B, C, h, w) of the reference.
        target (`torch.Tensor`): (B, C, h, w).
        rows (`dict[str, torch.Tensor]`): `score`, `margin`, `weight` and `group`.
        score_std (`float`): Standard deviation of the scores.
        weighting ([`thresholds.Weighting`]): Margins to weights.
        scale (`torch.Tensor`): √(ē(t)·ē), the reference's mean error at the time of a draw and at all times.
        value (`torch.Tensor`): (B,) what the noised latents tell of the advantage; 0 where the method has no baseline.
        draws (`int`): Draws of an image, side by side; errors are their means, and `rows` has each image once.
    """

    prediction: torch.Tensor
    reference: torch.Tensor
    target: torch.Tensor
    rows: dict[str, torch.Tensor]
    score_std: float
    weighting: thresholds.Weighting
    scale: torch.Tensor
    value: torch.Tensor
    draws: int = 1

    def error_of(self, prediction: torch.Tensor) -> torch.Tensor:
        """Mean squared error of a prediction."""
        return (prediction - self.target).square().flatten(1).mean(1)

    @property
    def errors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Error of the policy, error of the reference, and the mean squared difference of their predictions."""
        change = (self.prediction - self.reference).square().flatten(1).mean(1)
        each = (self.error_of(self.prediction), self.error_of(self.reference), change)
        error, reference_error, change = (values.unflatten(0, (-1, self.draws)).mean(1) for values in each)
        return error, reference_error, change

    @property
    def advantage(self) -> torch.Tensor:
        """(s - τ)/sd."""
        return self.rows["margin"] / self.score_std


Loss = Callable[[Passed, MethodArguments, float], torch.Tensor]
"""A batch, the fields of `TGOLConfig` and the strength that is searched, to (B,) losses."""


@dataclasses.dataclass(frozen=True)
class Method:
    """
    A method of the benchmark.

    Args:
        loss (`Callable`): The loss of a batch.
        strengths (`tuple[float, ...]`): Settings that are tried on the tuning seed: T, b, λ or what the loss has.
        fields (`dict[str, Any]`): Fields of `TGOLConfig` that make its labels.
        shared (`bool`): Whether the images of a prompt share noise and time in a batch.
        rival (`bool`): Whether it is one of the methods that ours are compared with.
        suffixed (`bool`): Whether the label stands in the prompt.
        draws (`int`): Noised versions of an image in a batch, one in each of as many parts of the times.
    """

    loss: Loss
    strengths: tuple[float, ...]
    fields: dict[str, Any]
    shared: bool = False
    rival: bool = False
    suffixed: bool = False
    draws: int = 1


def of_library(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """The loss as `TGOLTrainer` computes it; the strength is T, or λ of 'tgol_anchored'."""
    error, reference_error, change = passed.errors
    log_ratio = (reference_error - error) / strength
    scored = ScoredBatch(log_ratio, error, reference_error, change, passed.value, passed.rows, lambda share: error)
    return training_loss(scored, args, passed.weighting, passed.score_std).loss


def supervised(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """Supervised fine-tuning; what is searched is the percentile of the threshold, which the labels have."""
    positives_only = args.loss_type == "sft"
    error = passed.error_of(passed.prediction)
    return losses.supervised_loss(error, passed.rows["margin"], positives_only=positives_only).loss


def nft(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """
    DiffusionNFT with the normalisation of its authors' code; the strength is b.

    Scores are clipped at five standard deviations, errors are divided by their mean absolute value without gradient,
    the loss by b, and 1e-4 times the squared change holds the policy. The errors here are those of the predicted
    noise; theirs are of the clean latents of a flow.
    """
    divided = []
    for sign in (strength, -strength):
        mixed = torch.lerp(passed.reference, passed.prediction, sign)
        size = (mixed - passed.target).abs().flatten(1).mean(1).detach()
        divided.append(passed.error_of(mixed) / size)
    log_ratio = torch.zeros_like(divided[0])
    loss = losses.nft_loss(*divided, log_ratio, passed.rows["margin"], passed.score_std, score_range=5.0).loss
    return loss / strength + 1e-4 * passed.errors[2]


def dspo(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """DSPO on the pairs of a prompt; the strength is B."""
    return losses.dspo_loss(*passed.errors, passed.rows["score"], passed.rows["group"], strength=strength).loss


def unevenly(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """'tgol_anchored' without the division by the root of the reference's error; the strength is λ."""
    return losses.anchored_loss(*passed.errors, passed.advantage, anchor=strength).loss * passed.errors[1].sqrt()


def anchored_evenly(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """'tgol_anchored' with the reference's mean error at the time of a draw in place of its error on that draw."""
    return unevenly(passed, args, strength) / passed.scale


def anchored_clipped(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """'tgol_anchored' with the advantage clipped at two standard deviations; the strength is λ."""
    return losses.anchored_loss(*passed.errors, passed.advantage.clamp(-2.0, 2.0), anchor=strength).loss


def most_evenly(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """'tgol_anchored' divided by the reference's error instead of its root."""
    return unevenly(passed, args, strength) / passed.errors[1]


def tilted(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """
    Regression on the optimum under a KL penalty from samples of the reference: `2(w - 1)⟨e, D⟩ + w|D|²`.

    w is `exp((s - τ*)/β_r)`, at most 5; the strength is β_r in standard deviations. With e and D as in
    `losses.anchored_loss`, the error is `2⟨e, D⟩ + |D|²` above the reference's.
    """
    error, reference_error, change = passed.errors
    tilt = (passed.rows["margin"] / strength).exp().clamp(max=5.0)
    return (tilt - 1) * (error - reference_error) + change


def symmetric(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """Eq. 10 on `-2⟨e, D⟩/T`, with 0.1/T times the squared change as anchor; the strength is T."""
    error, reference_error, change = passed.errors
    log_ratio = (reference_error - error + change) / strength
    loss = losses.threshold_guided_loss(log_ratio, passed.rows["margin"], passed.rows["weight"]).loss
    return loss + 0.1 / strength * change


def calibrated(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """Eq. 10 with errors in units of the square root of the reference's error at that time; the strength is T."""
    error, reference_error, _ = passed.errors
    log_ratio = (reference_error - error) / (strength * passed.scale)
    return losses.threshold_guided_loss(log_ratio, passed.rows["margin"], passed.rows["weight"]).loss


def relative(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """Eq. 10 with the log-ratio of fitted variances; the strength is T."""
    error, reference_error, _ = passed.errors
    log_ratio = (reference_error.log() - error.log()) / strength
    return losses.threshold_guided_loss(log_ratio, passed.rows["margin"], passed.rows["weight"]).loss


def soft(passed: Passed, args: MethodArguments, strength: float) -> torch.Tensor:
    """Eq. 10 with the label `σ((s - τ)/sd)` instead of 0 or 1, and w = 1; the strength is T."""
    error, reference_error, _ = passed.errors
    log_ratio = (reference_error - error) / strength
    return torch.nn.functional.binary_cross_entropy_with_logits(
        log_ratio, passed.advantage.sigmoid(), reduction="none"
    )


MEAN = {"threshold_strategy": "group", "group_statistic": "mean", "score_normalization": "zscore"}
DISTANCE = {**MEAN, "weight_form": "abs"}
ANCHORED = {**MEAN, "loss_type": "tgol_anchored"}
T = (0.002, 0.004, 0.008, 0.016)
VALUED = {**ANCHORED, "value_baseline": True}
ANCHORS = (0.05, 0.1, 0.15, 0.25, 0.5, 1.5)
B = (0.001, 0.01, 0.05, 0.2, 1.0, 5.0, 20.0)
ORACLE = {"threshold_strategy": "oracle", "group_statistic": "percentile"}
METHODS: dict[str, Method] = {
    "tgo": Method(of_library, (0.001, 0.004, 0.016, 0.064), {}),
    "tgo, w=d": Method(of_library, (0.001, *T, 0.032), DISTANCE),
    "pairs, w=d": Method(
        of_library,
        (0.00025, 0.0005, 0.001, *T),
        {**DISTANCE, "loss_type": "tgol_pairs", "group_size": GROUP},
        shared=True,
    ),
    "anchored": Method(of_library, ANCHORS, ANCHORED),
    "anchored, value": Method(of_library, (0.1, 0.15, 0.25, 0.5, 1.0), VALUED),
    "anchored, 4 draws": Method(of_library, ANCHORS, ANCHORED, draws=4),
    "tgo, w=d, 4 draws": Method(of_library, T, DISTANCE, draws=4),
    "anchored, clipped": Method(anchored_clipped, ANCHORS, ANCHORED),
    "anchored, most even": Method(most_evenly, ANCHORS, ANCHORED),
    "anchored, even": Method(anchored_evenly, ANCHORS, ANCHORED),
    "anchored, even, shared noise": Method(anchored_evenly, ANCHORS, ANCHORED, shared=True),
    "tilted": Method(tilted, (0.5, 1.0, 2.0, 4.0), {"threshold_strategy": "oracle", "score_normalization": "zscore"}),
    "symmetric": Method(symmetric, T, DISTANCE),
    "calibrated": Method(calibrated, (0.05, 0.1, 0.2, 0.4), DISTANCE),
    "relative": Method(relative, (0.1, 0.2, 0.4, 0.8), DISTANCE),
    "soft": Method(soft, T, MEAN),
    "tgo, w=1": Method(of_library, T, {**MEAN, "weight_form": "none"}),
    "tgo, w=1+5d": Method(of_library, T, MEAN),
    "tgo, w=d, oracle": Method(of_library, T, {**DISTANCE, **ORACLE}),
    "dpo": Method(
        of_library,
        (0.00025, 0.0005, 0.001, *T),
        {"loss_type": "dpo", "group_size": GROUP},
        shared=True,
        rival=True,
    ),
    "kto": Method(of_library, (0.0005, 0.001, *T), {"loss_type": "kto", **MEAN}, rival=True),
    "nft": Method(nft, (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0), MEAN, rival=True),
    "dspo": Method(dspo, B, {"loss_type": "dpo", "group_size": GROUP}, shared=True, rival=True),
    "sft": Method(supervised, (50.0, 65.0, 80.0, 90.0, 95.0, 97.5), {"loss_type": "sft"}, rival=True),
    "csft": Method(supervised, (35.0, 50.0, 65.0, 80.0, 90.0, 95.0), {"loss_type": "csft"}, rival=True, suffixed=True),
}
"""Name of a method to what it does. Not every strength was run for every score: the rows say which."""


def arguments(method: Method, strength: float) -> MethodArguments:
    """Return the fields of `TGOLConfig` that a run's labels are made by."""
    fields = dict(method.fields)
    if fields.get("loss_type") in ("sft", "csft"):
        fields |= {"threshold_strategy": "group", "threshold_percentile": strength}
    if fields.get("loss_type") == "tgol_anchored":
        fields["anchor"] = strength
    if fields.get("threshold_strategy") == "oracle":
        fields["reference_samples"] = True
    if method.loss is tilted:
        fields["oracle_beta"] = strength
    return MethodArguments(**fields)
