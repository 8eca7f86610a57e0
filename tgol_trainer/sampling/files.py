"""Read and write the files of sampling during training: images by step, their index, and the strip."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tgol_trainer._files import write_json
from tgol_trainer._spacing import evenly_spaced
from tgol_trainer.evaluation import save_sample_strip

logger = logging.getLogger(__name__)

FOLDER = "samples"
INDEX_NAME, STRIP_NAME = "index.json", "strip.png"
MAX_ROWS, MAX_COLUMNS = 16, 10
"""Rows and columns that the strip shows; every image is kept as a file."""


@dataclasses.dataclass
class SampleColumn:
    """
    The images of one moment.

    Args:
        step (`int`, *optional*): Number of updates made before; `None` for the base model.
        scores (`dict[str, list[float | None]]`): Name of a reward to one score per image.
        measures (`dict[str, float]`): What [`drift.measure`] returns of the images.
    """

    step: int | None
    scores: dict[str, list[float | None]]
    measures: dict[str, float]

    @property
    def folder(self) -> str:
        """Folder of the images, inside the folder of samples."""
        return "base" if self.step is None else f"step-{self.step:06d}"

    @property
    def title(self) -> str:
        """Text above the column."""
        return "base" if self.step is None else f"step {self.step}"


class SampleFiles:
    """
    Read and write `samples/` of a run. Only one process does.

    Args:
        output_dir (`str` or `Path`): Folder of the run.
        prompts (`Sequence[str]`): One prompt per image.
        settings (`Mapping[str, Any]`): What the images depend on beside the weights; JSON-serialisable.
    """

    def __init__(self, output_dir: str | Path, prompts: Sequence[str], settings: Mapping[str, Any]) -> None:
        self.folder = Path(output_dir) / FOLDER
        self.prompts = list(prompts)
        self.settings = {"prompts": self.prompts, **settings}

    def read(self, step: int, rewards: Sequence[str]) -> list[SampleColumn]:
        """
        Return what an earlier part of the run left, and remove what does not belong to it.

        Args:
            step (`int`): Number of updates already made. A new run, with 0, takes nothing over.
            rewards (`Sequence[str]`):
                Names of the rewards. A base column without a score of one of them counts as missing.

        Returns:
            `list[SampleColumn]`: the base first, if all its images are there; then the columns up to `step`.
        """
        file = self.folder / INDEX_NAME
        if not file.exists():
            return []
        index = json.loads(file.read_text(encoding="utf-8"))
        same = index["settings"] == self.settings
        if step and not same:
            logger.warning(
                "%s was begun with other prompts, seeds or sampling settings. A new strip begins at step %d.",
                *(self.folder, step),
            )
        kept = []
        for column in (SampleColumn(**entry) for entry in index["columns"]):
            wanted = set(rewards) <= set(column.scores) if column.step is None else column.step <= step
            whole = all(path.is_file() for path in self._paths(column))
            if step and same and wanted and whole:
                kept.append(column)
            else:
                shutil.rmtree(self.folder / column.folder, ignore_errors=True)
        return kept

    def write(self, columns: Sequence[SampleColumn], new: SampleColumn, images: Sequence[Image.Image]) -> None:
        """
        Add the images of one column and draw the strip anew.

        Args:
            columns (`Sequence[SampleColumn]`): All columns in order, `new` among them.
            new ([`SampleColumn`]): The column to add.
            images (`Sequence[PIL.Image.Image]`): Images of the new column.
        """
        (self.folder / new.folder).mkdir(parents=True, exist_ok=True)
        for path, image in zip(self._paths(new), images, strict=True):
            image.save(path, format="PNG")
        entries = [dataclasses.asdict(column) for column in columns]
        write_json(self.folder / INDEX_NAME, {"settings": self.settings, "columns": entries})
        self._draw(columns)

    def _paths(self, column: SampleColumn) -> list[Path]:
        return [self.folder / column.folder / f"{row:03d}.png" for row in range(len(self.prompts))]

    def _draw(self, columns: Sequence[SampleColumn]) -> None:
        shown = [columns[number] for number in evenly_spaced(len(columns), MAX_COLUMNS)]
        rows = min(len(self.prompts), MAX_ROWS)
        names = list(dict.fromkeys(name for column in columns for name in column.scores))
        unscored: list[float | None] = [None] * len(self.prompts)
        scores = {name: [column.scores.get(name, unscored) for column in shown] for name in names}
        save_sample_strip(
            self.folder / STRIP_NAME,
            self.prompts[:rows],
            [column.title for column in shown],
            [[Image.open(path, formats=("PNG",)) for path in self._paths(column)[:rows]] for column in shown],
            scores={name: [values[:rows] for values in found] for name, found in scores.items()},
            means={name: [_mean(values) for values in found] for name, found in scores.items()},
        )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
