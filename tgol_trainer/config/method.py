"""The fields of `TGOLConfig` that say what is optimised: loss, threshold, weights, groups."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_type_hints

from tgol_trainer.thresholds import Weighting, check_combination, ordinal_offsets

logger = logging.getLogger(__name__)

LossType = Literal["tgol", "ordinal", "sft", "csft", "kto", "dro", "qrpo", "dpo", "nft"]
CONFIDENT_LOSSES = ("tgol", "ordinal")
"""Losses that confidence weights act on; the others stand as their papers have them."""


@dataclass
class MethodArguments:  # noqa: D101 - documented with TGOLConfig
    loss_type: LossType = field(
        default="tgol",
        metadata={
            "help": "'tgol' is the paper's loss (Eq. 10), 'ordinal' has several thresholds. For comparison: 'sft' "
            "(positives), 'csft' (all, label in the prompt), 'kto', 'dro', 'qrpo', 'dpo' (pairs of a group), 'nft'."
        },
    )
    beta: float = field(default=1.0, metadata={"help": "β, scale of the implicit reward (paper: 1)."})
    temperature: float = field(
        default=0.001,
        metadata={
            "help": "T, by which the denoising error is divided to give a log-likelihood (paper: 0.001). A larger T "
            "holds the policy less close to the reference. No effect on masked-token models."
        },
    )

    # Score
    score_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Two or more columns whose scores make one, instead of `score_column`."},
    )
    score_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each of `score_columns`, once standardised. None: 1 each."}
    )
    score_combination: Literal["sum", "min"] = field(
        default="sum",
        metadata={
            "help": "How `score_columns` are combined, each standardised by mean and standard deviation: 'sum' adds "
            "them by weight; 'min' takes the smallest margin to each column's `threshold_percentile`, so that a row "
            "is positive if all of its scores are and negative if any is."
        },
    )

    # Threshold
    threshold_strategy: Literal["global", "fixed", "group", "oracle", "running"] = field(
        default="global",
        metadata={
            "help": "Where τ comes from: a percentile of all scores (paper), `threshold`, one a group pooled towards "
            "the global one, the log-mean-exp of a prompt's reference samples, or the last scores of a stream."
        },
    )
    threshold_percentile: float = field(
        default=50.0,
        metadata={"help": "Percentile of the scores that becomes the threshold τ (paper: 50, the median)."},
    )
    threshold: float | None = field(
        default=None, metadata={"help": "A fixed τ, in normalised score units, instead of a percentile."}
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column whose equal values form a group, such as a domain or generator. None: the prompt."},
    )
    group_statistic: Literal["percentile", "mean"] = field(
        default="percentile", metadata={"help": "What a group's own threshold is: that percentile of it, or its mean."}
    )
    oracle_beta: float | None = field(
        default=None,
        metadata={
            "help": "β_r of the oracle threshold, in normalised score units. None: the standard deviation within "
            "prompts. Large values give the mean of a prompt's samples, small ones their maximum."
        },
    )
    reference_samples: bool = field(
        default=False,
        metadata={
            "help": "Say that the training images were made by the reference model, so that the oracle threshold may "
            "be estimated from them; otherwise it needs a proxy dataset of such images."
        },
    )
    threshold_window: int = field(
        default=1024, metadata={"help": "Scores that the running threshold looks back on, of each process's stream."}
    )
    threshold_update: Literal["once", "epoch"] = field(
        default="once",
        metadata={
            "help": "Estimate τ once, or again at each epoch. The latter only means something for streamed data or "
            "for a proxy set that is made anew after the reference moves."
        },
    )
    max_threshold_samples: int | None = field(
        default=None,
        metadata={"help": "Streams only: rows read in the first pass over the scores. None reads them all."},
    )
    score_normalization: Literal["none", "zscore", "robust"] = field(
        default="none",
        metadata={
            "help": "Standardise scores before τ and c act: by mean and standard deviation, or by median and "
            "interquartile range. 'none' is the paper's."
        },
    )
    dead_zone: float = field(
        default=0.0,
        metadata={"help": "Leave out training rows whose score is closer to τ than this, in normalised score units."},
    )
    ordinal_percentiles: list[float] = field(
        default_factory=lambda: [25.0, 50.0, 75.0],
        metadata={"help": "Percentiles of the scores that are the cut points of the ordinal loss, increasing."},
    )

    # Weights
    confidence_scale: float = field(
        default=5.0,
        metadata={"help": "c in the weight 1 + c·|s - τ| (paper: 5). Its effect depends on the unit of the scores."},
    )
    weight_form: Literal["linear", "none", "abs", "power", "clipped"] = field(
        default="linear",
        metadata={
            "help": "Weight of a sample at distance d from τ: 1 + c·d (paper), 1, d, 1 + c·d^weight_power, or "
            "min(1 + c·d, weight_limit)."
        },
    )
    weight_power: float = field(default=0.5, metadata={"help": "Exponent of the weight form 'power'."})
    weight_limit: float = field(default=2.0, metadata={"help": "Largest weight of the weight form 'clipped'."})
    normalize_weights: bool = field(
        default=False, metadata={"help": "Divide the weights by their mean over the training rows."}
    )
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Factor of the weights of positive samples, against an imbalance of labels."}
    )
    undesirable_weight: float = field(default=1.0, metadata={"help": "Factor of the weights of negative samples."})

    # Groups in a batch
    log_ratio_centering: Literal["none", "group", "pairs"] = field(
        default="none",
        metadata={
            "help": "'group' subtracts from log-ratio and score the mean of the other samples of the group in the "
            "batch, which cancels the prompt's baseline as a pair does, and loses the anchor to the reference. "
            "'pairs' compares with each of them in turn."
        },
    )
    centering_strength: float = field(
        default=1.0, metadata={"help": "Share of that mean which is subtracted, 0 to 1; below 1 an anchor stays."}
    )
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "Put this many images of a group side by side in each batch; must divide "
            "`per_device_train_batch_size`. None: rows in random order. Needed by 'dpo' and by centring."
        },
    )
    share_group_noise: bool = field(
        default=False,
        metadata={"help": "Give all samples of a group the same noise and time (or mask) at each step."},
    )

    # Rivals and reference
    csft_suffixes: list[str] = field(
        default_factory=lambda: [", high quality", ", low quality"],
        metadata={"help": "What 'csft' adds to the prompts of positives and of negatives; generate with the first."},
    )
    nft_mix: float = field(
        default=1.0, metadata={"help": "b of 'nft': how far v⁺ and v⁻ lie from the reference towards the policy."}
    )
    sync_ref_model: Literal["no", "epoch"] = field(
        default="no",
        metadata={
            "help": "'epoch' makes the policy the reference after each epoch (paper, Algorithm 1, line 15). Unlike "
            "TRL's flag of this name, which mixes weights every 512 steps."
        },
    )

    @property
    def weighting(self) -> Weighting:
        """Margins to weights, as the loss type takes them."""
        form = self.weight_form if self.loss_type in CONFIDENT_LOSSES else "none"
        return Weighting(
            form=form,
            scale=self.confidence_scale,
            power=self.weight_power,
            limit=self.weight_limit,
            desirable=self.desirable_weight,
            undesirable=self.undesirable_weight,
        )

    @property
    def uses_groups(self) -> bool:
        """Whether rows must carry the group they belong to."""
        return (
            self.threshold_strategy in ("group", "oracle")
            or self.comparing is not None
            or self.group_size is not None
            or self.share_group_noise
        )

    @property
    def comparing(self) -> str | None:
        """The setting, as written, that compares samples of a group within a batch; `None` where nothing does."""
        if self.loss_type == "dpo":
            return "`loss_type='dpo'`"
        return f"`log_ratio_centering={self.log_ratio_centering!r}`" if self.log_ratio_centering != "none" else None

    def check_method(self, batch_size: int) -> None:
        """
        Check the fields of this class, and fill in the strategy that a fixed threshold means.

        Args:
            batch_size (`int`):
                Rows of a micro-batch of one process.

        Raises:
            ValueError: for a value out of range, or fields that contradict each other.
        """
        if self.threshold is not None and self.threshold_strategy == "global":
            self.threshold_strategy = "fixed"
        check_choices(self, MethodArguments)
        positive = {"beta", "temperature", "weight_power", "nft_mix"}
        for name in (*positive, "confidence_scale", "dead_zone", "desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
                wanted = "larger than 0" if name in positive else "at least 0"
                raise ValueError(f"`{name}` must be {wanted} and finite, got {value}.")
        for name, low, high in (("threshold_percentile", 0, 100), ("centering_strength", 0, 1)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"`{name}` must be at least {low} and at most {high}, got {getattr(self, name)}.")
        for name, low in (
            ("max_threshold_samples", 1),
            ("threshold_window", 2),
            ("group_size", 2),
            ("weight_limit", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` must be at least {low}, got {value}.")
        ordinal_offsets(self.ordinal_percentiles)
        if len(self.csft_suffixes) != 2:
            raise ValueError(f"`csft_suffixes` must be two texts, got {self.csft_suffixes!r}.")
        weighted = self.weight_form != "linear" or self.normalize_weights
        if weighted and self.loss_type not in CONFIDENT_LOSSES:
            logger.warning(
                "`loss_type=%r` has no confidence weights: `weight_form` and `normalize_weights` have no effect.",
                self.loss_type,
            )
        by_class = (self.desirable_weight, self.undesirable_weight) != (1.0, 1.0)
        if by_class and self.loss_type in ("sft", "csft", "dpo", "nft"):
            logger.warning(
                "`loss_type=%r` takes no weights: `desirable_weight` and `undesirable_weight` have no effect.",
                self.loss_type,
            )
        self._check_columns()
        self._check_threshold()
        self._check_groups(batch_size)

    def _check_columns(self) -> None:
        check_combination(self.score_columns, self.score_weights, self.score_combination)
        if self.score_combination != "min":
            return
        clashes = {
            "threshold": self.threshold is not None,
            "threshold_strategy": self.threshold_strategy != "global",
            "threshold_update": self.threshold_update != "once",
            "score_normalization": self.score_normalization != "none",
            "log_ratio_centering": self.log_ratio_centering != "none",
            "loss_type": self.loss_type == "ordinal",
        }
        for name in (name for name, clash in clashes.items() if clash):
            raise ValueError(
                f"`{name}={getattr(self, name)!r}` and `score_combination='min'`, whose threshold is 0 where every "
                f"column reaches its `threshold_percentile`, cannot both decide on labels: leave `{name}` at its "
                "default, or use `score_combination='sum'`."
            )

    def _check_threshold(self) -> None:
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"`threshold` must be finite, got {self.threshold}.")
        if (self.threshold is not None) != (self.threshold_strategy == "fixed"):
            remedy = "leave it out" if self.threshold is not None else "give its value as `threshold`"
            raise ValueError(f"`threshold_strategy={self.threshold_strategy!r}` and `threshold`: {remedy}.")
        if self.threshold is not None and self.threshold_update == "epoch":
            raise ValueError("A fixed `threshold` has nothing to estimate: leave `threshold_update` at 'once'.")
        if self.threshold_strategy == "running" and self.threshold_update == "epoch":
            raise ValueError("`threshold_strategy='running'` follows the scores anyway: leave `threshold_update`.")
        if self.loss_type == "ordinal" and self.threshold_strategy != "global":
            raise ValueError(
                f"`loss_type='ordinal'` cuts at the `ordinal_percentiles` of all scores, which "
                f"`threshold_strategy={self.threshold_strategy!r}` and `threshold` do not change: leave them out."
            )
        if self.oracle_beta is not None and not (math.isfinite(self.oracle_beta) and self.oracle_beta > 0):
            raise ValueError(f"`oracle_beta` must be larger than 0 and finite, got {self.oracle_beta}.")
        if self.threshold_strategy == "group" and self.threshold_percentile in (0, 100):
            raise ValueError("`threshold_percentile` must lie between 0 and 100, both excluded, for groups.")

    def _check_groups(self, batch_size: int) -> None:
        if self.comparing and self.group_size is None:
            raise ValueError(
                f"{self.comparing} compares images of a prompt in one batch: set `group_size`, for example to 4."
            )
        if self.group_size is not None and batch_size % self.group_size:
            raise ValueError(
                f"`group_size` {self.group_size} must divide `per_device_train_batch_size`, which is {batch_size}."
            )
        accepted = {"none": None, "group": ("tgol", "kto", "dro"), "pairs": ("tgol",)}[self.log_ratio_centering]
        if accepted and self.loss_type not in accepted:
            raise ValueError(
                f"`log_ratio_centering={self.log_ratio_centering!r}` acts on log-ratios and margins, and is there for "
                f"the loss types {', '.join(map(repr, accepted))}; `loss_type` is {self.loss_type!r}."
            )


def check_choices(arguments: Any, owner: type) -> None:
    """
    Check the fields whose type is a `Literal`.

    Args:
        arguments (`Any`):
            A dataclass.
        owner (`type`):
            The class whose own annotations are checked.

    Raises:
        ValueError: for a value that is none of the choices.
    """
    hints = get_type_hints(owner)
    for name in owner.__annotations__:
        choices = get_args(hints[name])
        if choices and all(isinstance(choice, str) for choice in choices) and getattr(arguments, name) not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(arguments, name)!r}.")
