"""Confidence weights of a whole dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class WeightSummary:
    """Confidence weights of a whole dataset: their mean, their maximum and the share that the largest 1 % carry."""

    mean: float
    max: float
    top_1_percent_share: float


def summarize_weights(
    scores: Sequence[float] | np.ndarray, value: float, *, confidence_scale: float = 5.0
) -> WeightSummary:
    """
    Summarise the weights `1 + c·|s - τ|` that a dataset's scores get (paper, Eq. 10).

    Args:
        scores (`Sequence[float]`):
            (N,) finite scores, in the unit of `value`.
        value (`float`):
            τ.
        confidence_scale (`float`, *optional*, defaults to 5.0):
            c.

    Returns:
        [`WeightSummary`]: equal weights give a `top_1_percent_share` of 0.01 (for N a multiple of 100).
    """
    weights = 1 + confidence_scale * np.abs(np.asarray(scores, dtype=np.float64) - value)
    top = max(1, round(weights.size / 100))
    largest = np.partition(weights, weights.size - top)[weights.size - top :]
    return WeightSummary(float(weights.mean()), float(weights.max()), float(largest.sum() / weights.sum()))
