"""The files of an evaluation: metrics.json, tables, plots and the report."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from .comparison import replace_file, write_metrics
from .plots import save_before_after_grid, save_score_distributions
from .report import REPORT_MEGABYTES, Gallery, write_report
from .results import Evaluation, ModelRows
from .tables import format_markdown

logger = logging.getLogger(__name__)

METRICS_NAME, TABLE_NAME, REPORT_NAME = "metrics.json", "tables.md", "report.html"
DISTRIBUTIONS_NAME, GRID_NAME = "score_distributions.png", "before_after.png"
_GRID_PAIRS = 12


def write_results(
    folder: Path,
    evaluation: Evaluation,
    models: Sequence[ModelRows],
    gallery: Gallery,
    *,
    title: str = "Before and after",
    prompt_set: str = "",
    seconds: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    megabytes: float = REPORT_MEGABYTES,
    **facts: Any,
) -> None:
    """
    Write `metrics.json`, `tables.md`, `report.html`, and a plot of the distributions of scores an adapter.

    Args:
        folder (`Path`):
            Where to; made if missing.
        evaluation ([`Evaluation`]):
            The numbers.
        models (`Sequence[ModelRows]`):
            What they came from, the base model first.
        gallery ([`Gallery`]):
            The images of the report.
        title (`str`, *optional*):
            Heading of the report.
        prompt_set (`str`, *optional*, defaults to `""`):
            Name of the prompts.
        seconds (`Mapping[str, float]`, *optional*):
            Wall-clock seconds of each part of the run.
        settings (`Mapping[str, Any]`, *optional*):
            How it was made: in the report a line each, in metrics.json under `settings`.
        megabytes (`float`, *optional*, defaults to 50):
            Limit of `report.html`.
        facts (`Any`):
            Further entries of metrics.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base, *adapters = models
    plots = {}
    for adapter in adapters:
        plots[adapter.name] = folder / file_of(DISTRIBUTIONS_NAME, adapter.name, len(adapters))
        pairs = {name: (values, adapter.scores[name]) for name, values in base.scores.items()}
        save_score_distributions(plots[adapter.name], pairs)
    write_metrics(
        folder / METRICS_NAME,
        evaluation.adapters[0].scores,
        seconds=seconds,
        settings=dict(settings or {}),
        **evaluation.to_dict(),
        **facts,
    )
    replace_file(folder / TABLE_NAME, format_markdown(evaluation, prompt_set=prompt_set))
    note = write_report(
        folder / REPORT_NAME,
        evaluation,
        models,
        gallery,
        title=title,
        prompt_set=prompt_set,
        plots=plots,
        settings=settings,
        megabytes=megabytes,
    )
    if note:
        logger.warning("%s: %s", folder / REPORT_NAME, note)


def write_grids(folder: Path, models: Sequence[ModelRows], gallery: Gallery) -> None:
    """
    Draw twelve pairs an adapter, spread evenly over the rows and not chosen by score, as a model card shows them.

    Args:
        folder (`Path`):
            Where `before_after.png` goes, or `before_after-NAME.png` for several adapters.
        models (`Sequence[ModelRows]`):
            The base model first.
        gallery ([`Gallery`]):
            Images of each model, of the same rows.
    """
    base, *adapters = models
    for number, adapter in enumerate(adapters, start=1):
        sides = (gallery.thumbnails[0], gallery.thumbnails[number])
        rows = [row for row in range(len(gallery.prompts)) if all(side[row] for side in sides)]
        rows = rows[:: max(1, len(rows) // _GRID_PAIRS)][:_GRID_PAIRS]
        if not rows:
            continue
        scores = {
            name: tuple([model.scores[name][row] for row in rows] for model in (base, adapter))
            for name in list(base.scores)[:3]
        }
        before, after = ([_image(gallery, k, row) for row in rows] for k in (0, number))
        save_before_after_grid(
            folder / file_of(GRID_NAME, adapter.name, len(adapters)),
            [gallery.prompts[row] for row in rows],
            before,
            after,
            columns=3,
            scores=scores,  # type: ignore[arg-type]
        )


def _image(gallery: Gallery, model: int, row: int) -> Image.Image:
    """Return the larger image; of a video the strip of frames, since paper does not move."""
    preview = gallery.previews[model][row]
    image = Image.open(io.BytesIO(preview)) if preview else None
    if image is None or getattr(image, "is_animated", False):
        image = Image.open(io.BytesIO(gallery.thumbnails[model][row] or b""))
    return image.convert("RGB")


def file_of(name: str, adapter: str, count: int) -> str:
    """
    Return the name of a file that each adapter has one of.

    Args:
        name (`str`):
            Name where there is one adapter.
        adapter (`str`):
            Name of the adapter.
        count (`int`):
            How many there are.

    Returns:
        `str`: the name itself, or with the adapter's, made safe, before its ending.
    """
    if count == 1:
        return name
    safe = re.sub(r"[^\w.-]+", "_", adapter)
    return f"{Path(name).stem}-{safe}{Path(name).suffix}"
