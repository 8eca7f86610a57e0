"""Check a dataset before training: list problems that training refuses, warnings and notes."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any, Literal, get_args

import datasets
import numpy as np

from tgol_trainer.data.buckets import Buckets
from tgol_trainer.data.checks import check_columns, check_score_columns
from tgol_trainer.data.images import DataError, cropped_share
from tgol_trainer.data.prompts import REMEDY
from tgol_trainer.data.rows import CAUSES, Columns
from tgol_trainer.thresholds import Threshold, ThresholdError, estimate_threshold, shown

from .duplicates import DEFAULT_DISTANCE, group_marks
from .limits import ModelLimits
from .survey import Survey, survey_rows

_DEFAULT_RESOLUTION = (512, 512)
_SHOWN = 5
_CROPPED_SHARE_LIMIT = 0.1  # as in training
_EXTREME_CROP = 0.5
_LARGEST_MARGIN = 1e29  # with which training refuses the weight of the default settings

Level = Literal["problem", "warning", "note"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """
    One thing that a check found.

    Args:
        check (`str`): Name of the check; docs/checking.md lists them.
        level (`str`):
            `"problem"`: training refuses the data. `"warning"`: it trains, probably not as meant. `"note"`: good to
            know.
        count (`int`): Rows concerned, or groups or prompts where the text says so.
        text (`str`): What was found, for people.
        rows (`list[int]`): Numbers of the rows, from 0: all of them for bad rows, the first for others.
        remedy (`str`): What to change, code or advice; may be empty.
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
    Everything that was found in a dataset.

    Args:
        name (`str`): What the dataset was called.
        num_rows (`int`): Rows of the dataset.
        num_usable (`int`): Rows that training would use with `on_bad_sample="skip"`.
        findings (`list[Finding]`): Problems first, then warnings, then notes.
        facts (`dict[str, Any]`):
            Numbers about scores, prompts, sizes, modes and duplicates; docs/checking.md lists them.
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
        """Return everything for JSON; infinite numbers, which come of scores beyond 1e150, are `None`."""
        plain: dict[str, Any] = _without_infinities(dataclasses.asdict(self))
        return plain


def _without_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_infinities(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def diagnose(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: Columns,
    *,
    score_columns: Sequence[str] | None = None,
    limits: ModelLimits | None = None,
    name: str = "dataset",
    num_proc: int = 1,
    max_distance: int = DEFAULT_DISTANCE,
    progress: bool = True,
) -> Diagnosis:
    """
    Read a dataset once, apply the checks of training to every row, and look for what training does not check.

    Args:
        dataset ([`datasets.Dataset`] or [`datasets.IterableDataset`]): One prompt, image or video, and score per row.
        columns ([`Columns`]): Their names.
        score_columns (`Sequence[str]`, *optional*):
            Several columns of scores, as in [`TGOLConfig`], in place of the score column of `columns`.
        limits ([`ModelLimits`], *optional*):
            Resolution and prompt length of the model that will be trained; see [`load_limits`].
        name (`str`, *optional*, defaults to `"dataset"`): What messages call the dataset.
        num_proc (`int`, *optional*, defaults to 1): Processes that decode.
        max_distance (`int`, *optional*, defaults to 6):
            Bits of 256 in which near duplicates may differ, as in [`group_marks`].
        progress (`bool`, *optional*, defaults to `True`): Show a bar.

    Returns:
        [`Diagnosis`]
    """
    limits = limits or ModelLimits()
    try:
        check_columns(dataset, columns, name, scored=not score_columns)
        if score_columns:
            check_score_columns(dataset, score_columns, name)
        survey = survey_rows(
            dataset,
            columns,
            score_columns=score_columns,
            name=name,
            count_long_prompts=limits.count_long_prompts,
            num_proc=num_proc,
            progress=progress,
        )
    except DataError as error:
        num_rows = len(dataset) if isinstance(dataset, datasets.Dataset) else 0
        return Diagnosis(name, num_rows, 0, [Finding("columns", "problem", num_rows, str(error))], {})
    findings, facts = _bad_rows(survey), {}
    if not survey.num_rows:
        findings.append(Finding("rows", "problem", 0, "There are no rows. Check the split and the filters."))
    elif not len(survey.table):
        findings.append(Finding("rows", "problem", survey.num_rows, "No row can be used."))
    else:
        findings += _classes(survey, dataset.features)
        thresholds, about_scores, facts["scores"] = _scores(survey)
        about_prompts, facts["prompts"] = _prompts(survey, counted=limits.count_long_prompts is not None)
        about_sizes, facts["sizes"] = _sizes(survey, limits)
        about_copies, facts["duplicates"] = _duplicates(survey, thresholds, max_distance)
        findings += [
            *about_scores,
            *about_prompts,
            *about_sizes,
            *_modes(survey),
            *_several_frames(survey),
            *about_copies,
        ]
        facts["modes"] = dict(_count_modes(survey).most_common())
    findings.sort(key=lambda finding: get_args(Level).index(finding.level))
    return Diagnosis(name, survey.num_rows, len(survey.table), findings, facts)


def _first(items: Iterable[str], total: int, separator: str = ", ") -> str:
    """Join the first few of `total` items; dots stand for the others."""
    return separator.join([*islice(items, _SHOWN), *(["..."] if total > _SHOWN else [])])


def _numbered(rows: list[int], count: int) -> str:
    return f"row{'s' if count > 1 else ''} {_first(map(str, rows), count)}"


def _bad_rows(survey: Survey) -> list[Finding]:
    findings = []
    for cause, (role, _) in CAUSES.items():
        for column in survey.score_columns if role == "score" else [getattr(survey.columns, role)]:
            if (cause, column) in survey.bad_rows:
                rows = survey.bad_rows[cause, column]
                text = f"column {column!r}, {_first(survey.bad.examples(cause, column), len(rows))}"
                findings.append(Finding(cause, "problem", len(rows), text, rows, survey.bad.remedy(cause, column)))
    return findings


def _classes(survey: Survey, features: datasets.Features | None) -> list[Finding]:
    findings = []
    for column in survey.score_columns:
        feature = (features or {}).get(column)
        if isinstance(feature, datasets.ClassLabel):
            text = (
                f"column {column!r} holds classes; their numbers are used as scores, from 0 for {feature.names[0]!r} "
                f"to {len(feature.names) - 1} for {feature.names[-1]!r}."
            )
            remedy = "If that order is not from worst to best, store numbers instead."
            findings.append(Finding("classes as scores", "warning", len(survey.table), text, remedy=remedy))
    return findings


def _scores(survey: Survey) -> tuple[list[Threshold | None], list[Finding], dict[str, Any]]:
    """Return the threshold of each column (`None` if all of its scores are equal), findings, and facts by column."""
    thresholds: list[Threshold | None] = []
    findings, facts = [], {}
    for column, scores in zip(survey.score_columns, survey.table["scores"].T, strict=True):
        values = np.unique(scores)
        found: dict[str, Any] = {"min": float(values[0]), "max": float(values[-1]), "num_distinct": len(values)}
        with np.errstate(over="ignore"):  # of scores beyond 1e150
            found |= {"mean": float(scores.mean()), "median": float(np.median(scores)), "std": float(scores.std())}
        facts[column], threshold = found, None
        try:
            threshold = estimate_threshold(scores)
        except ThresholdError as error:
            findings.append(Finding("constant scores", "problem", len(scores), f"column {column!r}: {error}"))
        thresholds.append(threshold)
        if threshold is None:
            continue
        found |= {"threshold": threshold.value, "num_positive": threshold.num_positive}
        found["num_negative"] = threshold.num_negative
        if max(threshold.value - values[0], values[-1] - threshold.value) > _LARGEST_MARGIN:
            extent = f"from {values[0]:g} to {values[-1]:g}"
            text = f"column {column!r}: scores {extent} give weights that float32 cannot hold."
            remedy = "Such numbers often stand for a missing score: remove these rows, or set `score_normalization`."
            findings.append(Finding("scores too large", "warning", len(scores), text, remedy=remedy))
        if threshold.moved_from is not None:
            lowest, moved = (shown(value, found["std"]) for value in (threshold.moved_from, threshold.value))
            text = (
                f"column {column!r}: the median score equals the smallest, {lowest:g}; training moves "
                f"the threshold to {moved:g}: {threshold.num_positive} positive, {threshold.num_negative} "
                "negative."
            )
            findings.append(Finding("tied scores", "note", threshold.num_scores, text))
    return thresholds, findings, facts


def _prompts(survey: Survey, *, counted: bool) -> tuple[list[Finding], dict[str, Any]]:
    number = survey.num_long_prompts
    facts = {
        "num_distinct": survey.num_prompts,
        "most_rows_of_one": int(np.bincount(survey.table["prompt"]).max()),
        "token_limit": survey.token_limit,
        "num_too_long": number if counted else None,
    }
    findings = []
    if survey.foreign_prompts:
        rows = sorted(set(chain(*survey.foreign_prompts.values())))
        kinds = (
            f"{kind} in {len(found)} ({_numbered(found[:_SHOWN], len(found))})"
            for kind, found in survey.foreign_prompts.items()
        )
        text = f"what other programs read as instructions, and the text encoder as words: {', '.join(kinds)}."
        findings.append(Finding("prompt syntax", "warning", len(rows), text, rows[:_SHOWN], REMEDY))
    if not counted:
        text = (
            "not checked against the limit of the text encoder: no model was named, and no CLIP tokenizer is on this "
            "machine."
        )
        remedy = "Name the model with --model_name_or_path."
        return [*findings, Finding("prompt length", "note", 0, text, remedy=remedy)], facts
    if not number:
        return findings, facts
    text = (
        f"the text encoder takes {survey.token_limit} tokens and does not see the end of {number} of "
        f"{survey.num_prompts} prompts: "
    )
    text += _first((f"row {row}: {prompt}" for row, prompt in survey.long_prompts.items()), number)
    remedy = "Shorten them, with what matters first."
    findings.append(Finding("prompt length", "warning", number, text, list(survey.long_prompts), remedy))
    return findings, facts


def _sizes(survey: Survey, limits: ModelLimits) -> tuple[list[Finding], dict[str, Any]]:
    resolution = limits.resolution
    medium, rows, sizes = survey.columns.medium, survey.table["row"], survey.table["size"]
    level: Level = "note" if resolution is None else "warning"
    height, width = resolution or _DEFAULT_RESOLUTION
    different, inverse, counts = np.unique(sizes, axis=0, return_inverse=True, return_counts=True)
    buckets = Buckets((height, width), limits.multiple, limits.max_side)
    bucket = buckets.of(different)
    trained = buckets.sizes[bucket]
    shares = np.array(
        [
            cropped_share(w, h, (tall, wide))
            for (w, h), (tall, wide) in zip(different.tolist(), trained.tolist(), strict=True)
        ]
    )
    filled = np.bincount(bucket, weights=counts, minlength=len(buckets.sizes)).astype(int)
    common = sorted(zip(counts.tolist(), different.tolist(), strict=True), reverse=True)[:_SHOWN]
    needed = trained[inverse.reshape(-1), ::-1]
    small, tiny = (sizes < needed).any(axis=1), (2 * sizes < needed).any(axis=1)
    extreme = shares[inverse.reshape(-1)] > _EXTREME_CROP
    mean = float((shares * counts).sum() / counts.sum())
    facts = {
        "num_different": len(different),
        "most_common": [{"width": w, "height": h, "count": count} for count, (w, h) in common],
        "buckets": [
            {"width": wide, "height": tall, "count": count}
            for count, (tall, wide) in sorted(zip(filled.tolist(), buckets.sizes.tolist(), strict=True), reverse=True)
            if count
        ],
        "resolution": [height, width],
        "resolution_assumed": resolution is None,
        "num_smaller": int(small.sum()),
        "num_below_half": int(tiny.sum()),
        "mean_cropped_share": mean,
        "num_extreme_crops": int(extreme.sum()),
    }

    def finding(check: str, chosen: np.ndarray, text: str, remedy: str) -> Finding:
        examples = (f"row {rows[i]}: {sizes[i, 0]}x{sizes[i, 1]}" for i in chosen)
        text += _first(examples, chosen.size)
        return Finding(check, level, chosen.size, text, rows[chosen[:_SHOWN]].tolist(), remedy)

    findings, target = [], f"{width}x{height} (width x height{', assumed' if resolution is None else ''})"
    if small.any():
        smallest = np.flatnonzero(small)[np.argsort(sizes[small].min(axis=1), kind="stable")]
        text = (
            f"smaller than {target}, so that training enlarges and blurs them: {small.sum()} of {len(sizes)} "
            f"{medium}s, {tiny.sum()} of them by more than a factor of 2. The smallest: "
        )
        remedy = "Leave them out, or lower `resolution`."
        if resolution is None:
            remedy = "Name the model with --model_name_or_path, or its size with --resolution."
        findings.append(finding("small", smallest, text, remedy))
    if mean > _CROPPED_SHARE_LIMIT:
        text = f"the centre crop to the nearest shape cuts away {100 * mean:.0f} % of the {medium} area on average."
        remedy = f"Training takes shapes from 1:2 to 2:1: crop and score other {medium}s yourself."
        findings.append(Finding("crop", level, len(sizes), text, remedy=remedy))
    if extreme.any():
        text = (
            f"the centre crop to the nearest shape cuts away more than half of the area of {extreme.sum()} of "
            f"{len(sizes)} {medium}s: "
        )
        remedy = "Training sees a part of what was scored: leave them out, or crop and score them yourself."
        findings.append(finding("extreme crop", np.flatnonzero(extreme), text, remedy))
    return findings, facts


def _count_modes(survey: Survey) -> Counter[str]:
    return Counter(survey.table["mode"].astype(str).tolist())


def _modes(survey: Survey) -> list[Finding]:
    modes = _count_modes(survey)
    other = {mode: count for mode, count in modes.most_common() if mode not in ("RGB", "unknown")}
    if not other:
        return []
    rows = {mode: survey.table["row"][survey.table["mode"] == mode.encode()][:_SHOWN].tolist() for mode in other}
    shares = (f"{mode} {100 * n / modes.total():.3g} % ({_numbered(rows[mode], n)})" for mode, n in other.items())
    text = (
        f"images that are not RGB: {', '.join(shares)}. Transparency is laid over white, grey becomes three equal "
        "channels."
    )
    return [Finding("colour mode", "note", sum(other.values()), text, sorted(chain(*rows.values())))]


def _several_frames(survey: Survey) -> list[Finding]:
    """Animations, pages and further images of a file, of which the first alone is used."""
    several = survey.table["several"]
    rows = survey.table["row"][several != b""].tolist()
    if not rows:
        return []
    kinds = ", ".join(f"{kind} {n}" for kind, n in Counter(several[several != b""].astype(str).tolist()).most_common())
    text = f"files with more than one image (frames, pages), of which the first is used: {kinds} "
    text += f"({_numbered(rows[:_SHOWN], len(rows))})."
    # Phones and cameras write MPO: the photo, then a preview or a second view of it.
    level: Level = "note" if set(several.tolist()) <= {b"", b"MPO"} else "warning"
    remedy = "If another frame was scored, save it as a file of its own." if level == "warning" else ""
    return [Finding("several frames", level, len(rows), text, rows[:_SHOWN], remedy)]


@dataclasses.dataclass(frozen=True)
class _Copies:
    """Groups of rows that show one image with one prompt."""

    order: np.ndarray  # rows sorted by group
    starts: np.ndarray  # of each group in that order
    lengths: np.ndarray
    different: np.ndarray  # bool: a group's scores differ
    opposite: np.ndarray  # bool: they lie on both sides of the threshold

    def first(self, chosen: np.ndarray) -> list[np.ndarray]:
        """Return the rows of the first chosen groups, of one group more than is shown if there are as many."""
        return [
            self.order[self.starts[index] : self.starts[index] + self.lengths[index]]
            for index in np.flatnonzero(chosen)[: _SHOWN + 1]
        ]

    def facts(self) -> dict[str, int]:
        return {
            "groups": len(self.starts),
            "rows": int(self.lengths.sum()),
            "different_scores": int(self.different.sum()),
            "opposite_labels": int(self.opposite.sum()),
        }


def _group_copies(
    images: np.ndarray, survey: Survey, thresholds: list[Threshold | None], pixels: np.ndarray | None = None
) -> _Copies:
    """Group rows by image and prompt; with `pixels`, only groups of different pixels count."""
    prompts = survey.table["prompt"]
    order = np.lexsort((prompts, images))
    new = (np.diff(images[order]) != 0) | (np.diff(prompts[order]) != 0)
    starts = np.concatenate([[0], np.flatnonzero(new) + 1])
    lengths = np.diff(np.append(starts, len(order)))
    counts = lengths > 1
    if pixels is not None:
        counts &= np.maximum.reduceat(pixels[order], starts) > np.minimum.reduceat(pixels[order], starts)
    scores = survey.table["scores"][order]
    low, high = np.minimum.reduceat(scores, starts), np.maximum.reduceat(scores, starts)
    different, opposite = np.any(high > low, axis=1), np.any(_opposite(low, high, thresholds), axis=1)
    return _Copies(order, starts[counts], lengths[counts], different[counts], opposite[counts])


def _opposite(low: np.ndarray, high: np.ndarray, thresholds: list[Threshold | None]) -> np.ndarray:
    """Return for each of K columns whether its threshold lies between its lowest and highest score (..., K)."""
    values = np.array([np.nan if threshold is None else threshold.value for threshold in thresholds])
    return np.asarray((low < values) & (high >= values))


def _duplicates(
    survey: Survey, thresholds: list[Threshold | None], max_distance: int
) -> tuple[list[Finding], dict[str, Any]]:
    medium, table, findings = survey.columns.medium, survey.table, []

    def add(check: str, level: Level, count: int, text: str, groups: list[np.ndarray], remedy: str = "") -> None:
        rows = [int(row) for group in groups[:_SHOWN] for row in np.sort(table["row"][group])]
        findings.append(Finding(check, level, count, text, rows, remedy))

    pixels = np.unique(table["digest"], axis=0, return_inverse=True)[1].reshape(-1)
    exact = _group_copies(pixels, survey, thresholds)
    counts = exact.facts()
    if counts["different_scores"]:
        shown = exact.first(exact.opposite if counts["opposite_labels"] else exact.different)
        text = (
            f"the same {medium} with the same prompt has different scores; in {counts['opposite_labels']} of "
            f"{counts['different_scores']} groups they lie on both sides of the threshold: "
            f"{_with_scores(survey, shown, thresholds)}"
        )
        remedy = "Give each one score; `tgol convert ratings` makes one row per image with the mean."
        name, number = "duplicates with different scores", counts["different_scores"]
        add(name, "warning", number, text, exact.first(exact.different), remedy)
    num_same = counts["groups"] - counts["different_scores"]
    if num_same:
        same = exact.first(~exact.different)
        text = f"the same {medium} with the same prompt and score, several times; each counts as often: "
        add("duplicates", "note", num_same, text + _listed(survey, same), same)
    pairs = np.unique(np.stack([pixels, table["prompt"]], axis=1), axis=0)
    shared = np.flatnonzero(np.bincount(pairs[:, 0]) > 1)
    facts: dict[str, Any] = {"exact": counts, "several_prompts": len(shared)}
    if shared.size:
        groups = [np.flatnonzero(pixels == image) for image in shared[: _SHOWN + 1]]
        text = f"the same {medium} with more than one prompt: {_listed(survey, groups)}"
        add("several prompts", "note", len(shared), text, groups)
    if survey.columns.video is not None:
        return findings, facts
    near = _group_copies(group_marks(table["mark"], max_distance), survey, thresholds, pixels)
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
        add("near duplicates", level, counts["groups"], text, shown, remedy)
    return findings, facts


def _with_scores(survey: Survey, groups: list[np.ndarray], thresholds: list[Threshold | None]) -> str:
    """Name the rows of the lowest and the highest score of each group, in its column that differs most clearly."""
    rows, scores, shown = survey.table["row"], survey.table["scores"], []
    for group in groups[:_SHOWN]:
        low, high = scores[group].min(axis=0), scores[group].max(axis=0)
        column = int(np.argmax((high > low).astype(int) + _opposite(low, high, thresholds)))
        found = scores[group, column]
        ends = sorted({int(group[np.argmin(found)]), int(group[np.argmax(found)])})
        ends = ends if len(ends) > 1 else sorted(group[:2].tolist())
        name = "scores" if len(thresholds) == 1 else survey.score_columns[column]
        values = " and ".join(f"{scores[i, column]:g}" for i in ends)
        shown.append(f"rows {' and '.join(str(rows[i]) for i in ends)} ({name} {values})")
    return _first(shown, len(groups))


def _listed(survey: Survey, groups: list[np.ndarray]) -> str:
    """Name the first groups by the first rows of each."""
    shown = (_numbered(np.sort(survey.table["row"][group]).tolist(), len(group)) for group in groups)
    return _first(shown, len(groups), "; ")
