"""The report of an evaluation: one HTML file with tables, plots and a gallery, without any request to a network."""

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

from tgol_trainer.evaluation.comparison import Comparison, replace_file
from tgol_trainer.evaluation.measures import MEASURES, SPREADS
from tgol_trainer.evaluation.results import AdapterResult, Evaluation, MeasureChange, ModelRows, verdict
from tgol_trainer.evaluation.tables import interval_text, p_text, significant, trained_text

REPORT_MEGABYTES = 50
"""Default limit of the file: a browser opens it within seconds, and a mail or a Hub repository takes it."""
_TONES = {"better": "good", "worse": "bad", "no clear difference": ""}


@dataclasses.dataclass(frozen=True)
class Gallery:
    """
    The images of a report.

    Args:
        prompts (`Sequence[str]`):
            One a row.
        numbers (`Sequence[int]`):
            Number of each image among those of its prompt, from 0.
        thumbnails (`Sequence[Sequence[bytes | None]]`):
            One sequence a model, the base model first, of PNG or WebP images; `None` where there is none.
        previews (`Sequence[Sequence[bytes | None]]`):
            The same, larger; `None` where the thumbnail is all there is. A sequence may read each item when it is
            asked for.
        categories (`Sequence[str]`, *optional*):
            One a row.
    """

    prompts: Sequence[str]
    numbers: Sequence[int]
    thumbnails: Sequence[Sequence[bytes | None]]
    previews: Sequence[Sequence[bytes | None]]
    categories: Sequence[str] | None = None


def write_report(
    path: str | os.PathLike[str],
    evaluation: Evaluation,
    models: Sequence[ModelRows],
    gallery: Gallery,
    *,
    title: str = "Before and after",
    prompt_set: str = "",
    plots: Mapping[str, str | os.PathLike[str]] | None = None,
    settings: Mapping[str, Any] | None = None,
    megabytes: float = REPORT_MEGABYTES,
) -> str:
    """
    Write a report that one file holds: tables, plots, and a gallery that sorts by the change of a score.

    Args:
        path (`str` or `os.PathLike`):
            HTML file; missing folders are made.
        evaluation ([`Evaluation`]):
            The numbers.
        models (`Sequence[ModelRows]`):
            What they came from, the base model first.
        gallery ([`Gallery`]):
            The images.
        title (`str`, *optional*):
            Heading.
        prompt_set (`str`, *optional*, defaults to `""`):
            Name of the prompts.
        plots (`Mapping[str, path]`, *optional*):
            Name of an adapter to its plot, a PNG file.
        settings (`Mapping[str, Any]`, *optional*):
            How it was made, a line each.
        megabytes (`float`, *optional*, defaults to 50):
            Limit of the file. Where the images do not fit, those of the pairs that changed most are kept, all
            thumbnails before any larger image; numbers are always complete.

    Returns:
        `str`: what was left out and why, empty where nothing was.
    """
    engine = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    engine.filters.update(_FILTERS)
    folder = Path(__file__).parent
    style, script = ((folder / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    measured = dict.fromkeys(measure.name for adapter in evaluation.adapters for measure in adapter.measures)
    content = {
        "title": title,
        "prompt_set": prompt_set,
        "evaluation": evaluation,
        "level": f"{100 * evaluation.adapters[0].scores[0].confidence:.4g} %",
        "means": {kind: _means(evaluation, kind) for kind in ("mean", "median")},
        "measure_texts": {name: {**SPREADS, **MEASURES}[name] for name in measured},
        "key_measures": [*measured],
        "has_categories": any(adapter.categories for adapter in evaluation.adapters),
        "has_measures": bool(measured),
        "plots": [(name, _data_uri(Path(file).read_bytes())) for name, file in (plots or {}).items()],
        "settings": dict(settings or {}),
        "rows": _rows(evaluation, models, gallery),
        "style": style,
        "script": script,
        "style_hash": _digest(style),
        "script_hash": _digest(script),
    }
    template = engine.from_string((folder / "report.html.jinja").read_text(encoding="utf-8"))
    bare = len(template.render(**content, images="", image_note="").encode())
    thumbnails, previews, note = _chosen(models, gallery, megabytes, bare + 1000)
    images = json.dumps(
        {"thumbnails": _embedded(gallery.thumbnails, thumbnails), "previews": _embedded(gallery.previews, previews)},
        separators=(",", ":"),
    )
    replace_file(Path(path), template.render(**content, images=images, image_note=note))
    return note


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _means(evaluation: Evaluation, kind: str) -> list[tuple[str, list[tuple[str, bool]]]]:
    """Return (score, (number, whether trained on) of every model) rows."""
    lines = []
    for i, first in enumerate(evaluation.adapters[0].scores):
        found = [adapter.scores[i] for adapter in evaluation.adapters]
        numbers = significant(getattr(first, f"{kind}_before"), *(getattr(one, f"{kind}_after") for one in found))
        lines.append((first.name, list(zip(numbers, [False, *(one.trained for one in found)], strict=True))))
    return lines


def _rows(evaluation: Evaluation, models: Sequence[ModelRows], gallery: Gallery) -> dict[str, Any]:
    """Return what the script sorts and shows."""
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
        "scores": scores,
        "categories": categories,
        "ratio": _ratio(gallery),
        "first_score": trained.index(False) if False in trained else 0,
        "rows": rows,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.7g}")


def _importance(models: Sequence[ModelRows], count: int) -> np.ndarray:
    """Return how near each row comes to an end of the order by change, 0 to 1, of any score of any adapter."""
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
    """Return width over height of the first image, for the room that is kept until an image is decoded."""
    for thumbnails in gallery.thumbnails:
        for thumbnail in thumbnails:
            if thumbnail:
                width, height = Image.open(io.BytesIO(thumbnail)).size
                return round(width / height, 4)
    return 1.0


def _chosen(
    models: Sequence[ModelRows], gallery: Gallery, megabytes: float, used: int
) -> tuple[list[int], list[int], str]:
    """Return the rows whose thumbnails, and those whose previews, fit; and what is left out, in words."""
    count, room = len(gallery.prompts), megabytes * 1e6 - used
    order = np.argsort(-_importance(models, count), kind="stable").tolist()
    kept, left_out = [], []
    for kind in (gallery.thumbnails, gallery.previews):
        sizes = np.zeros(count)
        for model in kind:
            # base64, and what JSON adds; a row without any image takes no room.
            sizes += [4 * -(-len(image) // 3) + 16 if image else 0 for image in model]
        wanted = [row for row in order if sizes[row]]
        fitting = int((np.cumsum(sizes[wanted] + 16) <= room).sum())
        room -= float((sizes[wanted[:fitting]] + 16).sum())
        kept.append(sorted(wanted[:fitting]))
        left_out.append(len(wanted) - fitting)
    if not any(left_out):
        return kept[0], kept[1], ""
    note = (
        f"To stay below {megabytes:g} MB this file holds small images of {len(kept[0]):,} of {count:,} pairs and "
        f"large ones of {len(kept[1]):,}, of those that changed most in any score. Numbers are complete."
    )
    return kept[0], kept[1], note


def _embedded(kind: Sequence[Sequence[bytes | None]], rows: Sequence[int]) -> dict[int, list[str | None]]:
    found: dict[int, list[str | None]] = {row: [] for row in rows}
    for model in kind:
        for row in rows:
            image = model[row]
            found[row].append(base64.b64encode(image).decode() if image else None)
    return found


def _numbers(measure: MeasureChange) -> list[str]:
    return significant(measure.mean_before, measure.mean_after)


def _mean_change(comparison: Comparison) -> str:
    change, low, high = significant(comparison.mean_change, *comparison.mean_change_interval)
    return f"{change} [{low}, {high}]"


def _summary(adapter: AdapterResult) -> str:
    """Return one sentence on what got better, worse and different."""
    groups: dict[str, list[str]] = {"better": [], "worse": [], "no clear difference": []}
    for comparison in adapter.scores:
        mark = " (trained on)" if comparison.trained else ""
        groups[verdict(comparison)].append(f"{comparison.name}{mark}")
    words = {"better": "better on", "worse": "worse on", "no clear difference": "no clear difference in"}
    parts = [f"{words[kind]} {', '.join(names)}" for kind, names in groups.items() if names]
    notable = [f"{measure.name} {measure.text()}" for measure in adapter.measures if measure.notable]
    if notable:
        parts.append(f"changed by a tenth or more: {', '.join(notable)}")
    return "; ".join(parts) + "."


_FILTERS = {
    "change": MeasureChange.text,
    "interval": interval_text,
    "mean_change": _mean_change,
    "numbers": _numbers,
    "p": p_text,
    "summary": _summary,
    "tone": lambda comparison: _TONES[verdict(comparison)],
    "trained": trained_text,
    "verdict": verdict,
    "win": lambda comparison: f"{100 * comparison.win_rate:.1f} %",
}
