"""Write the report of an evaluation: one HTML file with tables, plots and a gallery that needs no network."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from tgol_trainer._files import write_file
from tgol_trainer.evaluation.comparison import Comparison
from tgol_trainer.evaluation.previews import PREVIEW_FORMATS
from tgol_trainer.evaluation.results import AdapterResult, Evaluation, MeasureChange, ModelRows, verdict
from tgol_trainer.evaluation.tables import (
    average_rows,
    interval_text,
    level_text,
    measure_texts,
    p_text,
    significant,
    trained_text,
)

REPORT_MEGABYTES = 50
"""Default limit of the file: a browser opens such a file within seconds, and a mail or a Hub repository accepts it."""
_UNCLEAR = "no clear difference"
_TONES = {"better": "good", "worse": "bad", _UNCLEAR: ""}


@dataclasses.dataclass(frozen=True)
class Gallery:
    """
    The images of a report.

    Args:
        prompts (`Sequence[str]`): One per row.
        numbers (`Sequence[int]`): Number of each image among those of its prompt, from 0.
        thumbnails (`Sequence[Sequence[bytes | None]]`):
            One sequence per model, the base model first, of PNG or WebP images; `None` for a missing image.
        previews (`Sequence[Sequence[bytes | None]]`):
            The same images, larger; `None` if the thumbnail is as large. A sequence may read an item when it is
            indexed.
        categories (`Sequence[str]`, *optional*): One per row.
    """

    prompts: Sequence[str]
    numbers: Sequence[int]
    thumbnails: Sequence[Sequence[bytes | None]]
    previews: Sequence[Sequence[bytes | None]]
    categories: Sequence[str] | None = None


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """
    What a report says beside its numbers, and how large it may be.

    Args:
        title (`str`, *optional*, defaults to `"Before and after"`): Heading.
        prompt_set (`str`, *optional*, defaults to `""`): Name of the prompts.
        settings (`Mapping[str, Any]`, *optional*):
            Settings of the run: one line each in the report, and the entry `settings` of metrics.json.
        megabytes (`float`, *optional*, defaults to 50):
            Limit of the file. If the images do not fit, the pairs that changed most keep theirs, and all thumbnails
            come before any larger image. Numbers are always complete.
    """

    title: str = "Before and after"
    prompt_set: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    megabytes: float = REPORT_MEGABYTES


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    models: Sequence[ModelRows],
    gallery: Gallery,
    options: ReportOptions | None = None,
    *,
    plots: Mapping[str, str | os.PathLike[str]] | None = None,
) -> str:
    """
    Write a report into one file: tables, plots, and a gallery that sorts by the change of a score.

    Args:
        path (`str` or `os.PathLike`): HTML file; missing folders are made.
        evaluation ([`Evaluation`]): The numbers.
        models (`Sequence[ModelRows]`): The rows that were compared, the base model first.
        gallery ([`Gallery`]): The images.
        options ([`ReportOptions`], *optional*): Title, prompts, settings and limit.
        plots (`Mapping[str, path]`, *optional*): Name of an adapter to its plot, a PNG file.

    Returns:
        `str`: which images were left out and why, or an empty text.
    """
    options = options or ReportOptions()
    engine = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.filters.update(_FILTERS)
    folder = Path(__file__).parent
    style, script = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    content = {
        "title": options.title,
        "prompt_set": options.prompt_set,
        "settings": options.settings,
        "evaluation": evaluation,
        "medium": evaluation.medium,
        "level": level_text(evaluation),
        "averages": {average: average_rows(evaluation, average) for average in ("mean", "median")},
        "measure_texts": measure_texts(evaluation),
        "has_categories": any(adapter.categories for adapter in evaluation.adapters),
        "plots": {name: _base64(Path(file).read_bytes()) for name, file in (plots or {}).items()},
        "rows": _rows(evaluation, models, gallery),
        "style": style,
        "script": script,
        "style_hash": _base64(hashlib.sha256(style.encode()).digest()),
        "script_hash": _base64(hashlib.sha256(script.encode()).digest()),
    }
    template = engine.from_string((folder / "report.html.jinja").read_text(encoding="utf-8"))
    bare = len(template.render(**content, images="", image_note="").encode())
    thumbnails, previews, note = _fitting(models, gallery, options.megabytes, bare + 1000)
    images = json.dumps(
        {"thumbnails": _embedded(gallery.thumbnails, thumbnails), "previews": _embedded(gallery.previews, previews)},
        separators=(",", ":"),
    )
    write_file(path, template.render(**content, images=images, image_note=note))
    return note


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _rows(evaluation: Evaluation, models: Sequence[ModelRows], gallery: Gallery) -> dict[str, Any]:
    """Return the data that the script sorts and shows."""
    scores = list(models[0].scores)
    trained = [comparison.trained for comparison in evaluation.adapters[0].scores]
    categories = list(dict.fromkeys(gallery.categories or ()))
    place = {name: index for index, name in enumerate(categories)}
    rows = []
    for row, (prompt, number) in enumerate(zip(gallery.prompts, gallery.numbers, strict=True)):
        values = [[_rounded(model.scores[name][row]) for name in scores] for model in models]
        category = place[gallery.categories[row]] if gallery.categories else -1
        rows.append({"prompt": prompt, "number": int(number), "category": category, "values": values})
    return {
        "models": [model.name for model in models],
        "medium": evaluation.medium,
        "scores": scores,
        "categories": categories,
        "ratio": _ratio(gallery),
        "first_score": trained.index(False) if False in trained else 0,
        "rows": rows,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")


def _importance(models: Sequence[ModelRows], count: int) -> np.ndarray:
    """Return how close each row comes to an end of the order by change, 0 to 1, for any score of any adapter."""
    nearest = np.zeros(count)
    base, *adapters = models
    for adapter in adapters:
        for name, before in base.scores.items():
            change = np.array(adapter.scores[name], dtype=float) - np.array(before, dtype=float)
            known = np.flatnonzero(np.isfinite(change))
            _, places, counts = np.unique(change[known], return_inverse=True, return_counts=True)
            ranks = (np.cumsum(counts) - (counts + 1) / 2)[places]  # equal changes share their mean rank
            nearest[known] = np.maximum(nearest[known], np.abs(2 * ranks / max(known.size - 1, 1) - 1))
    return nearest


def _ratio(gallery: Gallery) -> float:
    """Return width over height of the first image, for the space that is kept until an image is decoded."""
    first = next((thumbnail for thumbnails in gallery.thumbnails for thumbnail in thumbnails if thumbnail), None)
    if first is None:
        return 1.0
    width, height = Image.open(io.BytesIO(first), formats=PREVIEW_FORMATS).size
    return round(width / height, 4)


def _fitting(
    models: Sequence[ModelRows], gallery: Gallery, megabytes: float, used: int
) -> tuple[list[int], list[int], str]:
    """Return the rows whose thumbnails fit, the rows whose previews fit, and a note on the images left out."""
    count, room = len(gallery.prompts), megabytes * 1e6 - used
    order = np.argsort(-_importance(models, count), kind="stable").tolist()
    kept, left_out = [], []
    for kind in (gallery.thumbnails, gallery.previews):
        sizes = np.zeros(count)
        for model in kind:
            # The size in base64 and the signs that JSON adds; a missing image takes no space.
            sizes += [4 * -(-len(image) // 3) + 16 if image else 0 for image in model]
        wanted = [row for row in order if sizes[row]]
        fitting = int((np.cumsum(sizes[wanted] + 16) <= room).sum())
        room -= float((sizes[wanted[:fitting]] + 16).sum())
        kept.append(sorted(wanted[:fitting]))
        left_out.append(len(wanted) - fitting)
    if not any(left_out):
        return kept[0], kept[1], ""
    note = (
        f"To stay below {megabytes:g} MB, this file holds small copies of {len(kept[0]):,} of {count:,} pairs and "
        f"large ones of {len(kept[1]):,}: the pairs that changed most in any score. Numbers are complete."
    )
    return kept[0], kept[1], note


def _embedded(kind: Sequence[Sequence[bytes | None]], rows: Sequence[int]) -> dict[int, list[str | None]]:
    found: dict[int, list[str | None]] = {row: [] for row in rows}
    for model in kind:  # a model at a time, since its previews are read shard by shard
        for row in rows:
            image = model[row]
            found[row].append(_base64(image) if image else None)
    return found


def _mean_change(comparison: Comparison) -> str:
    change, low, high = significant(comparison.mean_change, *comparison.mean_change_interval)
    return f"{change} [{low}, {high}]"


def _summary(adapter: AdapterResult) -> str:
    """Return one sentence on what got better, what got worse and what changed."""
    parts = []
    for kind, words in (("better", "better on"), ("worse", "worse on"), (_UNCLEAR, f"{_UNCLEAR} in")):
        found = [comparison for comparison in adapter.scores if verdict(comparison) == kind]
        if found:
            names = (f"{one.name}{' (trained on)' if one.trained else ''}" for one in found)
            parts.append(f"{words} {', '.join(names)}")
    notable = [f"{measure.name} {measure.text()}" for measure in adapter.measures if measure.notable]
    if notable:
        parts.append(f"changed by a tenth or more: {', '.join(notable)}")
    return "; ".join(parts) + "."


_FILTERS = {
    "change": MeasureChange.text,
    "interval": interval_text,
    "mean_change": _mean_change,
    "numbers": lambda measure: significant(measure.mean_before, measure.mean_after),
    "p": p_text,
    "summary": _summary,
    "tone": lambda comparison: _TONES[verdict(comparison)],
    "trained": trained_text,
    "verdict": verdict,
    "win": lambda comparison: f"{100 * comparison.win_rate:.1f} %",
}
