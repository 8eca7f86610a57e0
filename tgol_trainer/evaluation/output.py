"""Write the files of an evaluation: metrics.json, tables, plots and the report."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tgol_trainer._files import write_file

from .before_after import save_before_after_grid
from .comparison import write_metrics
from .plots import save_score_distributions
from .previews import PREVIEW_FORMATS
from .report import Gallery, ReportOptions, write_report
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
    options: ReportOptions | None = None,
    *,
    seconds: Mapping[str, float] | None = None,
    **facts: Any,
) -> None:
    """
    Write `metrics.json`, `tables.md`, `report.html`, and one plot of the distributions of scores per adapter.

    Args:
        folder (`Path`): Where the files go; made if missing.
        evaluation ([`Evaluation`]): The numbers.
        models (`Sequence[ModelRows]`): The rows that were compared, the base model first.
        gallery ([`Gallery`]): The images of the report.
        options ([`ReportOptions`], *optional*):
            Title and limit of the report, name of the prompts and settings of the run.
        seconds (`Mapping[str, float]`, *optional*): Wall-clock seconds of each part of the run.
        facts (`Any`): Further entries of metrics.json.
    """
    options = options or ReportOptions()
    folder.mkdir(parents=True, exist_ok=True)
    base, *adapters = models
    plots = {}
    for adapter in adapters:
        plots[adapter.name] = folder / file_of(DISTRIBUTIONS_NAME, adapter.name, len(adapters))
        pairs = {name: (values, adapter.scores[name]) for name, values in base.scores.items()}
        save_score_distributions(plots[adapter.name], pairs, evaluation.medium)
    write_metrics(
        folder / METRICS_NAME,
        evaluation.adapters[0].scores,
        seconds=seconds,
        settings=dict(options.settings),
        **evaluation.to_dict(),
        **facts,
    )
    write_file(folder / TABLE_NAME, format_markdown(evaluation, prompt_set=options.prompt_set))
    note = write_report(folder / REPORT_NAME, evaluation, models, gallery, options, plots=plots)
    if note:
        logger.warning("%s: %s", folder / REPORT_NAME, note)


def write_grids(folder: Path, models: Sequence[ModelRows], gallery: Gallery) -> None:
    """
    Draw twelve pairs per adapter for its model card, spread evenly over the rows and not chosen by score, as
    `before_after.png`, or `before_after-NAME.png` for several adapters. The base model is the first of `models`.
    """
    base, *adapters = models
    for number, adapter in enumerate(adapters, start=1):
        sides = (gallery.thumbnails[0], gallery.thumbnails[number])
        rows = [row for row in range(len(gallery.prompts)) if all(side[row] for side in sides)]
        rows = rows[:: max(1, len(rows) // _GRID_PAIRS)][:_GRID_PAIRS]
        if not rows:
            continue
        save_before_after_grid(
            folder / file_of(GRID_NAME, adapter.name, len(adapters)),
            [gallery.prompts[row] for row in rows],
            [_image(gallery, 0, row) for row in rows],
            [_image(gallery, number, row) for row in rows],
            columns=3,
            scores={
                name: ([base.scores[name][row] for row in rows], [adapter.scores[name][row] for row in rows])
                for name in list(base.scores)[:3]
            },
        )


def _image(gallery: Gallery, model: int, row: int) -> Image.Image:
    """Return the larger image, or the strip of frames of a video, since paper does not move."""
    preview = gallery.previews[model][row]
    image = Image.open(io.BytesIO(preview), formats=PREVIEW_FORMATS) if preview else None
    if image is None or getattr(image, "is_animated", False):
        image = Image.open(io.BytesIO(gallery.thumbnails[model][row] or b""), formats=PREVIEW_FORMATS)
    return image.convert("RGB")


def file_of(name: str, adapter: str, count: int) -> str:
    """Return the name of a file that is written once per adapter: with several, the adapter's name is added to it."""
    if count == 1:
        return name
    safe = re.sub(r"[^\w.-]+", "_", adapter)
    return f"{Path(name).stem}-{safe}{Path(name).suffix}"
