"""Where scores and threshold meet: normalisation, τ, label counts and weights of a whole dataset, in float64."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np

from tgol_trainer import thresholds

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Labelling:
    """
    How scores become labels and weights.

    Args:
        threshold ([`thresholds.Threshold`]):
            τ in normalised units, with the counts of the training rows where their scores are known.
        normalization ([`thresholds.ScoreNormalization`], *optional*):
            Applied to scores before τ.
        weights ([`thresholds.WeightSummary`], *optional*):
            Of the training rows, where their scores are known.
    """

    threshold: thresholds.Threshold
    normalization: thresholds.ScoreNormalization = dataclasses.field(default_factory=thresholds.ScoreNormalization)
    weights: thresholds.WeightSummary | None = None


def fit_labelling(
    source: np.ndarray | None,
    scores: np.ndarray | None,
    *,
    percentile: float = 50.0,
    fixed: float | None = None,
    normalization: thresholds.NormalizationMethod = "none",
    confidence_scale: float = 5.0,
    proxy: bool = False,
) -> Labelling:
    """
    Estimate normalisation and threshold from source scores, and count what they make of the training scores.

    Args:
        source (`np.ndarray`, *optional*):
            (N,) raw scores to estimate from; `None` where a fixed threshold needs none.
        scores (`np.ndarray`, *optional*):
            (M,) raw training scores; `None` for a stream that was not read.
        percentile (`float`, *optional*, defaults to 50.0):
            Percentile of the source scores that becomes τ.
        fixed (`float`, *optional*):
            τ itself, in normalised units, instead.
        normalization (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"zscore"` or `"robust"`.
        confidence_scale (`float`, *optional*, defaults to 5.0):
            c of the weights.
        proxy (`bool`, *optional*, defaults to `False`):
            Whether the source is a proxy set.

    Returns:
        [`Labelling`]

    Raises:
        ThresholdError: for scores that the threshold does not divide in two.
    """
    unit = thresholds.ScoreNormalization()
    if source is not None:
        unit = thresholds.fit_normalization(source, normalization)
        source = unit(source)
    if scores is not None:
        scores = unit(scores)
    threshold = _threshold(source, scores, percentile, fixed, proxy)
    if scores is None:
        return Labelling(threshold, unit)
    weights = thresholds.summarize_weights(scores, threshold.value, confidence_scale=confidence_scale)
    logger.info(
        "Threshold %.6g (%s): %d positive, %d negative, %d tied. Weights: mean %.3g, max %.3g, the largest 1 %% carry "
        "%.1f %%.",
        *(threshold.value, threshold.source, threshold.num_positive, threshold.num_negative, threshold.num_ties),
        *(weights.mean, weights.max, 100 * weights.top_1_percent_share),
    )
    return Labelling(threshold, unit, weights)


def _threshold(
    source: np.ndarray | None, scores: np.ndarray | None, percentile: float, fixed: float | None, proxy: bool
) -> thresholds.Threshold:
    if fixed is not None:
        if scores is None:
            return thresholds.Threshold(fixed, "fixed", num_scores=0, num_positive=0, num_ties=0)
        return thresholds.apply_threshold(scores, fixed)
    estimate = thresholds.estimate_threshold([] if source is None else source, percentile=percentile)
    if estimate.moved_from is not None:
        logger.warning(
            "The %g-th percentile of the scores is their minimum, %g, so that `s >= τ` would make every sample "
            "positive. τ was moved to %g, halfway to the next score: %d positive, %d negative.",
            *(percentile, estimate.moved_from, estimate.value, estimate.num_positive, estimate.num_negative),
        )
    if not proxy:
        return estimate
    if scores is None:
        return thresholds.Threshold(estimate.value, "proxy", 0, 0, 0, percentile)
    return thresholds.apply_threshold(scores, estimate.value, source="proxy", percentile=percentile)
