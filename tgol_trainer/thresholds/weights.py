"""Compute confidence weights, which grow with the distance of a score from the threshold, and summarise them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import numpy as np

if TYPE_CHECKING:
    import torch

Values = TypeVar("Values", "np.ndarray", "torch.Tensor")
WeightForm = Literal["linear", "none", "abs"]
WEIGHT_FORMS: tuple[str, ...] = get_args(WeightForm)


def confidence_weights(margin: Values, *, form: WeightForm = "linear", scale: float = 5.0) -> Values:
    """
    Return the confidence weights of examples with margins s - τ; `d = |s - τ|`.

    Args:
        margin (`numpy.ndarray` or `torch.Tensor`): (B,) s - τ.
        form (`str`, *optional*, defaults to `"linear"`):
            `"linear"`: `1 + c·d` (paper, Eq. 10); `"none"`: 1; `"abs"`: `d`.
        scale (`float`, *optional*, defaults to 5.0): c >= 0, in the inverse unit of the scores.

    Returns:
        `numpy.ndarray` or `torch.Tensor`: weights of the type, shape and dtype of `margin`.

    Raises:
        ValueError: for an unknown form.
    """
    distance = abs(margin)
    if form == "linear":
        return 1 + scale * distance
    if form == "none":
        return 0 * distance + 1
    if form == "abs":
        return distance
    raise ValueError(f"`form` must be one of {', '.join(WEIGHT_FORMS)}, got {form!r}.")


@dataclasses.dataclass(frozen=True)
class Weighting:
    """
    The weights of a run: [`confidence_weights`], times a factor for each class, divided by a constant.

    Args:
        form (`str`, *optional*, defaults to `"linear"`): As in [`confidence_weights`]; so is the next.
        scale (`float`, *optional*, defaults to 5.0): c.
        desirable (`float`, *optional*, defaults to 1.0): Factor of positive samples.
        undesirable (`float`, *optional*, defaults to 1.0): Factor of negative samples.
        divisor (`float`, *optional*, defaults to 1.0): The mean weight of the data, if weights should have mean 1.
    """

    form: WeightForm = "linear"
    scale: float = 5.0
    desirable: float = 1.0
    undesirable: float = 1.0
    divisor: float = 1.0

    @property
    def formula(self) -> str:
        """The formula of the weight as text; c stands for its number."""
        forms = {
            "linear": "1 + c·abs(score − τ)",
            "none": "1",
            "abs": "abs(score − τ)",
        }
        classes = self.desirable, self.undesirable
        factor = f", times {classes[0]:g} for positives and {classes[1]:g} for negatives" if classes != (1, 1) else ""
        return forms[self.form] + factor + (", over their mean" if self.divisor != 1 else "")

    def __call__(self, margin: Values) -> Values:
        """Return the weights (B, ...) of margins s - τ (B, ...), of their type and dtype; margin 0 is positive."""
        weights = confidence_weights(margin, form=self.form, scale=self.scale)
        if (self.desirable, self.undesirable) != (1.0, 1.0):
            positive = margin >= 0
            weights = weights * (positive * self.desirable + ~positive * self.undesirable)
        return weights if self.divisor == 1.0 else weights / self.divisor


@dataclasses.dataclass(frozen=True)
class WeightSummary:
    """Confidence weights of a whole dataset: their mean, their maximum and the share that the largest 1 % carry."""

    mean: float
    max: float
    top_1_percent_share: float


def summarize_weights(weights: np.ndarray) -> WeightSummary:
    """
    Summarise the weights that a dataset's samples get, such as `1 + c·|s - τ|` (paper, Eq. 10).

    Args:
        weights (`numpy.ndarray`): (N,) finite weights.

    Returns:
        [`WeightSummary`]: equal weights give a `top_1_percent_share` of 0.01 (for N a multiple of 100).
    """
    values = np.asarray(weights, dtype=np.float64)
    top = max(1, round(values.size / 100))
    largest = np.partition(values, values.size - top)[values.size - top :]
    total = float(values.sum())
    return WeightSummary(float(values.mean()), float(values.max()), float(largest.sum()) / total if total else 0.0)
