"""Compare a base model with any number of adapters, from images that were scored and measured."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .comparison import Comparison, bootstrap_means, by_name, clusters_of, compare_scores
from .measures import MEASURES, SPREAD, SPREADS, seed_spread

NOTABLE_CHANGE = 0.1
"""A measure is pointed out if it changed by this share of the base model's mean and its interval leaves out 0."""
FEW_PROMPTS = 20
"""With fewer prompts the bootstrap intervals are too narrow."""


@dataclasses.dataclass(frozen=True)
class ModelRows:
    """
    Scores and measures of one model's images. Every model has the same rows, made from the same prompts and seeds.

    Args:
        name (`str`): Name in tables.
        scores (`Mapping[str, Sequence[float | None]]`):
            Name of a score to one value per row; `None` where an image could not be scored.
        measures (`Mapping[str, Sequence[float | None]]`, *optional*): Name in [`MEASURES`] to one value per row.
        descriptors (`Mapping[str, Sequence[numpy.ndarray | None]]`, *optional*):
            Name in [`SPREADS`] to the descriptors that [`seed_spread`] takes, one per row.
        trained (`frozenset[str]`, *optional*):
            Names of the scores that the model was trained on; `None` if that is not known.
        medium (`str`, *optional*, defaults to `"image"`): What the model makes, or `"video"`.
    """

    name: str
    scores: Mapping[str, Sequence[float | None]]
    measures: Mapping[str, Sequence[float | None]] = dataclasses.field(default_factory=dict)
    descriptors: Mapping[str, Sequence[np.ndarray | None]] = dataclasses.field(default_factory=dict)
    trained: frozenset[str] | None = None
    medium: str = "image"


@dataclasses.dataclass(frozen=True)
class MeasureChange:
    """
    One measure of the base model's images and of an adapter's.

    Args:
        name (`str`): Name in [`MEASURES`] or [`SPREADS`].
        mean_before (`float`): Mean over the base model's images, or over prompts for a spread.
        mean_after (`float`): The same for the adapter.
        mean_change (`float`): Mean of after − before.
        mean_change_interval (`tuple[float, float]`): Bootstrap interval of that mean, over prompts.
        relative_change (`float`, *optional*): Ratio of the two means minus 1; `None` if the base model's is 0.
        relative_change_interval (`tuple[float, float]`, *optional*):
            Bootstrap interval of that ratio; each resample gives both means.
        num_compared (`int`): Images compared, or prompts for a spread.
    """

    name: str
    mean_before: float
    mean_after: float
    mean_change: float
    mean_change_interval: tuple[float, float]
    relative_change: float | None
    relative_change_interval: tuple[float, float] | None
    num_compared: int

    @property
    def notable(self) -> bool:
        """Whether it changed by a tenth of the base model's mean or more, and its interval leaves out 0."""
        if self.relative_change is None or self.relative_change_interval is None:
            return False
        low, high = self.relative_change_interval
        return abs(self.relative_change) >= NOTABLE_CHANGE and not low <= 0 <= high

    def text(self) -> str:
        """Return a text such as `-20.7 % [-23.1, -18.3]`, or the plain change if the base model's mean is 0."""
        if self.relative_change is None or self.relative_change_interval is None:
            return f"{self.mean_change:+.4g}"
        # Adding 0 turns -0.0 into 0.0.
        values = (self.relative_change, *self.relative_change_interval)
        change, low, high = (round(100 * value, 1) + 0.0 for value in values)
        return f"{change:+.1f} % [{low:+.1f}, {high:+.1f}]"

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as metrics.json holds them."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}


@dataclasses.dataclass(frozen=True)
class AdapterResult:
    """
    One adapter compared with the base model.

    Args:
        name (`str`): Name in tables.
        trained_known (`bool`): Whether it is known which scores the adapter was trained on.
        scores (`list[Comparison]`): One per score; the base model is "before".
        categories (`dict[str, list[Comparison]]`): The same for the prompts of each category.
        measures (`list[MeasureChange]`): Spreads across seeds, then the measures of single images.
    """

    name: str
    trained_known: bool
    scores: list[Comparison]
    categories: dict[str, list[Comparison]]
    measures: list[MeasureChange]

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as metrics.json holds them."""
        return {
            "trained_known": self.trained_known,
            "scores": by_name(self.scores),
            "categories": {name: by_name(found) for name, found in self.categories.items()},
            "measures": {measure.name: measure.to_dict() for measure in self.measures},
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """
    All adapters compared with the base model, and with one another.

    Args:
        base (`str`): Name of the base model.
        adapters (`list[AdapterResult]`): In the order given.
        head_to_head (`list[tuple[str, str, list[Comparison]]]`):
            Every pair of adapters: the first is "before", the second "after".
        notices (`list[str]`): Warnings that a reader must know before the numbers, one or two sentences each.
        num_prompts (`int`): Distinct prompts.
        num_rows (`int`): Images or videos of each model.
        medium (`str`): `"image"` or `"video"`, what the models make.
    """

    base: str
    adapters: list[AdapterResult]
    head_to_head: list[tuple[str, str, list[Comparison]]]
    notices: list[str]
    num_prompts: int
    num_rows: int
    medium: str

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of metrics.json other than `scores`, which are those of the first adapter."""
        return {
            "base": self.base,
            "adapter": self.adapters[0].name,
            "num_prompts": self.num_prompts,
            "images_per_model": self.num_rows,
            "notices": self.notices,
            "adapters": {adapter.name: adapter.to_dict() for adapter in self.adapters},
            "head_to_head": [
                {"before": before, "after": after, "scores": by_name(found)}
                for before, after, found in self.head_to_head
            ],
        }


def verdict(comparison: Comparison) -> str:
    """Return `"better"`, `"worse"` or `"no clear difference"`, by the side of 50 % on which the interval lies."""
    low, high = comparison.interval
    return "better" if low > 0.5 else "worse" if high < 0.5 else "no clear difference"


def compare_models(
    prompts: Sequence[str],
    base: ModelRows,
    adapters: Sequence[ModelRows],
    *,
    categories: Sequence[str] | None = None,
    confidence: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Evaluation:
    """
    Compare adapters with their base model and with one another.

    Args:
        prompts (`Sequence[str]`): One per row.
        base ([`ModelRows`]): The base model.
        adapters (`Sequence[ModelRows]`): The adapters, with distinct names and the scores of the base model.
        categories (`Sequence[str]`, *optional*): One per row; each category is also compared on its own.
        confidence (`float`, *optional*, defaults to 0.95): Level of the intervals.
        num_resamples (`int`, *optional*, defaults to 2000): Bootstrap resamples.
        seed (`int`, *optional*, defaults to 0): Seed of the resampling.

    Returns:
        [`Evaluation`]

    Raises:
        ValueError: if there is no adapter, names are not distinct, models differ in their scores, numbers of rows
            differ, or [`compare_scores`] refuses a score.
    """
    _check(prompts, [base, *adapters], categories)
    options = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    rows_of: dict[str, list[int]] = {}
    for row, category in enumerate(categories or ()):
        rows_of.setdefault(category, []).append(row)
    results = [
        AdapterResult(
            adapter.name,
            adapter.trained is not None,
            _scores(prompts, base, adapter, adapter.trained, options),
            {name: _scores(prompts, base, adapter, adapter.trained, options, rows) for name, rows in rows_of.items()},
            _measures(prompts, base, adapter, options),
        )
        for adapter in adapters
    ]
    pairs = []
    for one, two in itertools.combinations(adapters, 2):
        trained = (one.trained or frozenset()) | (two.trained or frozenset())
        pairs.append((one.name, two.name, _scores(prompts, one, two, trained, options)))
    num_prompts = len(set(prompts))
    notices = _notices(results, num_prompts, len(prompts), base.medium)
    return Evaluation(base.name, results, pairs, notices, num_prompts, len(prompts), base.medium)


def _check(prompts: Sequence[str], models: Sequence[ModelRows], categories: Sequence[str] | None) -> None:
    names = [model.name for model in models]
    if len(names) < 2:
        raise ValueError("`adapters` is empty: give at least one model to compare with the base model.")
    if len(set(names)) < len(names):
        raise ValueError(f"`adapters`: the names {names} are not distinct; tables could not tell them apart.")
    if not models[0].scores:
        raise ValueError("`base` has no scores: score it by at least one reward.")
    for model in models:
        if list(model.scores) != list(models[0].scores):
            raise ValueError(
                f"{model.name!r} has the scores {list(model.scores)}, {names[0]!r} has {list(models[0].scores)}; all "
                "models need the same."
            )
        columns = {**model.scores, **model.measures, **model.descriptors}
        wrong = [name for name, values in columns.items() if len(values) != len(prompts)]
        if wrong:
            raise ValueError(
                f"{wrong[0]!r} of {model.name!r} does not have one value for each of {len(prompts)} rows."
            )
    if categories is not None and len(categories) != len(prompts):
        raise ValueError(f"There are {len(categories)} categories for {len(prompts)} rows; give one per row.")


def _scores(
    prompts: Sequence[str],
    before: ModelRows,
    after: ModelRows,
    trained: frozenset[str] | None,
    options: Mapping[str, Any],
    rows: Sequence[int] | None = None,
) -> list[Comparison]:
    """Compare all scores over all rows, or over the given ones; among these a score without any pair is left out."""
    found = []
    for name in before.scores:
        kept = range(len(prompts)) if rows is None else rows
        old, new = ([model.scores[name][row] for row in kept] for model in (before, after))
        if rows is not None and all(a is None or b is None for a, b in zip(old, new, strict=True)):
            continue
        texts = [prompts[row] for row in kept]
        found.append(compare_scores(name, old, new, texts, trained=name in (trained or ()), **options))
    return found


def _measures(
    prompts: Sequence[str], base: ModelRows, adapter: ModelRows, options: Mapping[str, Any]
) -> list[MeasureChange]:
    found = []
    for name in SPREADS:
        if name not in base.descriptors or name not in adapter.descriptors:
            continue
        sides = [model.descriptors[name] for model in (base, adapter)]
        # An image that one of the two models lacks is left out of both.
        kept = [row for row in range(len(prompts)) if all(side[row] is not None for side in sides)]
        texts = [prompts[row] for row in kept]
        old, new = (seed_spread([side[row] for row in kept], texts, cosine=name != SPREAD) for side in sides)
        if old:
            found.append(_change(name, list(old.values()), list(new.values()), list(old), options))
    for name in MEASURES:
        if name in base.measures and name in adapter.measures:
            old_values, new_values = base.measures[name], adapter.measures[name]
            if any(a is not None and b is not None for a, b in zip(old_values, new_values, strict=True)):
                found.append(_change(name, old_values, new_values, prompts, options))
    return found


def _change(
    name: str,
    before: Sequence[float | None],
    after: Sequence[float | None],
    prompts: Sequence[str],
    options: Mapping[str, Any],
) -> MeasureChange:
    rows = [row for row, pair in enumerate(zip(before, after, strict=True)) if None not in pair]
    old, new = (np.array([side[row] for row in rows], dtype=np.float64) for side in (before, after))
    clusters = clusters_of([prompts[row] for row in rows])
    means = bootstrap_means((old, new), clusters, options["num_resamples"], options["seed"])
    tail = (1 - options["confidence"]) / 2

    def interval(values: np.ndarray) -> tuple[float, float]:
        low, high = np.quantile(values, [tail, 1 - tail])
        return float(low), float(high)

    comparable = bool((means[0] > 0).all())  # no measure is negative
    return MeasureChange(
        name,
        float(old.mean()),
        float(new.mean()),
        float((new - old).mean()),
        interval(means[1] - means[0]),
        float(new.mean() / old.mean() - 1) if comparable else None,
        interval(means[1] / means[0] - 1) if comparable else None,
        len(rows),
    )


def _notices(adapters: Sequence[AdapterResult], num_prompts: int, num_rows: int, medium: str) -> list[str]:
    notices = []
    if num_prompts < FEW_PROMPTS:
        notices.append(
            f"Only {num_prompts} prompt{'s' if num_prompts > 1 else ''}: with fewer than about {FEW_PROMPTS} the "
            "bootstrap intervals are too narrow."
        )
    for adapter in adapters:
        if not adapter.trained_known:
            notices.append(
                f"{adapter.name}: it is not known which scores it was trained on, so none is marked. A rise of a "
                "score that was trained on is weak evidence."
            )
        elif all(comparison.trained for comparison in adapter.scores):
            notices.append(
                f"{adapter.name} was trained on every score here, so nothing shows whether the {medium}s got better "
                "by another measure. Add a score that it was not trained on."
            )
        for comparison in adapter.scores:
            if comparison.num_missing:
                notices.append(
                    f"{adapter.name}: {comparison.num_missing} of {num_rows} pairs have no {comparison.name}."
                )
        for measure in (measure for measure in adapter.measures if measure.notable):
            alike = measure.name in SPREADS and measure.mean_change < 0
            advice = f" The {medium}s of a prompt have become alike: look at them." if alike else ""
            notices.append(f"{adapter.name}: {measure.name} changed by {measure.text()} of the base model's.{advice}")
    if not any(measure.name in SPREADS for adapter in adapters for measure in adapter.measures):
        notices.append(
            f"One {medium} per prompt, so it was not measured whether the {medium}s of a prompt became alike."
        )
    return notices
