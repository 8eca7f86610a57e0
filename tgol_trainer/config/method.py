"""The fields of `TGOLConfig` that say what is optimised: loss, score, threshold, weights, groups, reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, get_args, get_type_hints

from tgol_trainer.thresholds import Weighting, check_combination

LossType = Literal["tgol", "tgol_anchored", "tgol_pairs", "sft", "csft", "kto", "dpo", "nft"]
CONFIDENT_LOSSES = ("tgol", "tgol_pairs")
"""Losses that confidence weights act on; the others stand as their papers have them."""
_UNWEIGHTED_LOSSES = ("tgol_anchored", "sft", "csft", "dpo", "nft")


@dataclass
class MethodArguments:  # noqa: D101 - documented with TGOLConfig
    loss_type: LossType = field(
        default="tgol",
        metadata={
            "help": "'tgol' is the paper's loss (Eq. 10); 'tgol_anchored' is linear in the score and holds the policy "
            "by its distance from the reference; 'tgol_pairs' compares the images of a prompt. For comparison: 'sft', "
            "'csft', 'kto', 'dpo', 'nft' (docs/losses.md)."
        },
    )
    beta: float = field(default=1.0, metadata={"help": "β, the scale of the implicit reward (paper: 1)."})
    temperature: float = field(
        default=0.001,
        metadata={
            "help": "T. The denoising error divided by T is the negative log-likelihood (paper: 0.001). A larger T "
            "lets the policy move further from the reference. Masked-token models do not use it."
        },
    )

    # Score
    score_columns: list[str] | None = field(
        default=None,
        metadata={"help": "Two or more columns that are combined to one score. Set it instead of `score_column`."},
    )
    score_weights: list[float] | None = field(
        default=None, metadata={"help": "One weight per entry of `score_columns`, applied after standardising."}
    )
    score_combination: Literal["sum", "min"] = field(
        default="sum",
        metadata={
            "help": "'sum' adds the standardised `score_columns` by weight. 'min' labels a row positive only if every "
            "column reaches its own `threshold_percentile`."
        },
    )

    # Threshold
    threshold_strategy: Literal["global", "group", "oracle", "running"] = field(
        default="global",
        metadata={
            "help": "Source of τ. 'global': a percentile of all scores (paper). 'group': one τ per group, pooled "
            "towards the global τ. 'oracle': the log-mean-exp of a prompt's reference samples. 'running': a "
            "percentile of the last scores of a stream."
        },
    )
    threshold_percentile: float = field(
        default=50.0,
        metadata={"help": "Percentile of the scores that becomes the threshold τ (paper: 50, the median)."},
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "help": "A fixed τ instead of one from the scores, in raw units unless `score_normalization` is set."
        },
    )
    group_column: str | None = field(
        default=None,
        metadata={"help": "Column whose equal values form a group, such as a domain. None: rows of one prompt."},
    )
    group_statistic: Literal["percentile", "mean"] = field(
        default="percentile",
        metadata={"help": "A group's own threshold: the `threshold_percentile` of its scores, or their mean."},
    )
    oracle_beta: float | None = field(
        default=None,
        metadata={
            "help": "β_r of the oracle threshold, in raw units unless `score_normalization` is set. Large values "
            "approach the mean of a prompt's samples, small ones the maximum. None: the standard deviation within "
            "prompts."
        },
    )
    reference_samples: bool = field(
        default=False,
        metadata={
            "help": "Set to true if the reference model made the training images. The oracle threshold can then be "
            "estimated from them; otherwise it needs a proxy dataset of such images."
        },
    )
    threshold_window: int = field(
        default=1024, metadata={"help": "Number of last scores, per process and worker, in the running threshold."}
    )
    threshold_update: Literal["once", "epoch"] = field(
        default="once",
        metadata={
            "help": "Estimate τ once, or again at each epoch. Use 'epoch' for streamed data, or for a proxy set that "
            "is made anew after the reference moves."
        },
    )
    max_threshold_samples: int | None = field(
        default=None,
        metadata={"help": "Rows of a stream to read for the threshold before training starts. None: all rows."},
    )
    score_normalization: Literal["none", "zscore", "robust"] = field(
        default="none",
        metadata={
            "help": "Standardise scores before τ and c act. 'zscore': by mean and standard deviation. 'robust': by "
            "median and interquartile range. 'none': raw scores (paper)."
        },
    )
    dead_zone: float = field(
        default=0.0,
        metadata={"help": "Leave out rows with |s - τ| below this, in raw units unless `score_normalization` is set."},
    )

    # Weights
    confidence_scale: float = field(
        default=5.0,
        metadata={"help": "c in the weight 1 + c·|s - τ| (paper: 5). Its effect depends on the unit of the scores."},
    )
    weight_form: Literal["linear", "none", "abs"] = field(
        default="linear",
        metadata={"help": "Weight at distance d = |s - τ|: 'linear' 1 + c·d (paper), 'none' 1, 'abs' d."},
    )
    normalize_weights: bool = field(
        default=False, metadata={"help": "Divide the weights by their mean over the training rows."}
    )
    desirable_weight: float = field(
        default=1.0, metadata={"help": "Factor on the weights of positive samples. Use it if labels are imbalanced."}
    )
    undesirable_weight: float = field(default=1.0, metadata={"help": "Factor on the weights of negative samples."})

    # Groups in a batch
    group_size: int | None = field(
        default=None,
        metadata={
            "help": "Images of one group side by side in a batch. It must divide `per_device_train_batch_size`. "
            "The losses 'dpo' and 'tgol_pairs' need it. None: rows in random order."
        },
    )
    share_group_noise: bool = field(
        default=False,
        metadata={"help": "Give all images of a group the same noise and time (or mask) at each step."},
    )

    # Settings of other losses, and the reference
    anchor: float = field(
        default=0.25,
        metadata={
            "help": "λ of the loss 'tgol_anchored': how much the squared distance from the reference costs. A "
            "larger λ holds the policy closer."
        },
    )
    value_baseline: bool = field(
        default=False,
        metadata={
            "help": "Count advantages of 'tgol_anchored' from what noised latents tell of the score, which lowers "
            "the noise of the gradient. Fitted before the first step. Streams and token models are refused."
        },
    )
    csft_suffixes: list[str] = field(
        default_factory=lambda: [", high quality", ", low quality"],
        metadata={
            "help": "Texts that 'csft' adds to the prompts of positives and negatives. Generate with the first."
        },
    )
    nft_mix: float = field(
        default=1.0, metadata={"help": "b of the loss 'nft': v⁺ and v⁻ are v_ref ± b·(v - v_ref), see docs/losses.md."}
    )
    reference_update: Literal["never", "epoch"] = field(
        default="never",
        metadata={"help": "'epoch' makes the policy the reference after each epoch (paper, Algorithm 1, line 15)."},
    )
    precompute_ref_log_probs: bool = field(
        default=False,
        metadata={
            "help": "Compute the reference's errors before training, on `num_ref_draws` fixed draws of noise and time "
            "per image. A step then needs one forward pass."
        },
    )
    target_drift: float | None = field(
        default=None,
        metadata={
            "help": "Multiply the trained adapter by the number at which its `drift` is this. None: as trained."
        },
    )
    num_ref_draws: int = field(
        default=4,
        metadata={"help": "Fixed draws per image. Passes over the data take them in turn, from the first again."},
    )

    @property
    def strategy(self) -> Literal["global", "fixed", "group", "oracle", "running"]:
        """`threshold_strategy`, or `"fixed"` where `threshold` is given."""
        return "fixed" if self.threshold is not None else self.threshold_strategy

    @property
    def weighting(self) -> Weighting:
        """Margins to weights, as the loss type takes them."""
        form = self.weight_form if self.loss_type in CONFIDENT_LOSSES else "none"
        if self.loss_type == "tgol_anchored":  # by itself: the loss takes the margin, and reports its size
            form = "abs"
        return Weighting(
            form=form,
            scale=self.confidence_scale,
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
    def needs_reference(self) -> bool:
        """Whether the loss compares policy and reference."""
        return self.loss_type not in ("sft", "csft")

    @property
    def comparing(self) -> str | None:
        """The setting, as written, that compares samples of a group within a batch; `None` where nothing does."""
        return f"`loss_type={self.loss_type!r}`" if self.loss_type in ("dpo", "tgol_pairs") else None

    def check_method(self, batch_size: int) -> None:
        """
        Check the fields of this class.

        Args:
            batch_size (`int`): Rows of a micro-batch of one process.

        Raises:
            ValueError: for a value out of range, fields that contradict each other, or a field that has no effect.
        """
        check_choices(self, MethodArguments)
        positive = {"beta", "temperature", "anchor", "nft_mix"}
        for name in (*positive, "confidence_scale", "dead_zone", "desirable_weight", "undesirable_weight"):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0 or (name in positive and value == 0):
                wanted = "larger than 0" if name in positive else "at least 0"
                raise ValueError(f"`{name}` must be {wanted} and finite, got {value}.")
        if not 0 <= self.threshold_percentile <= 100:
            raise ValueError(
                f"`threshold_percentile` must be at least 0 and at most 100, got {self.threshold_percentile}."
            )
        for name, low in (
            ("max_threshold_samples", 1),
            ("threshold_window", 2),
            ("group_size", 2),
            ("num_ref_draws", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"`{name}` must be at least {low}, got {value}.")
        if len(self.csft_suffixes) != 2:
            raise ValueError(f"`csft_suffixes` must be two texts, got {self.csft_suffixes!r}.")
        self._check_columns()
        self._check_threshold()
        self._check_groups(batch_size)
        self._check_reference()
        self._check_effects()

    def _check_columns(self) -> None:
        check_combination(self.score_columns, self.score_weights, self.score_combination)
        if self.score_combination != "min":
            return
        clashes = {
            "threshold": self.threshold is not None,
            "threshold_strategy": self.threshold_strategy != "global",
            "threshold_update": self.threshold_update != "once",
            "score_normalization": self.score_normalization != "none",
            "loss_type": self.loss_type == "tgol_pairs",
        }
        for name in (name for name, clash in clashes.items() if clash):
            raise ValueError(
                f"`{name}={getattr(self, name)!r}` and `score_combination='min'`, whose threshold is 0 where every "
                f"column reaches its `threshold_percentile`, cannot both decide on labels: leave `{name}` at its "
                "default, or use `score_combination='sum'`."
            )

    def _check_threshold(self) -> None:
        if self.threshold is not None:
            if not math.isfinite(self.threshold):
                raise ValueError(f"`threshold` must be finite, got {self.threshold}.")
            if self.threshold_strategy != "global":
                raise ValueError(
                    f"`threshold_strategy={self.threshold_strategy!r}` and `threshold` both set τ: leave one out."
                )
            if self.threshold_update == "epoch":
                raise ValueError("A fixed `threshold` has nothing to estimate: leave `threshold_update` at 'once'.")
        if self.threshold_strategy == "running" and self.threshold_update == "epoch":
            raise ValueError("`threshold_strategy='running'` follows the scores anyway: leave `threshold_update`.")
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

    def _check_reference(self) -> None:
        if self.target_drift is not None and not (math.isfinite(self.target_drift) and self.target_drift > 0):
            raise ValueError(f"`target_drift` must be larger than 0 and finite, got {self.target_drift}.")
        if not self.precompute_ref_log_probs:
            return
        if self.reference_update == "epoch":
            raise ValueError(
                "`precompute_ref_log_probs` computes the reference's errors once, and `reference_update='epoch'` "
                "makes a new reference after each epoch: leave one out."
            )
        if self.loss_type in ("tgol_anchored", "nft"):
            raise ValueError(
                f"`precompute_ref_log_probs` keeps the reference's errors, and `loss_type={self.loss_type!r}` "
                "compares its outputs with the policy's: leave it False."
            )

    def _check_effects(self) -> None:
        """Refuse fields that are set and have no effect beside the others."""
        defaults = {item.name: default_of(item) for item in fields(MethodArguments)}
        for name, (acts, condition) in _ACTS_WITH.items():
            if getattr(self, name) != defaults[name] and not acts(self):
                raise ValueError(
                    f"`{name}={getattr(self, name)!r}` has no effect here: it acts only {condition}. Leave it "
                    f"at its default, {defaults[name]!r}, or change the other setting."
                )


_ACTS_WITH: dict[str, tuple[Callable[[MethodArguments], bool], str]] = {
    "threshold_percentile": (
        lambda args: args.threshold is None,
        "without a fixed `threshold`",
    ),
    "group_column": (lambda args: args.uses_groups, "with group thresholds, `group_size` or `share_group_noise`"),
    "group_statistic": (lambda args: args.threshold_strategy == "group", "with `threshold_strategy='group'`"),
    "oracle_beta": (lambda args: args.threshold_strategy == "oracle", "with `threshold_strategy='oracle'`"),
    "reference_samples": (lambda args: args.threshold_strategy == "oracle", "with `threshold_strategy='oracle'`"),
    "threshold_window": (lambda args: args.threshold_strategy == "running", "with `threshold_strategy='running'`"),
    "weight_form": (lambda args: args.loss_type in CONFIDENT_LOSSES, f"with the loss types {CONFIDENT_LOSSES}"),
    "normalize_weights": (
        lambda args: args.loss_type == "tgol",
        "with `loss_type='tgol'`: weights of compared images are known only in their batch",
    ),
    "confidence_scale": (
        lambda args: args.weighting.form == "linear",
        f"with the loss types {CONFIDENT_LOSSES} and `weight_form='linear'`",
    ),
    "desirable_weight": (
        lambda args: args.loss_type not in _UNWEIGHTED_LOSSES,
        f"with other loss types than {_UNWEIGHTED_LOSSES}",
    ),
    "undesirable_weight": (
        lambda args: args.loss_type not in _UNWEIGHTED_LOSSES,
        f"with other loss types than {_UNWEIGHTED_LOSSES}",
    ),
    "reference_update": (lambda args: args.needs_reference, "with other loss types than 'sft' and 'csft'"),
    "precompute_ref_log_probs": (lambda args: args.needs_reference, "with other loss types than 'sft' and 'csft'"),
    "target_drift": (
        lambda args: args.needs_reference and not args.precompute_ref_log_probs,
        "with other loss types than 'sft' and 'csft', and without `precompute_ref_log_probs`",
    ),
    "num_ref_draws": (lambda args: args.precompute_ref_log_probs, "with `precompute_ref_log_probs=True`"),
    "csft_suffixes": (lambda args: args.loss_type == "csft", "with `loss_type='csft'`"),
    "anchor": (lambda args: args.loss_type == "tgol_anchored", "with `loss_type='tgol_anchored'`"),
    "value_baseline": (lambda args: args.loss_type == "tgol_anchored", "with `loss_type='tgol_anchored'`"),
    "nft_mix": (lambda args: args.loss_type == "nft", "with `loss_type='nft'`"),
}
"""Fields that act only under a condition: the condition, and how a message says it."""


def default_of(item: Any) -> Any:
    """Return the default value of a dataclass field."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def check_choices(arguments: Any, owner: type) -> None:
    """
    Check the fields whose type is a `Literal`.

    Args:
        arguments (`Any`): A dataclass.
        owner (`type`): The class whose own annotations are checked.

    Raises:
        ValueError: for a value that is not among the choices.
    """
    hints = get_type_hints(owner)
    for name in owner.__annotations__:
        choices = get_args(hints[name])
        if choices and all(isinstance(choice, str) for choice in choices) and getattr(arguments, name) not in choices:
            raise ValueError(f"`{name}` must be one of {', '.join(choices)}, got {getattr(arguments, name)!r}.")
