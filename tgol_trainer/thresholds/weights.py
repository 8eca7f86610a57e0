"""Weights of a whole dataset, summarised."""

from __future__ import annotations

import dataclasses

import numpy as np


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
        weights (`numpy.ndarray`):
            (N,) finite weights.

    Returns:
        [`WeightSummary`]: equal weights give a `top_1_percent_share` of 0.01 (for N a multiple of 100).
    """
    values = np.asarray(weights, dtype=np.float64)
    top = max(1, round(values.size / 100))
    largest = np.partition(values, values.size - top)[values.size - top :]
    total = float(values.sum())
    return WeightSummary(float(values.mean()), float(values.max()), float(largest.sum()) / total if total else 0.0)
