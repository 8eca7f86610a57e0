"""Combine several score columns into one score: a weighted sum of standardised scores, or the smallest margin."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from .base import ThresholdError, checked_scores, deviation, rounding_error, shown
from .percentile import estimate_threshold

CombinationMethod = Literal["sum", "min"]


@dataclasses.dataclass(frozen=True)
class ScoreCombination:
    """
    One score s of K columns, with z_k the k-th standardised by mean and standard deviation, in float64.

    `"sum"` is s = Σ w_k·z_k. `"min"` is s = min_k w_k·(z_k - τ_k), which is at least 0 exactly where every column
    reaches its threshold.

    Args:
        columns (`tuple[str, ...]`): Names of the K columns.
        weights (`tuple[float, ...]`): w_k.
        method (`str`): `"sum"` or `"min"`.
        centers (`tuple[float, ...]`): Means, each in the unit of its column.
        scales (`tuple[float, ...]`): Standard deviations, each in the unit of its column; never 0.
        thresholds (`tuple[float, ...]`, *optional*): τ_k in standardised units, of `"min"`.
        moved_from (`tuple[float | None, ...]`, *optional*):
            The standardised percentile of a column, if it is the smallest score and τ_k was moved as in
            [`estimate_threshold`]; else `None`.
    """

    columns: tuple[str, ...]
    weights: tuple[float, ...]
    method: CombinationMethod
    centers: tuple[float, ...]
    scales: tuple[float, ...]
    thresholds: tuple[float, ...] | None = None
    moved_from: tuple[float | None, ...] | None = None

    @property
    def name(self) -> str:
        """What the combined score is called, such as `"sum(a, b)"`."""
        return combined_name(self.columns, self.method)

    @property
    def formula(self) -> str:
        """The formula of the score; z(a) is the standardised column a."""
        if self.thresholds is None:
            text = " ".join(f"{_signed(w)}·z({c})" for w, c in zip(self.weights, self.columns, strict=True))
            return text.removeprefix("+ ")
        parts = zip(self.weights, self.columns, self.thresholds, strict=True)
        return f"min({', '.join(f'{w:g}·(z({c}) {_signed(-shown(tau, 1.0))})' for w, c, tau in parts)})"

    @property
    def raw_thresholds(self) -> tuple[float, ...]:
        """The thresholds of `"min"`, each in the unit of its column."""
        taus = self.thresholds or ()
        return tuple(c + tau * s for c, s, tau in zip(self.centers, self.scales, taus, strict=bool(taus)))

    def margins(self, scores: np.ndarray, column: int) -> np.ndarray:
        """Return (N,) standardised scores of one column of (N, K) raw ones, less τ_k under `"min"`."""
        standardised = (scores[:, column] - self.centers[column]) / self.scales[column]
        return standardised if self.thresholds is None else standardised - self.thresholds[column]

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return (N,) combined scores of (N, K) raw ones, float64."""
        scores = np.asarray(scores, dtype=np.float64)
        combined = self.weights[0] * self.margins(scores, 0)
        for column in range(1, len(self.columns)):
            part = self.weights[column] * self.margins(scores, column)
            combined = combined + part if self.method == "sum" else np.minimum(combined, part)
        return combined

    def rounding_error(self, scores: np.ndarray) -> float:
        """Return the difference below which combined scores of (N, K) raw ones are the same number."""
        parts = zip(self.weights, self.scales, scores.T, strict=True)
        # Twice, for the score and for the mean that is subtracted from it.
        return sum(abs(weight) * 2 * rounding_error(column) / scale for weight, scale, column in parts)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ScoreCombination:
        """Return the object that `dataclasses.asdict` made these values of; lists, as JSON has them, become tuples."""
        read: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**read)


def _signed(value: float) -> str:
    return f"{'-' if value < 0 else '+'} {abs(value):.4g}"


def combined_name(columns: Sequence[str], method: CombinationMethod) -> str:
    """Return what the score of several columns is called, such as `"sum(a, b)"`."""
    return f"{method}({', '.join(columns)})"


def check_combination(
    columns: Sequence[str] | None, weights: Sequence[float] | None, method: CombinationMethod
) -> tuple[float, ...]:
    """
    Check a choice of columns and weights.

    Args:
        columns (`Sequence[str]`, *optional*): Names of the columns; `None` where there is one score column.
        weights (`Sequence[float]`, *optional*): One per column; by default 1 each.
        method (`str`): `"sum"` or `"min"`.

    Returns:
        `tuple[float, ...]`: the weights; empty if there is one score column.

    Raises:
        ValueError: for weights or a method without columns, for fewer than two different columns, or for weights that
            are 0, not finite, or negative under `"min"`.
    """
    if columns is None:
        if weights is not None or method != "sum":
            given = "score_weights" if weights is not None else "score_combination"
            raise ValueError(
                f"`{given}` says how `score_columns` are combined, but `score_columns` is not given. Name the columns."
            )
        return ()
    if len(columns) < 2 or len(set(columns)) < len(columns):
        raise ValueError(
            f"`score_columns` must be two or more different columns, got {list(columns)}. One alone is `score_column`."
        )
    weights = [1.0] * len(columns) if weights is None else list(weights)
    if len(weights) != len(columns):
        raise ValueError(
            f"`score_weights` must be one per column of `score_columns`: {len(columns)} numbers, got {len(weights)}."
        )
    for column, weight in zip(columns, weights, strict=True):
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(
                f"`score_weights`: that of {column!r} is {weight}; it must be finite and not 0. Leave out a column "
                "that should not count."
            )
        if method == "min" and weight < 0:
            raise ValueError(
                f"`score_weights`: that of {column!r} is {weight}; with `score_combination='min'` weights must be "
                "larger than 0. If lower is better in a column, store the negative."
            )
    return tuple(map(float, weights))


def fit_combination(
    scores: np.ndarray,
    columns: Sequence[str],
    weights: Sequence[float] | None = None,
    method: CombinationMethod = "sum",
    *,
    percentile: float = 50.0,
) -> ScoreCombination:
    """
    Fit the standardisation of several score columns, and under `"min"` their thresholds.

    Args:
        scores (`np.ndarray`): (N, K) finite raw scores.
        columns (`Sequence[str]`): Names of the K columns.
        weights (`Sequence[float]`, *optional*): w_k; by default 1 each.
        method (`str`, *optional*, defaults to `"sum"`): `"sum"` or `"min"`.
        percentile (`float`, *optional*, defaults to 50.0):
            Percentile of a column, 0 to 100, that is its threshold under `"min"`.

    Returns:
        [`ScoreCombination`]

    Raises:
        ThresholdError: for a column whose scores are all equal; the message names it.
        ValueError: for columns or weights that [`check_combination`] refuses.
    """
    checked = check_combination(columns, weights, method)
    centers, scales, found = [], [], []
    for index, column in enumerate(columns):
        try:
            values = checked_scores(scores[:, index])
        except ThresholdError as error:
            raise ThresholdError(f"Column {column!r} of `score_columns`: {error} Or leave that column out.") from None
        centers.append(float(values.mean()))
        scales.append(deviation(values))
        if method == "min":
            found.append(estimate_threshold((values - centers[-1]) / scales[-1], percentile=percentile))
    return ScoreCombination(
        tuple(columns),
        checked,
        method,
        tuple(centers),
        tuple(scales),
        tuple(threshold.value for threshold in found) if found else None,
        tuple(threshold.moved_from for threshold in found) if found else None,
    )
