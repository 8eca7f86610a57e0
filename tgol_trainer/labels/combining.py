"""Combine several score columns to one: fit the combination, log it, and check that both labels occur."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from tgol_trainer.thresholds import CombinationMethod, ScoreCombination, ThresholdError, fit_combination, shown

logger = logging.getLogger(__name__)


def fit_and_log(
    scores: np.ndarray,
    columns: Sequence[str],
    weights: Sequence[float] | None,
    method: CombinationMethod,
    percentile: float,
) -> ScoreCombination:
    """
    Fit a combination of score columns and log it.

    Args:
        scores (`np.ndarray`): (N, K) finite raw scores.
        columns (`Sequence[str]`): Names of the K columns.
        weights (`Sequence[float]`, *optional*): One weight per column; by default 1 each.
        method (`str`): `"sum"` or `"min"`.
        percentile (`float`): Percentile of each column, 0 to 100, that is its threshold under `"min"`.

    Returns:
        [`thresholds.ScoreCombination`]

    Raises:
        ThresholdError: for a column whose scores are all equal.
    """
    found = fit_combination(scores, columns, weights, method, percentile=percentile)
    for line in combination_lines(found):
        logger.info(line)
    for column, moved in zip(columns, found.moved_from or (), strict=False):
        if moved is not None:
            logger.warning(
                "Column %r: the %g-th percentile is the smallest score, which every row would reach, so the column's "
                "threshold was moved halfway to the next score.",
                *(column, percentile),
            )
    return found


def combination_lines(combination: ScoreCombination) -> list[str]:
    """Return a combination in words: the formula, then a line for each column."""
    lines = [f"Score s = {combination.formula}, where z is standardised by mean and standard deviation:"]
    taus = combination.raw_thresholds
    for index, column in enumerate(combination.columns):
        spread = combination.scales[index]
        line = f"  {column}: mean {shown(combination.centers[index], spread):.6g}, standard deviation {spread:.4g}"
        lines.append(line + (f", threshold {shown(taus[index], spread):.6g}" if taus else ""))
    return lines


def check_constant(scores: np.ndarray, combination: ScoreCombination) -> None:
    """
    Check that columns do not cancel: b = 1 - 3·a standardised is -a, and their sum nothing but rounding.

    Args:
        scores (`np.ndarray`): (N, K) raw.
        combination ([`thresholds.ScoreCombination`]): How they are combined.

    Raises:
        ThresholdError: if the combined scores are equal up to rounding.
    """
    combined = combination(scores)
    if combined.max() - combined.min() <= combination.rounding_error(scores):
        raise ThresholdError(
            f"The combination of {', '.join(combination.columns)} is constant: {combination.formula} is the same "
            "number in every row, since the columns cancel each other. Leave one of them out, or choose other "
            "`score_weights`."
        )


def check_combined(scores: np.ndarray, combination: ScoreCombination) -> None:
    """
    Check that `"min"` gives both labels. Other combinations get their threshold from the scores.

    Args:
        scores (`np.ndarray`): (N,) combined.
        combination ([`thresholds.ScoreCombination`]): The combination that made them.

    Raises:
        ThresholdError: if no row, or every row, reaches the threshold in every column.
    """
    positive = int((scores >= 0).sum())
    if combination.method == "min" and positive in (0, scores.size):
        number = "every" if positive else "no"
        remedy = "a higher" if positive else "a lower"
        raise ThresholdError(
            f"{number} one of the {scores.size} rows is at or above the threshold in all of "
            f"{', '.join(combination.columns)}. Use {remedy} `threshold_percentile`"
            + (
                "."
                if positive
                else ", fewer columns, or `score_combination='sum'`, where one can make up for another."
            )
        )
