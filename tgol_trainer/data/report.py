"""What training would see of a dataset: labels, weights, uncertainty, groups, example rows; no model involved."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np

from tgol_trainer import thresholds
from tgol_trainer.data.labels import Labelling
from tgol_trainer.data.scores import ScoredRows

_SHOWN_GROUPS = 20
_BINS = 16


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
class LabelReport:
    """
    The dry run of a dataset. τ and its interval are in the unit that `confidence_scale` acts on (normalised scores).

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
        confidence_scale (`float`):
            c.
        interval ([`thresholds.ThresholdInterval`], *optional*):
            Of τ; `None` for a fixed one.
        num_flips (`int`):
            Labels that differ between the ends of the interval.
        tie_breaker (`float`, *optional*):
            A τ that makes the scores tied with it negative, where there are ties and scores above; none of `"min"`.
        weight_percentiles (`dict[str, float]`):
            Percentile to weight.
        prompts ([`GroupReport`]):
            By prompt.
        groups ([`GroupReport`], *optional*):
            By the column asked for.
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
    confidence_scale: float
    interval: thresholds.ThresholdInterval | None
    num_flips: int
    tie_breaker: float | None
    weight_percentiles: dict[str, float]
    prompts: GroupReport
    groups: GroupReport | None
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
            "interval": values.pop("interval"),
            "num_flips": values.pop("num_flips"),
            "tie_breaker": values.pop("tie_breaker"),
        }
        values["normalization"] = labelling["normalization"]
        values["combination"] = labelling["combination"]
        weights = {"confidence_scale": values.pop("confidence_scale")} | (labelling["weights"] or {})
        values["weights"] = weights | {"percentiles": values.pop("weight_percentiles")}
        return values


def label_report(
    rows: ScoredRows,
    labelling: Labelling,
    *,
    prompt_column: str = "prompt",
    score_column: str = "score",
    group_column: str | None = None,
    confidence_scale: float = 5.0,
    source: np.ndarray | None = None,
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
        confidence_scale (`float`, *optional*, defaults to 5.0):
            c.
        source (`np.ndarray`, *optional*):
            Raw scores of the proxy set that τ comes from; by default those of `rows`.

    Returns:
        [`LabelReport`]
    """
    unit, threshold = labelling.normalization, labelling.threshold
    tau = threshold.value
    values = rows.scores if unit.method == "none" else unit(rows.scores)
    prompts = _group_report(rows, values, tau, prompt_column, unit)
    groups = prompts if group_column == prompt_column else None
    if group_column and groups is None:
        groups = _group_report(rows, values, tau, group_column, unit)
    ordered = np.sort(values)
    interval, num_flips = None, 0
    if threshold.percentile is not None:
        interval = thresholds.bootstrap_interval(
            ordered if source is None else unit(source), percentile=threshold.percentile
        )
        num_flips = int(np.diff(np.searchsorted(ordered, [interval.low, interval.high]))[0])
    above = int(np.searchsorted(ordered, tau, side="right"))
    combination = labelling.combination
    movable = threshold.num_ties and (combination is None or combination.method == "sum")
    distinct = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    return LabelReport(
        score_column=score_column,
        num_rows=rows.num_rows,
        dropped=rows.dropped,
        scores=ScoreSummary(
            *(float(rows.scores.min()), float(rows.scores.max()), float(rows.scores.mean()), float(rows.scores.std())),
            num_distinct=int(np.count_nonzero(distinct)),
        ),
        labelling=labelling,
        confidence_scale=confidence_scale,
        interval=interval,
        num_flips=num_flips,
        tie_breaker=tau + (float(ordered[above]) - tau) / 2 if movable and above < ordered.size else None,
        weight_percentiles=_weight_percentiles(ordered, tau, confidence_scale),
        histogram=_histogram(ordered, distinct, unit),
        examples=_examples(rows, values, tau, confidence_scale, prompt_column),
        prompts=prompts,
        groups=groups,
    )


def _weight_percentiles(ordered: np.ndarray, tau: float, confidence_scale: float) -> dict[str, float]:
    # Distances from τ have their percentiles at the same places as the weights.
    distances = np.abs(ordered - tau)
    points = (1, 25, 50, 75, 99)
    found = np.percentile(distances, points, overwrite_input=True)
    return {str(point): float(1 + confidence_scale * value) for point, value in zip(points, found, strict=True)}


def _histogram(
    ordered: np.ndarray, distinct: np.ndarray, unit: thresholds.ScoreNormalization
) -> list[tuple[float, float, int]]:
    """Count one bar a value where there are few, else in equal bins, the outermost of which hold outliers too."""
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
    rows: ScoredRows, values: np.ndarray, tau: float, confidence_scale: float, prompt_column: str, count: int = 3
) -> list[Example]:
    positive = values >= tau
    places = {
        "lowest": _smallest(values, count),
        "just below τ": _smallest(np.where(positive, np.inf, -values), count)[::-1],
        "at or above τ": _smallest(np.where(positive, values, np.inf), count),
        "highest": _smallest(-values, count)[::-1],
    }
    index = np.concatenate(list(places.values()))
    prompts = rows.texts(prompt_column, rows.row_ids[index])
    names = [place for place, found in places.items() for _ in found]
    return [
        Example(
            place=place,
            row=int(rows.row_ids[i]),
            score=float(rows.scores[i]),
            positive=bool(positive[i]),
            weight=float(1 + confidence_scale * abs(values[i] - tau)),
            prompt=prompt,
        )
        for place, i, prompt in zip(names, index, prompts, strict=True)
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
    rows: ScoredRows, values: np.ndarray, tau: float, column: str, unit: thresholds.ScoreNormalization
) -> GroupReport:
    groups, first = rows.groups(column)
    counts = thresholds.count_groups(groups, values, tau)
    within, between = thresholds.variance_components(values, groups)
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
