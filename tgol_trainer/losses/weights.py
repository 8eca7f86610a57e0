"""Confidence weights: how much an example counts by its distance from the threshold."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import numpy as np
import torch

Values = TypeVar("Values", np.ndarray, torch.Tensor)
WeightForm = Literal["linear", "none", "abs", "power", "clipped"]
WEIGHT_FORMS: tuple[str, ...] = get_args(WeightForm)


def confidence_weights(
    margin: Values, *, form: WeightForm = "linear", scale: float = 5.0, power: float = 0.5, limit: float = 2.0
) -> Values:
    """
    Weights of examples with margins s - τ; `d = |s - τ|`.

    Args:
        margin (`numpy.ndarray` or `torch.Tensor`):
            (B,) s - τ.
        form (`str`, *optional*, defaults to `"linear"`):
            `"linear"`: `1 + c·d` (paper, Eq. 10); `"none"`: 1; `"abs"`: `d`; `"power"`: `1 + c·d^power`;
            `"clipped"`: `min(1 + c·d, limit)`.
        scale (`float`, *optional*, defaults to 5.0):
            c >= 0, in one over the unit of the scores (to the power, for `"power"`).
        power (`float`, *optional*, defaults to 0.5):
            Exponent > 0 of `"power"`.
        limit (`float`, *optional*, defaults to 2.0):
            Largest weight of `"clipped"`, at least 1.

    Returns:
        of the type, shape and dtype of `margin`.

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
    if form == "power":
        return 1 + scale * distance**power
    if form == "clipped":
        return (1 + scale * distance).clip(max=limit)
    raise ValueError(f"`form` must be one of {', '.join(WEIGHT_FORMS)}, got {form!r}.")
