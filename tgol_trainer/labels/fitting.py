"""Fit a labeler to scores: combination, normalisation, threshold and weights."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tgol_trainer import thresholds
from tgol_trainer.thresholds import ScoreCombination, Threshold, ThresholdError, Weighting
from tgol_trainer.thresholds.base import deviation

from .combining import check_combined, check_constant, fit_and_log
from .labeler import Labeler, RowLabels

logger = logging.getLogger(__name__)

_LARGEST_WEIGHT = 1e30
_SHOWN = 3

Groups = Sequence[str] | np.ndarray
ThresholdStrategy = Literal["global", "fixed", "group", "oracle", "running"]


@dataclasses.dataclass(frozen=True)
class LabelSettings:
    """
    The settings that decide what a score means.

    Args:
        percentile (`float`, *optional*, defaults to 50.0): Percentile of the source scores that becomes τ.
        fixed (`float`, *optional*): τ in normalised units, for the strategy `"fixed"`.
        normalization (`str`, *optional*, defaults to `"none"`): `"none"`, `"zscore"` or `"robust"`.
        strategy (`str`, *optional*, defaults to `"global"`):
            `"global"` and `"running"` (the percentile), `"fixed"`, `"group"`
            ([`thresholds.estimate_group_thresholds`]) or `"oracle"` ([`thresholds.estimate_oracle_thresholds`]).
        statistic (`str`, *optional*, defaults to `"percentile"`):
            Statistic of a group: its percentile or its `"mean"`.
        oracle_beta (`float`, *optional*): β_r of the oracle, in normalised units.
        weighting ([`thresholds.Weighting`], *optional*): Turns margins into weights; by default the paper's.
        unit_mean_weight (`bool`, *optional*, defaults to `False`):
            Divide the weights by their mean over the training rows.
        dead_zone (`float`, *optional*, defaults to 0.0):
            Rows closer to their τ than this, in normalised units, are left out.
        window (`int`, *optional*): Number of last scores of the strategy `"running"`.
        columns (`tuple[str, ...]`, *optional*): Names of K score columns that make one score.
        column_weights (`tuple[float, ...]`, *optional*): Their weights; by default 1 each.
        combination (`str`, *optional*, defaults to `"sum"`): `"sum"` or `"min"`, see [`thresholds.ScoreCombination`].
    """

    percentile: float = 50.0
    fixed: float | None = None
    normalization: thresholds.NormalizationMethod = "none"
    strategy: ThresholdStrategy = "global"
    statistic: thresholds.GroupStatistic = "percentile"
    oracle_beta: float | None = None
    weighting: Weighting = dataclasses.field(default_factory=Weighting)
    unit_mean_weight: bool = False
    dead_zone: float = 0.0
    window: int | None = None
    columns: Sequence[str] = ()
    column_weights: Sequence[float] | None = None
    combination: thresholds.CombinationMethod = "sum"


class FittedLabels(NamedTuple):
    """A labeler, the labels of the training rows that are kept, and (N,) bool which are kept (`None` for all)."""

    labeler: Labeler
    labels: RowLabels | None
    kept: np.ndarray | None


def fit_labels(
    scores: np.ndarray | None,
    settings: LabelSettings,
    *,
    groups: Groups | None = None,
    source: np.ndarray | None = None,
    source_groups: Groups | None = None,
    combination: ScoreCombination | None = None,
    name: str = "score",
) -> FittedLabels:
    """
    Fit a labeler, and label the training rows with it.

    Args:
        scores (`np.ndarray`, *optional*):
            (N,) raw training scores, or (N, K) of several columns; `None` for a stream that was not read.
        settings ([`LabelSettings`]): Strategy, percentile, weights.
        groups (`Sequence[str]` or `np.ndarray`, *optional*):
            N names or keys of the rows' groups, for the strategies `"group"` and `"oracle"`.
        source (`np.ndarray`, *optional*):
            (M,) or (M, K) raw scores of a proxy set, from which everything is estimated; by default `scores`.
        source_groups (`Sequence[str]` or `np.ndarray`, *optional*): M names or keys of the groups of `source`.
        combination ([`thresholds.ScoreCombination`], *optional*):
            A combination fitted before, which is kept; by default it is fitted to the source scores.
        name (`str`, *optional*, defaults to `"score"`): Column of the scores, for messages.

    Returns:
        [`FittedLabels`]

    Raises:
        ThresholdError: for scores that cannot be divided in two, with the name of the column.
    """
    proxy = source is not None
    source = source if proxy else scores
    if settings.columns and combination is None and source is not None:
        combination = fit_and_log(
            source, settings.columns, settings.column_weights, settings.combination, settings.percentile
        )
    if combination is not None and source is not None:
        check_constant(source, combination)
        source = combination(source)
        scores = None if scores is None else combination(scores) if proxy else source
    try:
        if combination is not None and scores is not None:
            check_combined(scores, combination)
        unit = thresholds.ScoreNormalization()
        if source is not None:
            unit = thresholds.fit_normalization(source, settings.normalization)
        normal_source = None if source is None else unit(source)
        normal = normal_source if not proxy else None if scores is None else unit(scores)
        labeler = _fit(normal_source, normal, settings, groups, source_groups if proxy else groups, proxy)
    except ThresholdError as error:
        raise ThresholdError(f"Column {name!r}: {error}") from None
    labeler = dataclasses.replace(labeler, normalization=unit, combination=combination)
    if scores is None or normal is None:
        return FittedLabels(labeler, None, None)
    kept = None
    if settings.dead_zone:
        labeler, kept = _without_dead_zone(labeler, normal, settings.dead_zone)
        scores = scores[kept]
    labels = labeler(scores, labeler.rows)
    _check_weights(labels.weight, scores, name)
    mean = float(labels.weight.mean(dtype=np.float64))
    if settings.unit_mean_weight and mean > 0:
        weighting = dataclasses.replace(labeler.weighting, divisor=mean)
        labeler = dataclasses.replace(labeler, weighting=weighting)
        labels = dataclasses.replace(labels, weight=weighting(labels.margin).astype(np.float32, copy=False))
    weights = thresholds.summarize_weights(labels.weight)
    _log(labeler, weights)
    return FittedLabels(dataclasses.replace(labeler, weights=weights), labels, kept)


def _check_weights(weights: np.ndarray, scores: np.ndarray, name: str) -> None:
    """Refuse weights with which the loss of a batch, or its gradient, overflows float32."""
    rows = np.flatnonzero(~(weights < _LARGEST_WEIGHT))
    if rows.size:
        shown = ", ".join(f"{scores[row]:g}" for row in rows[:_SHOWN])
        raise ThresholdError(
            f"Column {name!r}: {rows.size} of {len(weights)} scores give weights that float32 cannot hold in a loss "
            f"(such as {shown}). Such numbers often stand for a missing score: remove these rows, or set "
            "`score_normalization='robust'` or a smaller `confidence_scale`."
        )


def _log(labeler: Labeler, weights: thresholds.WeightSummary) -> None:
    threshold = labeler.threshold
    value = thresholds.shown(threshold.value, labeler.score_std)
    logger.info(
        "Threshold %.6g (%s): %d positive, %d negative, %d tied. Weights: mean %.3g, max %.3g, the largest 1 %% carry "
        "%.1f %%.",
        *(value, threshold.source, threshold.num_positive, threshold.num_negative, threshold.num_ties),
        *(weights.mean, weights.max, 100 * weights.top_1_percent_share),
    )


def _fit(
    source: np.ndarray | None,
    scores: np.ndarray | None,
    settings: LabelSettings,
    groups: Groups | None,
    source_groups: Groups | None,
    proxy: bool,
) -> Labeler:
    """Fit to normalised scores."""
    by_group: dict[Any, float] | None = None
    rows: np.ndarray | None = None
    facts: dict[str, Any] = {"name": settings.strategy}
    if settings.strategy in ("group", "oracle"):
        if source is None or scores is None or groups is None or source_groups is None:
            raise ValueError(f"The strategy {settings.strategy!r} needs scores and the group of each of them.")
        estimate = _of_groups if settings.strategy == "group" else _of_oracle
        by_group, rows, pooled, more = estimate(source, source_groups, settings)
        facts |= more
        if proxy:
            rows = np.array([by_group.get(group, pooled) for group in groups], dtype=np.float64)
        threshold = _counted(scores, rows, Threshold(pooled, settings.strategy, 0, 0, 0, settings.percentile))
    else:
        threshold = _one_threshold(source, scores, settings, proxy)
    return Labeler(
        threshold,
        weighting=settings.weighting,
        by_group=by_group,
        rows=rows,
        strategy=facts,
        score_std=deviation(source) if source is not None else 1.0,
        source=source if settings.window is not None else None,
        window=settings.window,
    )


def _without_dead_zone(labeler: Labeler, scores: np.ndarray, width: float) -> tuple[Labeler, np.ndarray]:
    """Leave out the rows whose normalised score is closer to their τ than `width`; return which are kept."""
    tau = labeler.threshold.value if labeler.rows is None else labeler.rows
    kept = np.abs(scores - tau) >= width
    rows = None if labeler.rows is None else labeler.rows[kept]
    threshold = _counted(scores[kept], labeler.threshold.value if rows is None else rows, labeler.threshold)
    left_out = int(kept.size - kept.sum())
    logger.info("%d of %d rows lie in the dead zone and are left out.", left_out, kept.size)
    strategy = {**labeler.strategy, "num_in_dead_zone": left_out}
    return dataclasses.replace(labeler, threshold=threshold, rows=rows, strategy=strategy), kept


_GroupFit = tuple[dict[Any, float], np.ndarray, float, dict[str, Any]]
"""τ by group, τ of each source row, the pooled τ, and facts."""


def _of_groups(source: np.ndarray, names: Groups, settings: LabelSettings) -> _GroupFit:
    numbers, groups = thresholds.group_ids(names)
    found = thresholds.estimate_group_thresholds(
        source, numbers, percentile=settings.percentile, statistic=settings.statistic
    )
    facts = {
        "num_groups": len(groups),
        "num_one_sided_groups": found.num_one_sided,
        "statistic": settings.statistic,
        "mean_reliability": float(found.reliability.mean()),
        "within_variance": found.within_variance,
        "between_variance": found.between_variance,
    }
    logger.info(
        "%d groups; %d of them have one label only. The variance of the scores is %.4g within groups and %.4g between "
        "them. On average a group's own %s counts %.0f %%, the global threshold the rest.",
        *(len(groups), found.num_one_sided, found.within_variance, found.between_variance, settings.statistic),
        100 * facts["mean_reliability"],
    )
    values = dict(zip(groups.tolist(), found.values.tolist(), strict=True))
    return values, found.values[numbers], found.pooled, facts


def _of_oracle(source: np.ndarray, names: Groups, settings: LabelSettings) -> _GroupFit:
    numbers, groups = thresholds.group_ids(names)
    found = thresholds.estimate_oracle_thresholds(
        source, numbers, beta=settings.oracle_beta, percentile=settings.percentile
    )
    logger.info("Oracle baselines of %d groups at β_r = %.4g.", len(groups), found.beta)
    values = dict(zip(groups.tolist(), found.values.tolist(), strict=True))
    return values, found.leave_one_out, found.pooled, {"num_groups": len(groups), "beta": found.beta}


def _counted(scores: np.ndarray, tau: np.ndarray | float, threshold: Threshold) -> Threshold:
    """Return a threshold with the counts of scores that meet `tau`; an empty side is an error."""
    margin = scores - tau
    positive = int((margin >= 0).sum())
    if positive in (0, margin.size):
        raise ThresholdError(
            f"With the {threshold.source} threshold, all {margin.size} samples that are kept are "
            f"{'positive' if positive else 'negative'}. Use another strategy or percentile, or a smaller dead zone."
        )
    return dataclasses.replace(
        threshold, num_scores=int(margin.size), num_positive=positive, num_ties=int((margin == 0).sum())
    )


def _one_threshold(
    source: np.ndarray | None, scores: np.ndarray | None, settings: LabelSettings, proxy: bool
) -> Threshold:
    percentile, fixed = settings.percentile, settings.fixed
    if fixed is not None:
        return Threshold(fixed, "fixed", 0, 0, 0) if scores is None else thresholds.apply_threshold(scores, fixed)
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
        return Threshold(estimate.value, "proxy", 0, 0, 0, percentile)
    return thresholds.apply_threshold(scores, estimate.value, source="proxy", percentile=percentile)
