"""Describe the labels that training would give a dataset: threshold, weights, uncertainty, groups, example rows."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tgol_trainer import thresholds
from tgol_trainer.data.scores import ScoredRows

from .fitting import FittedLabels, LabelSettings
from .labeler import Labeler

_SHOWN_GROUPS = 20
_BINS = 16
_EXAMPLES = 3
_FIRST_ROWS = 20_000  # rows of a stream that the running threshold is followed over


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
    """Rows that share a text: their number, how many are positive, their mean raw score and their raw τ."""

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
        column (`str`): The column.
        num_groups (`int`): Different texts.
        num_several (`int`): Groups of at least two rows. The next four fields count only these.
        num_positive_only (`int`): Groups whose labels are all positive.
        num_negative_only (`int`): Groups whose labels are all negative.
        num_differing (`int`): Groups whose scores are not all equal.
        one_sided_by_chance (`float`):
            Share of the groups, 0 to 1, that would have one label only if labels fell on rows at random.
        between_share (`float`, *optional*):
            Share of the variance of scores that lies between groups; `None` where fewer than ten rows tell.
        largest (`list[Group]`): Up to 20 groups, largest first.
    """

    column: str
    num_groups: int
    num_several: int
    num_positive_only: int
    num_negative_only: int
    num_differing: int
    one_sided_by_chance: float
    between_share: float | None
    largest: list[Group]

    @property
    def one_sided_share(self) -> float:
        """Share of the groups of several rows whose labels are all equal."""
        return (self.num_positive_only + self.num_negative_only) / max(1, self.num_several)


@dataclasses.dataclass(frozen=True)
class Example:
    """One row: its place among the scores, its number, raw score, label, weight and prompt."""

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
            What the interval describes: `"threshold"` (bootstrap of τ), `"groups"` (each group resampled within
            itself) or `"running"` (the τ that the first rows meet while training).
        interval ([`thresholds.ThresholdInterval`], *optional*):
            Interval of τ in normalised units; `None` where groups have their own.
        num_flips (`int`):
            Labels that differ between the ends of the interval, or of the group's interval; estimated from 2,000
            groups where there are more.
        median_width (`float`, *optional*): Median width of the groups' intervals in normalised units.
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
        score_column (`str`): Column of the scores.
        num_rows (`int`): Rows read.
        dropped (`dict[str, int]`): Cause to number of rows left out.
        scores ([`ScoreSummary`]): Summary of the scores of the labelled rows.
        labeler ([`Labeler`]): What [`TGOLTrainer`] makes of the same data: τ, counts, normalisation, weights.
        uncertainty ([`Uncertainty`], *optional*): How sure τ is; `None` for a fixed τ.
        tie_breaker (`float`, *optional*):
            A τ that makes the scores tied with τ negative. `None` without ties, without scores above, where rows
            have their own τ, and for the combination `"min"`.
        weight_percentiles (`dict[str, float]`): Percentile to weight.
        prompts ([`GroupReport`]): Labels by prompt.
        groups ([`GroupReport`], *optional*): Labels by the column asked for.
        histogram (`list[tuple[float, float, int]]`):
            (low, high, count) of raw scores; low equals high where each value has its own bar.
        examples (`list[Example]`):
            The rows with the lowest scores, next to τ on both sides, and with the highest scores.
    """

    score_column: str
    num_rows: int
    dropped: dict[str, int]
    scores: ScoreSummary
    labeler: Labeler
    uncertainty: Uncertainty | None
    tie_breaker: float | None
    weight_percentiles: dict[str, float]
    prompts: GroupReport
    groups: GroupReport | None
    histogram: list[tuple[float, float, int]]
    examples: list[Example]

    @property
    def raw_threshold(self) -> float:
        """τ in the unit of the score column, or of the combined score."""
        unit, value = self.labeler.normalization, self.labeler.threshold.value
        return value if unit.method == "none" else value * unit.scale + unit.center

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary; docs/labelling.md lists them."""
        values = dataclasses.asdict(self)
        labeler = values.pop("labeler")
        values["threshold"] = labeler["threshold"] | {
            "raw_value": self.raw_threshold,
            "strategy": self.labeler.strategy,
            "uncertainty": values.pop("uncertainty"),
            "tie_breaker": values.pop("tie_breaker"),
        }
        values["normalization"] = labeler["normalization"]
        values["combination"] = labeler["combination"]
        weights = {"weighting": labeler["weighting"]} | (labeler["weights"] or {})
        values["weights"] = weights | {"percentiles": values.pop("weight_percentiles")}
        return values


def label_report(
    rows: ScoredRows,
    fitted: FittedLabels,
    *,
    prompt_column: str = "prompt",
    score_column: str = "score",
    group_column: str | None = None,
    uncertainty: Uncertainty | None = None,
) -> LabelReport:
    """
    Describe what labels and weights a dataset's scores get.

    Args:
        rows ([`ScoredRows`]): The scores, see [`read_scores`].
        fitted ([`FittedLabels`]): Labels of these scores, see [`fit_labels`].
        prompt_column (`str`, *optional*, defaults to `"prompt"`): Column of the prompts, as read.
        score_column (`str`, *optional*, defaults to `"score"`):
            Column of the scores, as read, or the name of the combined score.
        group_column (`str`, *optional*): Column of the groups, as read.
        uncertainty ([`Uncertainty`], *optional*): See [`label_uncertainty`].

    Returns:
        [`LabelReport`]

    Raises:
        ValueError: where `fitted` holds no labels.
    """
    labeler, labels, kept = fitted
    if labels is None:
        raise ValueError("`fitted` has no labels: fit it to the scores of `rows`.")
    num_rows, threshold, unit = rows.num_rows, labeler.threshold, labeler.normalization
    rows = rows if kept is None else rows.kept(kept)
    raw = rows.scores if labeler.combination is None else labeler.combination(rows.scores)
    values = unit(raw)
    tau = threshold.value if labeler.rows is None else labeler.rows

    def group_report(column: str) -> GroupReport:
        groups = rows.pop_groups(column)
        names = lambda shown: rows.texts(column, rows.row_ids[[np.argmax(groups == one) for one in shown]])  # noqa: E731
        return summarize_groups(column, values, tau, groups, unit, names)

    prompts = group_report(prompt_column)
    groups = prompts if group_column == prompt_column else group_report(group_column) if group_column else None
    examples = _examples(rows, raw, values - tau, labels.weight, prompt_column)
    ordered = np.sort(values)
    distinct = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    points = (1, 25, 50, 75, 99)
    spread = np.percentile(labels.weight, points)
    return LabelReport(
        score_column=score_column,
        num_rows=num_rows,
        dropped=rows.dropped,
        scores=ScoreSummary(
            *(float(raw.min()), float(raw.max()), float(raw.mean()), float(raw.std())),
            num_distinct=int(np.count_nonzero(distinct)),
        ),
        labeler=labeler,
        uncertainty=uncertainty,
        tie_breaker=tie_breaker(labeler, ordered),
        weight_percentiles={str(point): float(value) for point, value in zip(points, spread, strict=True)},
        histogram=score_bars(ordered, distinct, unit),
        examples=examples,
        prompts=prompts,
        groups=groups,
    )


def tie_breaker(labeler: Labeler, ordered: np.ndarray) -> float | None:
    """
    Return a τ that makes the scores tied with the present one negative, or `None` where there is none.

    Args:
        labeler ([`Labeler`]): Its threshold must be one for all rows.
        ordered (`np.ndarray`): (N,) normalised scores in ascending order.
    """
    value = labeler.threshold.value
    movable = labeler.rows is None and (labeler.combination is None or labeler.combination.method == "sum")
    above = int(np.searchsorted(ordered, value, side="right"))
    if not (movable and labeler.threshold.num_ties and above < ordered.size):
        return None
    return value + (float(ordered[above]) - value) / 2


def label_uncertainty(
    rows: ScoredRows,
    fitted: FittedLabels,
    settings: LabelSettings,
    *,
    source: np.ndarray | None = None,
    group_column: str | None = None,
    source_keys: np.ndarray | None = None,
) -> Uncertainty | None:
    """
    Say how far τ could lie from where it does, and how many labels would change; the normalisation is held fixed.

    Args:
        rows ([`ScoredRows`]): The scores.
        fitted ([`FittedLabels`]): Labels of these scores.
        settings ([`LabelSettings`]): The settings they were fitted with.
        source (`np.ndarray`, *optional*): Raw scores of the proxy set that τ comes from; by default those of `rows`.
        group_column (`str`, *optional*):
            Column of `rows.keys` that holds the groups, for the strategies `"group"` and `"oracle"`.
        source_keys (`np.ndarray`, *optional*): Keys of the groups of `source`.

    Returns:
        [`Uncertainty`]; `None` for a fixed τ.
    """
    labeler, kept = fitted.labeler, slice(None) if fitted.kept is None else fitted.kept
    threshold, facts = labeler.threshold, labeler.strategy
    scores = labeler.normalized(rows.scores)
    estimated = scores if source is None else labeler.normalized(source)
    if settings.strategy in ("group", "oracle") and group_column is not None:
        if settings.strategy == "group":
            draw = thresholds.group_draw(
                *(threshold.value, facts["within_variance"], facts["between_variance"]),
                percentile=settings.percentile,
                statistic=settings.statistic,
            )
        else:
            draw = thresholds.oracle_draw(threshold.value, facts["beta"])
        keys = rows.keys[group_column]
        found = thresholds.bootstrap_groups(estimated, keys if source_keys is None else source_keys, draw)
        share = found.flip_share(scores[kept], keys[kept])
        width = float(np.median(found.high - found.low))
        return Uncertainty("groups", None, round(share * threshold.num_scores), width)
    if threshold.percentile is None:
        return None
    if settings.strategy == "running":
        running = labeler.running_percentile()
        met = [running.add(score) for score in scores[:_FIRST_ROWS].tolist()]
        low, high = np.quantile(met, [0.025, 0.975], method="inverted_cdf")
        interval = thresholds.ThresholdInterval(float(low), float(high), 0.95)
        return Uncertainty("running", interval, interval.num_flips(scores[kept]))
    interval = thresholds.bootstrap_interval(estimated, percentile=threshold.percentile)
    return Uncertainty("threshold", interval, interval.num_flips(scores[kept]))


def summarize_groups(
    column: str,
    values: np.ndarray,
    tau: float | np.ndarray,
    numbers: np.ndarray,
    unit: thresholds.ScoreNormalization,
    names: Callable[[np.ndarray], Sequence[str | None]],
) -> GroupReport:
    """
    Describe labels by the text of a column.

    Args:
        column (`str`): The column.
        values (`np.ndarray`): (N,) normalised scores.
        tau (`float` or `np.ndarray`): τ, one value or (N,), in normalised units.
        numbers (`np.ndarray`): (N,) integers 0 .. G - 1, the group of each row.
        unit ([`thresholds.ScoreNormalization`]): Normalisation of the scores; the report is in raw units.
        names (`Callable[[np.ndarray], Sequence[str]]`): Takes numbers of groups, and returns their texts.

    Returns:
        [`GroupReport`]
    """
    within, between = thresholds.variance_components(values, numbers)
    num_differing = thresholds.count_differing(numbers, values)
    counts = thresholds.count_groups(numbers, values, tau)
    spare = values.size - len(counts)
    share = between / (between + within) if spare >= 10 and between + within > 0 else None
    largest = _smallest(-counts.num_rows, _SHOWN_GROUPS)
    return GroupReport(
        column=column,
        num_groups=len(counts),
        num_several=int(np.count_nonzero(counts.several)),
        num_positive_only=int(np.count_nonzero(counts.one_sided & (counts.num_positive > 0))),
        num_negative_only=int(np.count_nonzero(counts.one_sided & (counts.num_positive == 0))),
        num_differing=num_differing,
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
            for name, group in zip(names(largest), largest, strict=True)
        ],
    )


def score_bars(
    ordered: np.ndarray, distinct: np.ndarray | None = None, unit: thresholds.ScoreNormalization | None = None
) -> list[tuple[float, float, int]]:
    """
    Count scores in bars: one bar per value where values are few, else equal bins whose outermost hold outliers too.

    Args:
        ordered (`np.ndarray`): (N,) scores in ascending order.
        distinct (`np.ndarray`, *optional*): (N,) bool, true where a score differs from the one before.
        unit ([`thresholds.ScoreNormalization`], *optional*): Normalisation of the scores; bars are in raw units.

    Returns:
        `list[tuple[float, float, int]]`: (low, high, count); low equals high where each value has its own bar.
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
    rows: ScoredRows, raw: np.ndarray, margins: np.ndarray, weight: np.ndarray, prompt_column: str
) -> list[Example]:
    positive = margins >= 0
    places = {
        "lowest": _smallest(raw, _EXAMPLES),
        "just below τ": _smallest(np.where(positive, np.inf, -margins), _EXAMPLES)[::-1],
        "at or above τ": _smallest(np.where(positive, margins, np.inf), _EXAMPLES),
        "highest": _smallest(-raw, _EXAMPLES)[::-1],
    }
    index = np.concatenate(list(places.values()))
    prompts = rows.texts(prompt_column, rows.row_ids[index])
    names = [place for place, found in places.items() for _ in found]
    return [
        Example(
            place=place,
            row=int(rows.row_ids[i]),
            score=float(raw[i]),
            positive=bool(positive[i]),
            weight=float(weight[i]),
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
