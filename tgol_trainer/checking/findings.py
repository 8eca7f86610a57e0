"""What is wrong with a dataset, what may be, and what is good to know, before a model is loaded."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal

import datasets
import numpy as np

from tgol_trainer.data.checks import check_columns, check_score_columns
from tgol_trainer.data.images import DataError, cropped_share
from tgol_trainer.data.rows import CAUSES, Columns
from tgol_trainer.thresholds import Threshold, ThresholdError, estimate_threshold

from .duplicates import DEFAULT_DISTANCE, group_marks
from .survey import CountLongPrompts, Survey, survey_rows

DEFAULT_RESOLUTION = (512, 512)
_SHOWN = 5
_CROPPED_SHARE_LIMIT = 0.1  # as in training
_EXTREME_CROP = 0.5

Level = Literal["problem", "warning", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """
    One thing found.

    Args:
        check (`str`):
            Its name, always the same; docs/checking.md lists them.
        level (`str`):
            `"problem"`: training refuses the data. `"warning"`: it trains, probably not as meant. `"note"`: good to
            know.
        count (`int`):
            Rows concerned, or groups or prompts where the text says so.
        text (`str`):
            What was found, for people.
        rows (`list[int]`):
            Numbers of the rows, from 0: all of them for problems, the first for others.
        remedy (`str`):
            What to change, code or advice; may be empty.
    """

    check: str
    level: Level
    count: int
    text: str
    rows: list[int] = dataclasses.field(default_factory=list)
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """
    Everything found in a dataset.

    Args:
        name (`str`):
            What the dataset was called.
        num_rows (`int`):
            Rows of the dataset.
        num_usable (`int`):
            Rows that training would use with `on_bad_sample="skip"`.
        findings (`list[Finding]`):
            Problems first, then warnings, then notes.
        facts (`dict[str, Any]`):
            Numbers about scores, prompts, sizes, modes and duplicates; JSON-serialisable.
    """

    name: str
    num_rows: int
    num_usable: int
    findings: list[Finding]
    facts: dict[str, Any]

    def of_level(self, level: Level) -> list[Finding]:
        """Return the findings of a level."""
        return [finding for finding in self.findings if finding.level == level]

    def exit_code(self, *, strict: bool = False) -> int:
        """Return 1 if there is a problem, or with `strict` a warning; else 0."""
        return int(bool(self.of_level("problem") or (strict and self.of_level("warning"))))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as a JSON-serialisable dictionary."""
        return dataclasses.asdict(self)


def diagnose(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: Columns,
    *,
    score_columns: Sequence[str] | None = None,
    name: str = "dataset",
    resolution: tuple[int, int] | None = None,
    count_long_prompts: CountLongPrompts | None = None,
    num_proc: int = 1,
    max_distance: int = DEFAULT_DISTANCE,
    progress: bool = True,
) -> Diagnosis:
    """
    Read a dataset once and say what training would refuse, by the checks that training uses, and what it would not.

    Args:
        dataset ([`datasets.Dataset`] or [`datasets.IterableDataset`]):
            With one prompt, image or video, and score a row.
        columns ([`Columns`]):
            Their names.
        score_columns (`Sequence[str]`, *optional*):
            Several columns of scores, as in [`TGOLConfig`], in place of that of `columns`.
        name (`str`, *optional*, defaults to `"dataset"`):
            What messages call it.
        resolution (`tuple[int, int]`, *optional*):
            (height, width) in pixels that will be trained on. Without it sizes are compared with 512 x 512 and found
            wanting in notes alone.
        count_long_prompts (`Callable`, *optional*):
            Counts prompts that the text encoder cuts, such as `ModelFamily.count_long_prompts`; without it they are
            not counted, and a note says so.
        num_proc (`int`, *optional*, defaults to 1):
            Processes that decode.
        max_distance (`int`, *optional*, defaults to 6):
            Bits of 256 in which near duplicates may differ, as in [`group_marks`].
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar.

    Returns:
        [`Diagnosis`]
    """
    try:
        check_columns(dataset, columns, name, scored=not score_columns)
        if score_columns:
            check_score_columns(dataset, score_columns, name)
        survey = survey_rows(
            dataset,
            columns,
            score_columns=score_columns,
            name=name,
            count_long_prompts=count_long_prompts,
            num_proc=num_proc,
            progress=progress,
        )
    except DataError as error:
        num_rows = len(dataset) if isinstance(dataset, datasets.Dataset) else 0
        return Diagnosis(name, num_rows, 0, [Finding("columns", "problem", num_rows, str(error))], {})
    findings, facts = _bad_rows(survey), {}
    if not survey.num_rows:
        findings.append(Finding("rows", "problem", 0, "There are no rows. Check the split and the filters."))
    elif not len(survey.rows):
        findings.append(Finding("rows", "problem", survey.num_rows, "No row can be used."))
    else:
        findings += _classes(survey, dataset.features)
        thresholds, about_scores, facts["scores"] = _scores(survey)
        about_prompts, facts["prompts"] = _prompts(survey, count_long_prompts is not None)
        about_sizes, facts["sizes"] = _sizes(survey, resolution)
        about_copies, facts["duplicates"] = _duplicates(survey, thresholds, max_distance)
        findings += [*about_scores, *about_prompts, *about_sizes, *_modes(survey), *about_copies]
        facts["modes"] = dict(survey.modes.most_common())
    order = {"problem": 0, "warning": 1, "note": 2}
    findings.sort(key=lambda finding: order[finding.level])
    return Diagnosis(name, survey.num_rows, len(survey.rows), findings, facts)


def _bad_rows(survey: Survey) -> list[Finding]:
    findings = []
    for cause, (role, _) in CAUSES.items():
        for column in survey.score_columns if role == "score" else [getattr(survey.columns, role)]:
            if (cause, column) in survey.bad_rows:
                rows, examples = survey.bad_rows[cause, column].tolist(), survey.bad.examples(cause, column)
                more = ", ..." if len(rows) > len(examples) else ""
                text = f"column {column!r}, {', '.join(examples)}{more}"
                findings.append(Finding(cause, "problem", len(rows), text, rows, survey.bad.remedy(cause, column)))
    return findings


def _classes(survey: Survey, features: datasets.Features | None) -> list[Finding]:
    findings = []
    for column in survey.score_columns:
        feature = (features or {}).get(column)
        if isinstance(feature, datasets.ClassLabel):
            first, last = feature.names[0], feature.names[-1]
            text = (
                f"column {column!r} holds classes; their numbers are used as scores, from 0 for {first!r} to "
                f"{len(feature.names) - 1} for {last!r}."
            )
            remedy = "If that order is not from worst to best, store numbers instead."
            findings.append(Finding("classes as scores", "warning", len(survey.rows), text, remedy=remedy))
    return findings


def _scores(survey: Survey) -> tuple[list[Threshold | None], list[Finding], dict[str, Any]]:
    """Return the threshold of each column, `None` where all of its scores are equal, findings, and facts by column."""
    thresholds: list[Threshold | None] = []
    findings, facts = [], {}
    for column, scores in zip(survey.score_columns, survey.scores.T, strict=True):
        facts[column], threshold = _score_facts(scores), None
        try:
            threshold = estimate_threshold(scores)
        except ThresholdError as error:
            findings.append(Finding("constant scores", "problem", len(scores), f"column {column!r}: {error}"))
        thresholds.append(threshold)
        if threshold is None:
            continue
        facts[column] |= {"threshold": threshold.value, "num_positive": threshold.num_positive}
        facts[column]["num_negative"] = threshold.num_negative
        if threshold.moved_from is not None:
            text = (
                f"column {column!r}: the median score equals the smallest, {threshold.moved_from:g}; training moves "
                f"the threshold to {threshold.value:g}: {threshold.num_positive} positive, {threshold.num_negative} "
                "negative."
            )
            findings.append(Finding("tied scores", "note", threshold.num_scores, text))
    return thresholds, findings, facts


def _score_facts(scores: np.ndarray) -> dict[str, Any]:
    values = np.unique(scores)
    facts: dict[str, Any] = {"min": float(values[0]), "max": float(values[-1]), "num_distinct": len(values)}
    with np.errstate(over="ignore"):  # of scores beyond 1e150
        facts |= {"mean": float(scores.mean()), "median": float(np.median(scores)), "std": float(scores.std())}
    return facts


def _prompts(survey: Survey, counted: bool) -> tuple[list[Finding], dict[str, Any]]:
    most = int(np.bincount(survey.prompt_ids).max())
    facts: dict[str, Any] = {"num_distinct": survey.num_prompts, "most_rows_of_one": most}
    facts |= {"token_limit": survey.token_limit, "num_too_long": survey.num_long_prompts if counted else None}
    if not counted:
        text = (
            "not checked against the limit of the text encoder: no model was named, and no CLIP "
            "tokenizer is on this machine."
        )
        return [Finding("prompt length", "note", 0, text, remedy="--model_name_or_path names the model.")], facts
    if not survey.num_long_prompts:
        return [], facts
    text = (
        f"the text encoder takes {survey.token_limit} tokens and does not see the end of {survey.num_long_prompts} of "
        f"{survey.num_prompts} prompts: "
        + ", ".join(f"row {row}: {prompt}" for row, prompt in survey.long_prompts.items())
    )
    text += ", ..." if survey.num_long_prompts > len(survey.long_prompts) else ""
    remedy = "Shorten them, with what matters first."
    rows = list(survey.long_prompts)
    return [Finding("prompt length", "warning", survey.num_long_prompts, text, rows, remedy)], facts


def _sizes(survey: Survey, resolution: tuple[int, int] | None) -> tuple[list[Finding], dict[str, Any]]:
    medium, rows, sizes = survey.columns.medium, survey.rows, survey.sizes
    level: Level = "note" if resolution is None else "warning"
    height, width = resolution or DEFAULT_RESOLUTION
    different, inverse, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    shares = np.array([cropped_share(int(w), int(h), (height, width)) for w, h in different])
    common = sorted(zip(counts.tolist(), different.tolist(), strict=True), reverse=True)[:_SHOWN]
    small = (sizes[:, 0] < width) | (sizes[:, 1] < height)
    tiny = (2 * sizes[:, 0] < width) | (2 * sizes[:, 1] < height)
    extreme = shares[inverse.reshape(-1)] > _EXTREME_CROP
    mean = float((shares * counts).sum() / counts.sum())
    facts = {
        "num_different": len(different),
        "most_common": [{"width": w, "height": h, "count": count} for count, (w, h) in common],
        "resolution": [height, width],
        "resolution_assumed": resolution is None,
        "num_smaller": int(small.sum()),
        "num_below_half": int(tiny.sum()),
        "mean_cropped_share": mean,
        "num_extreme_crops": int(extreme.sum()),
    }
    findings, target = [], f"{width}x{height} (width x height{', assumed' if resolution is None else ''})"
    if small.any():
        worst = np.flatnonzero(small)[np.argsort(sizes[small].min(axis=1), kind="stable")]
        text = (
            f"smaller than {target}, so that training enlarges and blurs them: {small.sum()} of {len(sizes)} "
            f"{medium}s, {tiny.sum()} of them by more than a factor of 2. The smallest: "
            f"{_with_sizes(rows, sizes, worst)}"
        )
        remedy = "Leave them out, or lower `resolution`."
        if resolution is None:
            remedy = "What is trained on is named by --model_name_or_path, or by --resolution."
        findings.append(Finding("small", level, int(small.sum()), text, rows[worst[:_SHOWN]].tolist(), remedy))
    if mean > _CROPPED_SHARE_LIMIT:
        text = f"the centre crop to {target} cuts away {100 * mean:.0f} % of the {medium} area on average."
        remedy = f"Set `resolution` to the shape of most {medium}s, or crop and score them yourself."
        findings.append(Finding("crop", level, len(sizes), text, remedy=remedy))
    if extreme.any():
        cut = np.flatnonzero(extreme)
        text = (
            f"the centre crop to {target} cuts away more than half of the area of {cut.size} of {len(sizes)} "
            f"{medium}s: {_with_sizes(rows, sizes, cut)}"
        )
        remedy = "Training sees a part of what was scored: leave them out, or crop and score them yourself."
        findings.append(Finding("extreme crop", level, cut.size, text, rows[cut[:_SHOWN]].tolist(), remedy))
    return findings, facts


def _with_sizes(rows: np.ndarray, sizes: np.ndarray, chosen: np.ndarray) -> str:
    shown = ", ".join(f"row {rows[i]}: {sizes[i, 0]}x{sizes[i, 1]}" for i in chosen[:_SHOWN])
    return shown + (", ..." if len(chosen) > _SHOWN else "")


def _modes(survey: Survey) -> list[Finding]:
    other = Counter({mode: count for mode, count in survey.modes.items() if mode not in ("RGB", "unknown")})
    if not other:
        return []
    total, rows = survey.modes.total(), {mode: survey.mode_rows[mode] for mode in other}
    shares = ", ".join(
        f"{mode} {100 * n / total:.3g} % ({_numbered(rows[mode], n)})" for mode, n in other.most_common()
    )
    text = f"images that are not RGB: {shares}. Transparency is laid over white, grey becomes three equal channels."
    return [Finding("colour mode", "note", other.total(), text, sorted(chain(*rows.values())))]


@dataclasses.dataclass(frozen=True)
class _Copies:
    """Groups of rows that count as one image with one prompt: where the rows of each stand, what its scores do."""

    order: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    different: np.ndarray
    opposite: np.ndarray

    def first(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Return the rows of the first groups of a choice; one more than is shown, where there are as many."""
        return [
            self.order[self.starts[index] : self.starts[index] + self.lengths[index]]
            for index in np.flatnonzero(chosen)[: _SHOWN + 1]
        ]

    def facts(self) -> dict[str, int]:
        sizes = {"groups": len(self.starts), "rows": int(self.lengths.sum())}
        return {**sizes, "different_scores": int(self.different.sum()), "opposite_labels": int(self.opposite.sum())}


def _two_labels(scores: np.ndarray, thresholds: list[Threshold | None]) -> list[bool]:
    """Say of each column whether the scores (n, K) of a group lie on both sides of its threshold."""
    sides = zip(scores.T, thresholds, strict=True)
    return [bool(t is not None and (column >= t.value).any() and (column < t.value).any()) for column, t in sides]


def _copies(
    images: np.ndarray, survey: Survey, thresholds: list[Threshold | None], pixels: np.ndarray | None = None
) -> _Copies:
    """Group rows by image and prompt; with `pixels`, only groups of different pixels count."""
    prompts = survey.prompt_ids
    order = np.lexsort((prompts, images))
    new = (np.diff(images[order]) != 0) | (np.diff(prompts[order]) != 0)
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    lengths = np.diff(np.append(starts, len(order)))
    counts = lengths > 1
    if pixels is not None:
        counts &= np.maximum.reduceat(pixels[order], starts) > np.minimum.reduceat(pixels[order], starts)
    scores = survey.scores[order]
    low, high = np.minimum.reduceat(scores, starts), np.maximum.reduceat(scores, starts)
    values = np.array([np.nan if threshold is None else threshold.value for threshold in thresholds])
    different, opposite = np.any(high > low, axis=1), np.any((low < values) & (high >= values), axis=1)
    return _Copies(order, starts[counts], lengths[counts], different[counts], opposite[counts])


def _duplicates(
    survey: Survey, thresholds: list[Threshold | None], max_distance: int
) -> tuple[list[Finding], dict[str, Any]]:
    medium, findings = survey.columns.medium, []
    pixels = np.unique(survey.digests, axis=0, return_inverse=True)[1].reshape(-1)
    exact = _copies(pixels, survey, thresholds)
    counts: dict[str, int] = exact.facts()
    facts: dict[str, Any] = {"exact": counts}
    if counts["different_scores"]:
        shown = exact.first(exact.opposite if counts["opposite_labels"] else exact.different)
        text = (
            f"the same {medium} with the same prompt has different scores; in {counts['opposite_labels']} of "
            f"{counts['different_scores']} groups they lie on both sides of the threshold: "
            f"{_with_scores(survey, shown, thresholds)}"
        )
        remedy = "Give each one score; `tgol convert ratings` makes one row an image with the mean."
        rows = _first_rows(survey, exact.first(exact.different))
        name = "duplicates with different scores"
        findings.append(Finding(name, "warning", counts["different_scores"], text, rows, remedy))
    num_same = counts["groups"] - counts["different_scores"]
    if num_same:
        same = exact.first(~exact.different)
        text = f"the same {medium} with the same prompt and score, several times; each counts as often: "
        findings.append(
            Finding("duplicates", "note", num_same, text + _listed(survey, same), _first_rows(survey, same))
        )
    pairs = np.unique(np.stack([pixels, survey.prompt_ids], axis=1), axis=0)
    shared = np.flatnonzero(np.bincount(pairs[:, 0]) > 1)
    facts["several_prompts"] = len(shared)
    if shared.size:
        groups = [np.flatnonzero(pixels == image) for image in shared[: _SHOWN + 1]]
        text = f"the same {medium} with more than one prompt: {_listed(survey, groups)}"
        findings.append(Finding("several prompts", "note", len(shared), text, _first_rows(survey, groups)))
    if survey.marks is None:
        return findings, facts
    near = _copies(group_marks(survey.marks, max_distance), survey, thresholds, pixels)
    counts = near.facts()
    facts["near"] = {"max_distance": max_distance, **counts}
    if counts["groups"]:
        shown = near.first(near.opposite if counts["opposite_labels"] else near.lengths)
        text = (
            f"images that look nearly the same, with the same prompt ({counts['rows']} rows); in "
            f"{counts['opposite_labels']} of {counts['groups']} groups the scores lie on both sides of the threshold: "
            f"{_with_scores(survey, shown, thresholds)}"
        )
        remedy = "Look at them: one image saved twice needs one score, different images may stay."
        level: Level = "warning" if counts["opposite_labels"] else "note"
        rows = _first_rows(survey, shown)
        findings.append(Finding("near duplicates", level, counts["groups"], text, rows, remedy))
    return findings, facts


def _with_scores(survey: Survey, groups: list[np.ndarray], thresholds: list[Threshold | None]) -> str:
    """Name of each group the rows with the lowest and the highest score, in the column that says most against them."""
    rows, scores, shown = survey.rows, survey.scores, []
    for group in groups[:_SHOWN]:
        found = scores[group]
        strength = np.sign(np.ptp(found, axis=0)) + _two_labels(found, thresholds)
        column = int(np.argmax(strength))
        ends = sorted({int(group[np.argmin(found[:, column])]), int(group[np.argmax(found[:, column])])})
        ends = ends if len(ends) > 1 else sorted(group[:2].tolist())
        name = "scores" if len(thresholds) == 1 else survey.score_columns[column]
        values = " and ".join(f"{scores[i, column]:g}" for i in ends)
        shown.append(f"rows {' and '.join(str(rows[i]) for i in ends)} ({name} {values})")
    return ", ".join(shown) + (", ..." if len(groups) > _SHOWN else "")


def _listed(survey: Survey, groups: list[np.ndarray]) -> str:
    """Name the first groups by their rows, of each a few."""
    shown = [_numbered(np.sort(survey.rows[group]).tolist(), len(group)) for group in groups[:_SHOWN]]
    return "; ".join(shown) + ("; ..." if len(groups) > _SHOWN else "")


def _numbered(rows: list[int], count: int) -> str:
    shown = ", ".join(map(str, rows[:_SHOWN])) + (", ..." if count > _SHOWN else "")
    return f"row{'s' if count > 1 else ''} {shown}"


def _first_rows(survey: Survey, groups: list[np.ndarray]) -> list[int]:
    return [int(row) for group in groups[:_SHOWN] for row in np.sort(survey.rows[group])]
