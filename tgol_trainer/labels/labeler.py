"""Where scores and threshold meet: normalisation, τ, label counts and weights of a whole dataset, in float64."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from tgol_trainer import thresholds
from tgol_trainer.thresholds import Weighting

logger = logging.getLogger(__name__)

ThresholdStrategy = Literal["global", "fixed", "group", "oracle", "running"]


@dataclasses.dataclass(frozen=True)
class Labelling:
    """
    How scores become labels and weights.

    Args:
        threshold ([`thresholds.Threshold`]):
            The global τ in normalised units, with the counts of the training rows where their scores are known; with
            thresholds of groups the counts are those of the rows' own thresholds.
        normalization ([`thresholds.ScoreNormalization`], *optional*):
            Applied to scores before τ.
        weights ([`thresholds.WeightSummary`], *optional*):
            Of the training rows, where their scores are known.
        weighting ([`thresholds.Weighting`], *optional*):
            Margins to weights.
        by_group (`Mapping[str, float]`, *optional*):
            τ of each group in normalised units; others take the global τ. `None` where there are no groups.
        rows (`numpy.ndarray`, *optional*):
            (N,) τ of each training row, where rows differ.
        strategy (`dict`, *optional*):
            Facts about how τ was found, JSON-serialisable.
        score_std (`float`, *optional*, defaults to 1.0):
            Standard deviation of the scores τ was estimated from, in normalised units.
        source (`numpy.ndarray`, *optional*):
            (N,) those scores in normalised units, in the order in which they were read, where they were to be kept.
        kept (`numpy.ndarray`, *optional*):
            (M,) bool, the training rows outside the dead zone; `None` for all.
        combination ([`thresholds.ScoreCombination`], *optional*):
            Made the scores, before normalisation, of several columns.
        cut_points (`Sequence[float]`, *optional*):
            Thresholds of the ordinal loss in normalised units; none without it.
    """

    threshold: thresholds.Threshold
    normalization: thresholds.ScoreNormalization = dataclasses.field(default_factory=thresholds.ScoreNormalization)
    weights: thresholds.WeightSummary | None = None
    weighting: Weighting = dataclasses.field(default_factory=Weighting)
    by_group: Mapping[str, float] | None = None
    rows: np.ndarray | None = None
    strategy: dict[str, Any] = dataclasses.field(default_factory=dict)
    score_std: float = 1.0
    source: np.ndarray | None = None
    kept: np.ndarray | None = None
    combination: thresholds.ScoreCombination | None = None
    cut_points: Sequence[float] = ()

    def row_thresholds(self, groups: Sequence[str]) -> np.ndarray | None:
        """Return the (N,) τ of rows of other data by their groups, or `None` where all rows have the global τ."""
        if self.by_group is None:
            return None
        return np.array([self.by_group.get(group, self.threshold.value) for group in groups], dtype=np.float64)

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-serialisable: no scores and no names of groups."""
        digest = None if self.rows is None else hashlib.blake2b(self.rows.tobytes(), digest_size=16).hexdigest()
        return {
            "threshold": self.threshold.to_dict(),
            "normalization": dataclasses.asdict(self.normalization),
            "weights": dataclasses.asdict(self.weights) if self.weights else None,
            "weighting": dataclasses.asdict(self.weighting),
            "strategy": self.strategy,
            "score_std": self.score_std,
            "row_thresholds_blake2b": digest,
            "cut_points": list(self.cut_points),
            "combination": dataclasses.asdict(self.combination) if self.combination else None,
        }

    def restored(self, saved: Mapping[str, Any]) -> Labelling:
        """
        Return the labelling of a checkpoint for the data that this one was fitted to.

        Args:
            saved (`Mapping[str, Any]`):
                What `to_dict` returned then.

        Raises:
            ValueError: if scores were made of other columns, or by another rule, then.
        """
        combination = self._restored_combination(saved.get("combination"))
        threshold = thresholds.Threshold(**saved["threshold"])
        if threshold.value != self.threshold.value:
            logger.warning(
                "The checkpoint's threshold is %.6g, that of the data given now %.6g. Training resumes with the "
                "checkpoint's; start anew if the data were meant to change.",
                *(threshold.value, self.threshold.value),
            )
        if saved["row_thresholds_blake2b"] != self.to_dict()["row_thresholds_blake2b"]:
            logger.warning(
                "The thresholds of the rows given now differ from those that the checkpoint was trained with. "
                "Training resumes with those of the rows given now; start anew if the data were meant to change."
            )
        return dataclasses.replace(
            self,
            threshold=threshold,
            normalization=thresholds.ScoreNormalization(**saved["normalization"]),
            weights=thresholds.WeightSummary(**saved["weights"]) if saved["weights"] else None,
            weighting=Weighting(**saved["weighting"]),
            score_std=saved["score_std"],
            combination=combination,
            cut_points=saved["cut_points"],
        )

    def _restored_combination(self, saved: Mapping[str, Any] | None) -> thresholds.ScoreCombination | None:
        before = thresholds.ScoreCombination.from_dict(saved) if saved else None
        rules = [(each.columns, each.weights, each.method) if each else None for each in (before, self.combination)]
        if rules[0] != rules[1]:
            then, now = (
                "one score column" if rule is None else f"{rule[2]} of {rule[0]} by {rule[1]}" for rule in rules
            )
            raise ValueError(
                f"The checkpoint was trained on {then}, this run asks for {now}. Resume with the `score_columns`, "
                "`score_weights` and `score_combination` of the checkpoint, or start anew."
            )
        if before != self.combination:
            logger.warning(
                "The columns of scores of the data given now have other means, standard deviations or thresholds than "
                "those of the checkpoint. Training resumes with the checkpoint's; start anew if the data were meant "
                "to change."
            )
        return before


@dataclasses.dataclass(frozen=True)
class LabelSettings:
    """
    How to make a [`Labelling`].

    Args:
        percentile (`float`, *optional*, defaults to 50.0):
            Percentile of the source scores that becomes τ.
        fixed (`float`, *optional*):
            τ itself, in normalised units, for the strategy `"fixed"`.
        normalization (`str`, *optional*, defaults to `"none"`):
            `"none"`, `"zscore"` or `"robust"`.
        strategy (`str`, *optional*, defaults to `"global"`):
            `"global"` and `"running"` (the percentile), `"fixed"`, `"group"`
            ([`thresholds.estimate_group_thresholds`]) or `"oracle"` ([`thresholds.estimate_oracle_thresholds`]).
        statistic (`str`, *optional*, defaults to `"percentile"`):
            Of a group: its percentile or its `"mean"`.
        oracle_beta (`float`, *optional*):
            β_r of the oracle, in normalised units.
        weighting ([`thresholds.Weighting`], *optional*):
            Margins to weights; by default the paper's.
        unit_mean_weight (`bool`, *optional*, defaults to `False`):
            Divide the weights by their mean over the training rows.
        dead_zone (`float`, *optional*, defaults to 0.0):
            Rows closer to their τ than this, in normalised units, are not kept; counts and weights are of the kept.
        keep_source (`bool`, *optional*, defaults to `False`):
            Keep the scores that τ was estimated from, which the loss `"qrpo"` and the strategy `"running"`
            need.
        cut_percentiles (`Sequence[float]`, *optional*):
            Of the source scores, which become the cut points of the ordinal loss, each by the rule for ties of
            [`thresholds.estimate_threshold`]; weights are then the means over cut points.
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
    keep_source: bool = False
    cut_percentiles: Sequence[float] = ()


def fit_labelling(
    source: np.ndarray | None,
    scores: np.ndarray | None,
    settings: LabelSettings,
    *,
    groups: Sequence[str] | np.ndarray | None = None,
    source_groups: Sequence[str] | np.ndarray | None = None,
    proxy: bool = False,
) -> Labelling:
    """
    Estimate normalisation and threshold from source scores, and count what they make of the training scores.

    Args:
        source (`np.ndarray`, *optional*):
            (N,) raw scores to estimate from; `None` where a fixed threshold needs none.
        scores (`np.ndarray`, *optional*):
            (M,) raw training scores; `None` for a stream that was not read.
        settings ([`LabelSettings`]):
            Strategy, percentile, weights.
        groups (`Sequence[str]` or `np.ndarray`, *optional*):
            M names or keys of the training rows' groups, for the strategies `"group"` and `"oracle"`.
        source_groups (`Sequence[str]` or `np.ndarray`, *optional*):
            N names or keys of the source rows' groups, where the source is a proxy set.
        proxy (`bool`, *optional*, defaults to `False`):
            Whether the source is a proxy set, not the training scores.

    Returns:
        [`Labelling`]

    Raises:
        ThresholdError: for scores that the threshold does not divide in two.
    """
    unit, same = thresholds.ScoreNormalization(), scores is source
    if source is not None:
        unit = thresholds.fit_normalization(source, settings.normalization)
        source = unit(source)
    if scores is not None:
        scores = source if same else unit(scores)
    facts: dict[str, Any] = {"name": settings.strategy}
    grouped: _Grouped | None = None
    rows: np.ndarray | None = None
    if settings.strategy in ("group", "oracle"):
        names = source_groups if proxy else groups
        if source is None or scores is None or groups is None or names is None:
            raise ValueError(f"The strategy {settings.strategy!r} needs scores and the group of each of them.")
        grouped = (_of_groups if settings.strategy == "group" else _of_oracle)(source, names, settings)
        facts |= grouped.facts
        rows = grouped.rows
        if proxy:
            rows = np.array([grouped.by_group.get(group, grouped.pooled) for group in groups], dtype=np.float64)
        start = thresholds.Threshold(grouped.pooled, settings.strategy, 0, 0, 0, settings.percentile)
        threshold = _counted(scores, rows, start)
    else:
        threshold = _threshold(source, scores, settings.percentile, settings.fixed, proxy)
    kept: np.ndarray | None = None
    if settings.dead_zone and scores is not None:
        kept = np.abs(scores - (threshold.value if rows is None else rows)) >= settings.dead_zone
        scores, rows = scores[kept], None if rows is None else rows[kept]
        threshold = _counted(scores, threshold.value if rows is None else rows, threshold)
        facts["num_in_dead_zone"] = int(kept.size - kept.sum())
        logger.info("%d of %d rows lie in the dead zone and are left out.", facts["num_in_dead_zone"], kept.size)
    labelling = Labelling(
        threshold,
        unit,
        weighting=settings.weighting,
        by_group=grouped.by_group if grouped else None,
        rows=rows,
        strategy=facts,
        score_std=float(source.std()) if source is not None else 1.0,
        source=source if settings.keep_source else None,
        kept=kept,
        cut_points=[]
        if source is None
        else [thresholds.estimate_threshold(source, percentile=each).value for each in settings.cut_percentiles],
    )
    return labelling if scores is None else _weighed(labelling, scores, settings.unit_mean_weight)


def _weighed(labelling: Labelling, scores: np.ndarray, unit_mean: bool) -> Labelling:
    """Summarise the weights of the training rows, whose normalised scores are given, and say what was found."""
    threshold = labelling.threshold
    tau: np.ndarray | float = threshold.value if labelling.rows is None else labelling.rows
    if labelling.cut_points:
        values = np.zeros(scores.shape)
        for each in labelling.cut_points:
            values += labelling.weighting.overwrite(scores - each) / len(labelling.cut_points)
    else:
        values = labelling.weighting.overwrite(scores - tau)
    if unit_mean and values.mean() > 0:
        labelling = dataclasses.replace(
            labelling, weighting=dataclasses.replace(labelling.weighting, divisor=float(values.mean()))
        )
        values = values / values.mean()
    weights = thresholds.summarize_weights(values)
    logger.info(
        "Threshold %.6g (%s): %d positive, %d negative, %d tied. Weights: mean %.3g, max %.3g, the largest 1 %% carry "
        "%.1f %%.",
        *(threshold.value, threshold.source, threshold.num_positive, threshold.num_negative, threshold.num_ties),
        *(weights.mean, weights.max, 100 * weights.top_1_percent_share),
    )
    return dataclasses.replace(labelling, weights=weights)


class _Grouped(NamedTuple):
    """Thresholds of groups: τ by group, τ of each source row, the pooled τ, and facts."""

    by_group: dict[Any, float]
    rows: np.ndarray
    pooled: float
    facts: dict[str, Any]


def _of_groups(source: np.ndarray, names: Sequence[str] | np.ndarray, settings: LabelSettings) -> _Grouped:
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
        "%d groups, of which %d have one label alone. Variance of the scores: %.4g within groups, %.4g between; a "
        "group's own %s counts %.0f %% on average, the global threshold the rest.",
        *(len(groups), found.num_one_sided, found.within_variance, found.between_variance, settings.statistic),
        100 * facts["mean_reliability"],
    )
    values = dict(zip(groups.tolist(), found.values.tolist(), strict=True))
    return _Grouped(values, found.values[numbers], found.pooled, facts)


def _of_oracle(source: np.ndarray, names: Sequence[str] | np.ndarray, settings: LabelSettings) -> _Grouped:
    numbers, groups = thresholds.group_ids(names)
    found = thresholds.estimate_oracle_thresholds(
        source, numbers, beta=settings.oracle_beta, percentile=settings.percentile
    )
    logger.info("Oracle baselines of %d groups at β_r = %.4g.", len(groups), found.beta)
    values = dict(zip(groups.tolist(), found.values.tolist(), strict=True))
    facts = {"num_groups": len(groups), "beta": found.beta}
    return _Grouped(values, found.leave_one_out, found.pooled, facts)


def _counted(scores: np.ndarray, tau: np.ndarray | float, threshold: thresholds.Threshold) -> thresholds.Threshold:
    """Return a threshold with the counts of scores that meet `tau`; one side empty over the whole data is an error."""
    margin = scores - tau
    positive = int((margin >= 0).sum())
    if positive in (0, margin.size):
        raise thresholds.ThresholdError(
            f"With the {threshold.source} threshold, all {margin.size} samples that are kept are "
            f"{'positive' if positive else 'negative'}. Use another strategy or percentile, or a smaller dead zone."
        )
    return dataclasses.replace(
        threshold, num_scores=int(margin.size), num_positive=positive, num_ties=int((margin == 0).sum())
    )


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
