"""What training would see of a dataset: labels, weights, uncertainty, groups, example rows; no model involved."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tgol_trainer import thresholds
from tgol_trainer.data.scores import ScoredRows

from .labeler import Labelling, LabelSettings

_SHOWN_GROUPS = 20
_BINS = 16
_FIRST_ROWS = 20_000  # of a stream, that the running threshold is followed over


@dataclasses.dataclass(frozen=True)
class ScoreSummary:
    """Raw scores: smallest, largest, mean, standard deviation, and how many different values there are."""

    min: float
    max: float
    mean: float
    std: float
    num_distinct: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that share a text: its rows, those that are positive, their mean raw score and their raw τ."""

    name: str | None
    num_rows: int
    num_positive: int
    mean: float
    threshold: float


@dataclasses.dataclass(frozen=True)
class GroupReport:
    """
    Labels by the text of a column.

    Args:
        column (`str`):
            The column.
        num_groups (`int`):
            Different texts.
        num_several (`int`):
            Groups of at least two rows; the next three speak of them alone.
        num_positive_only (`int`):
            Groups all of whose labels are positive.
        num_negative_only (`int`):
            Groups all of whose labels are negative.
        one_sided_by_chance (`float`):
            Share of them, 0 to 1, that would be one-sided if labels fell on rows at random.
        between_share (`float`, *optional*):
            Share of the variance of scores that lies between groups; `None` where fewer than ten rows could tell.
        largest (`list[Group]`):
            Up to 20 groups, largest first.
    """

    column: str
    num_groups: int
    num_several: int
    num_positive_only: int
    num_negative_only: int
    one_sided_by_chance: float
    between_share: float | None
    largest: list[Group]

    @property
    def one_sided_share(self) -> float:
        """Share of the groups of several rows whose labels are all equal."""
        return (self.num_positive_only + self.num_negative_only) / max(1, self.num_several)


@dataclasses.dataclass(frozen=True)
class Example:
    """A row: where it lies, its number, raw score, label, weight and prompt."""

    place: str
    row: int
    score: float
    positive: bool
    weight: float
    prompt: str | None


@dataclasses.dataclass(frozen=True)
class Uncertainty:
    """
    How sure labels are.

    Args:
        of (`str`):
            What the interval is of: `"threshold"` (bootstrap of τ), `"groups"` (each group resampled within itself) or
            `"running"` (the τ that the first rows meet while training).
        interval ([`thresholds.ThresholdInterval`], *optional*):
            Of τ, in normalised units; `None` where groups have their own.
        num_flips (`int`):
            Labels that differ between the ends of the interval, of groups each its own; estimated from 2,000 groups
            where there are more.
        median_width (`float`, *optional*):
            Of the intervals of groups, in normalised units.
    """

    of: str
    interval: thresholds.ThresholdInterval | None
    num_flips: int
    median_width: float | None = None


@dataclasses.dataclass(frozen=True)
class LabelReport:
    """
    The dry run of a dataset. τ and its interval are in the unit that weights act on (normalised scores).

    Args:
        score_column (`str`):
            Column of the scores.
        num_rows (`int`):
            Rows read.
        dropped (`dict[str, int]`):
            Cause to number of rows left out.
        scores ([`ScoreSummary`]):
            Of the rows labelled.
        labelling ([`Labelling`]):
            What [`TGOLTrainer`] makes of the same data: τ, counts, normalisation, weights.
        uncertainty ([`Uncertainty`], *optional*):
            Of τ; `None` for a fixed one.
        tie_breaker (`float`, *optional*):
            A τ that makes the scores tied with it negative, where there are ties, scores above, and one τ for all;
            none of `"min"`.
        weight_percentiles (`dict[str, float]`):
            Percentile to weight.
        prompts ([`GroupReport`]):
            By prompt.
        groups ([`GroupReport`], *optional*):
            By the column asked for.
        levels (`list[tuple[float, int]]`, *optional*):
            Of the ordinal loss: each cut point in normalised units, and the rows from there up.
        histogram (`list[tuple[float, float, int]]`):
            (low, high, count) of raw scores; low equals high where each value has its own.
        examples (`list[Example]`):
            Lowest, next to τ on both sides, highest.
    """

    score_column: str
    num_rows: int
    dropped: dict[str, int]
    scores: ScoreSummary
    labelling: Labelling
    uncertainty: Uncertainty | None
    tie_breaker: float | None
    weight_percentiles: dict[str, float]
    prompts: GroupReport
    groups: GroupReport | None
    levels: list[tuple[float, int]] | None
    histogram: list[tuple[float, float, int]]
    examples: list[Example]

    @property
    def raw_threshold(self) -> float:
        """τ in the unit of the score column, or of the combined score."""
        unit, value = self.labelling.normalization, self.labelling.threshold.value
        return value if unit.method == "none" else value * unit.scale + unit.center

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary; docs/labelling.md lists them."""
        values = dataclasses.asdict(self)
        labelling = values.pop("labelling")
        values["threshold"] = labelling["threshold"] | {
            "raw_value": self.raw_threshold,
            "strategy": self.labelling.strategy,
            "uncertainty": values.pop("uncertainty"),
            "tie_breaker": values.pop("tie_breaker"),
            "cut_points": values.pop("levels"),
        }
        values["normalization"] = labelling["normalization"]
        values["combination"] = labelling["combination"]
        weights = {"weighting": labelling["weighting"]} | (labelling["weights"] or {})
        values["weights"] = weights | {"percentiles": values.pop("weight_percentiles")}
        return values


def label_report(
    rows: ScoredRows,
    labelling: Labelling,
    *,
    prompt_column: str = "prompt",
    score_column: str = "score",
    group_column: str | None = None,
    uncertainty: Uncertainty | None = None,
    cut_points: Sequence[float] | None = None,
) -> LabelReport:
    """
    Describe what labels and weights a dataset's scores get.

    Args:
        rows ([`ScoredRows`]):
            The scores, see [`read_scores`].
        labelling ([`Labelling`]):
            Of these scores, see [`fit_labelling`].
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            As read.
        score_column (`str`, *optional*, defaults to `"score"`):
            As read.
        group_column (`str`, *optional*):
            As read.
        uncertainty ([`Uncertainty`], *optional*):
            See [`label_uncertainty`].
        cut_points (`Sequence[float]`, *optional*):
            Of the ordinal loss, in normalised units.

    Returns:
        [`LabelReport`]
    """
    unit, threshold = labelling.normalization, labelling.threshold
    num_rows = rows.num_rows
    if labelling.kept is not None:
        rows = rows.kept(labelling.kept)
    values = unit(rows.scores)
    tau = threshold.value if labelling.rows is None else labelling.rows
    prompts = _group_report(rows, values, tau, prompt_column, unit)
    groups = prompts if group_column == prompt_column else None
    if group_column and groups is None:
        groups = _group_report(rows, values, tau, group_column, unit)
    margins = values - tau
    examples = _examples(rows, margins, labelling.weighting, prompt_column)
    labelling.weighting.replace(margins)
    points = (1, 25, 50, 75, 99)
    spread = np.percentile(margins, points, overwrite_input=True)
    del margins
    ordered = np.sort(values)
    above = int(np.searchsorted(ordered, threshold.value, side="right"))
    combination = labelling.combination
    movable = labelling.rows is None and (combination is None or combination.method == "sum")
    breaks = movable and threshold.num_ties and above < ordered.size
    distinct = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    return LabelReport(
        score_column=score_column,
        num_rows=num_rows,
        dropped=rows.dropped,
        scores=ScoreSummary(
            *(float(rows.scores.min()), float(rows.scores.max()), float(rows.scores.mean()), float(rows.scores.std())),
            num_distinct=int(np.count_nonzero(distinct)),
        ),
        labelling=labelling,
        uncertainty=uncertainty,
        tie_breaker=threshold.value + (float(ordered[above]) - threshold.value) / 2 if breaks else None,
        weight_percentiles={str(point): float(value) for point, value in zip(points, spread, strict=True)},
        histogram=score_bars(ordered, distinct, unit),
        examples=examples,
        prompts=prompts,
        groups=groups,
        levels=None
        if cut_points is None
        else [(float(cut), ordered.size - int(np.searchsorted(ordered, cut))) for cut in cut_points],
    )


def label_uncertainty(
    rows: ScoredRows,
    labelling: Labelling,
    settings: LabelSettings,
    *,
    source: np.ndarray | None = None,
    group_column: str | None = None,
    source_keys: np.ndarray | None = None,
    running: thresholds.RunningPercentile | None = None,
) -> Uncertainty | None:
    """
    Say how far τ could lie from where it does, and how many labels would change; the normalisation is held fixed.

    Args:
        rows ([`ScoredRows`]):
            The scores.
        labelling ([`Labelling`]):
            Of these scores.
        settings ([`LabelSettings`]):
            It was made with.
        source (`np.ndarray`, *optional*):
            Raw scores of the proxy set that τ comes from; by default those of `rows`.
        group_column (`str`, *optional*):
            Column of `rows.keys` that groups are of, for the strategies `"group"` and `"oracle"`.
        source_keys (`np.ndarray`, *optional*):
            Keys of the groups of `source`.
        running ([`thresholds.RunningPercentile`], *optional*):
            As it stands before training, for the strategy `"running"`.

    Returns:
        [`Uncertainty`]; `None` for a fixed τ.
    """
    unit, threshold, facts = labelling.normalization, labelling.threshold, labelling.strategy
    scores = unit(rows.scores)
    if settings.strategy in ("group", "oracle") and group_column is not None:
        draw = (
            thresholds.group_draw(
                *(threshold.value, facts["within_variance"], facts["between_variance"]),
                percentile=settings.percentile,
                statistic=settings.statistic,
            )
            if settings.strategy == "group"
            else thresholds.oracle_draw(threshold.value, facts["beta"])
        )
        keys = rows.keys[group_column]
        own = (scores, keys) if source is None or source_keys is None else (unit(source), source_keys)
        found = thresholds.bootstrap_groups(*own, draw)
        kept = slice(None) if labelling.kept is None else labelling.kept
        share = found.flip_share(scores[kept], keys[kept])
        width = float(np.median(found.high - found.low))
        return Uncertainty("groups", None, round(share * threshold.num_scores), width)
    if threshold.percentile is None:
        return None
    if running is not None:
        met = [running.add(score) for score in scores[:_FIRST_ROWS].tolist()]
        low, high = np.quantile(met, [0.025, 0.975], method="inverted_cdf")
        interval = thresholds.ThresholdInterval(float(low), float(high), 0.95)
    else:
        interval = thresholds.bootstrap_interval(
            scores if source is None else unit(source), percentile=threshold.percentile
        )
    kept = slice(None) if labelling.kept is None else labelling.kept
    return Uncertainty("threshold" if running is None else "running", interval, interval.num_flips(scores[kept]))


def score_bars(
    ordered: np.ndarray, distinct: np.ndarray | None = None, unit: thresholds.ScoreNormalization | None = None
) -> list[tuple[float, float, int]]:
    """
    Count one bar a value where there are few, else in equal bins, the outermost of which hold outliers too.

    Args:
        ordered (`np.ndarray`):
            (N,) scores in ascending order.
        distinct (`np.ndarray`, *optional*):
            (N,) bool, where a score differs from the one before.
        unit ([`thresholds.ScoreNormalization`], *optional*):
            That of the scores; bars are in raw units.

    Returns:
        `list[tuple[float, float, int]]`: (low, high, count); low equals high where each value has its own.
    """
    distinct = np.concatenate([[True], ordered[1:] != ordered[:-1]]) if distinct is None else distinct
    unit = unit or thresholds.ScoreNormalization()
    if np.count_nonzero(distinct) <= _BINS:
        starts = np.flatnonzero(distinct)
        counts = np.diff(starts, append=ordered.size)
        edges = ordered[starts]
        pairs = list(zip(edges, edges, strict=True))
    else:
        low, high = ordered[0], ordered[-1]
        inner = ordered[[int(0.005 * ordered.size), int(0.995 * (ordered.size - 1))]]
        if 0 < inner[1] - inner[0] < (high - low) / 3:
            low, high = inner
        edges = np.linspace(low, high, _BINS + 1)
        cuts = np.concatenate([[0], np.searchsorted(ordered, edges[1:-1]), [ordered.size]])
        edges[0], edges[-1] = ordered[0], ordered[-1]
        counts, pairs = np.diff(cuts), list(itertools.pairwise(edges))
    raw = [(float(low * unit.scale + unit.center), float(high * unit.scale + unit.center)) for low, high in pairs]
    return [(low, high, int(count)) for (low, high), count in zip(raw, counts, strict=True)]


def _examples(
    rows: ScoredRows, margins: np.ndarray, weighting: thresholds.Weighting, prompt_column: str, count: int = 3
) -> list[Example]:
    positive = margins >= 0
    places = {
        "lowest": _smallest(rows.scores, count),
        "just below τ": _smallest(np.where(positive, np.inf, -margins), count)[::-1],
        "at or above τ": _smallest(np.where(positive, margins, np.inf), count),
        "highest": _smallest(-rows.scores, count)[::-1],
    }
    index = np.concatenate(list(places.values()))
    prompts = rows.texts(prompt_column, rows.row_ids[index])
    names = [place for place, found in places.items() for _ in found]
    weights = weighting(margins[index])
    return [
        Example(
            place=place,
            row=int(rows.row_ids[i]),
            score=float(rows.scores[i]),
            positive=bool(positive[i]),
            weight=float(weight),
            prompt=prompt,
        )
        for place, i, weight, prompt in zip(names, index, weights, prompts, strict=True)
    ]


def _smallest(values: np.ndarray, count: int) -> np.ndarray:
    """Positions of the smallest finite values, in order of value, then of position."""
    count = min(count, values.size)
    cut = np.partition(values, count - 1)[count - 1]
    below = np.flatnonzero(values < cut)
    ties = np.flatnonzero(values == cut)[: count - below.size]
    found = np.concatenate([below[np.argsort(values[below], kind="stable")], ties])
    return found[np.isfinite(values[found])]


def _group_report(
    rows: ScoredRows, values: np.ndarray, tau: float | np.ndarray, column: str, unit: thresholds.ScoreNormalization
) -> GroupReport:
    order, groups = rows.pop_groups(column)
    first = order[np.searchsorted(groups, np.arange(groups[-1] + 1))] if groups[-1] + 1 < groups.size else order
    values, tau = values[order], tau[order] if isinstance(tau, np.ndarray) else tau
    del order
    within, between = thresholds.variance_components(values, groups)
    counts = thresholds.count_groups(groups, values, tau)
    del groups
    spare = values.size - len(counts)
    share = between / (between + within) if spare >= 10 and between + within > 0 else None
    largest = _smallest(-counts.num_rows, _SHOWN_GROUPS)
    names = rows.texts(column, rows.row_ids[first[largest]])
    return GroupReport(
        column=column,
        num_groups=len(counts),
        num_several=int(np.count_nonzero(counts.several)),
        num_positive_only=int(np.count_nonzero(counts.one_sided & (counts.num_positive > 0))),
        num_negative_only=int(np.count_nonzero(counts.one_sided & (counts.num_positive == 0))),
        one_sided_by_chance=counts.one_sided_by_chance(),
        between_share=share,
        largest=[
            Group(
                name=name,
                num_rows=int(counts.num_rows[group]),
                num_positive=int(counts.num_positive[group]),
                mean=float(counts.mean[group] * unit.scale + unit.center),
                threshold=float(counts.threshold[group] * unit.scale + unit.center),
            )
            for name, group in zip(names, largest, strict=True)
        ],
    )
