"""Where the prompts and scores of a dataset's rows were found, as `tgol check` says it."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter

import datasets

PROMPT_FROM, SCORE_FROM, UNREAD = "prompt_from", "score_from", "unread"
"""Columns of the rows that were made of files: the places, and what could not be read."""
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Found:
    """
    Where prompts or scores of a folder were found.

    Args:
        places (`dict[str, int]`): Place, such as `"EXIF"`, to the number of files.
        num_lacking (`int`): Files that have none.
        lacking (`list[str]`): Names of the first of these.
    """

    places: dict[str, int]
    num_lacking: int
    lacking: list[str]

    def __str__(self) -> str:
        """Return a text such as `3 from EXIF; none in 2 files (a.png, b.png)`."""
        parts = [", ".join(f"{count} from {place}" for place, count in self.places.items())] if self.places else []
        if self.num_lacking:
            names = ", ".join([*self.lacking, *(["..."] if self.num_lacking > len(self.lacking) else [])])
            parts.append(f"none in {self.num_lacking} file{'s' if self.num_lacking > 1 else ''} ({names})")
        return "; ".join(parts)


def found_in(dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, Found] | None:
    """
    Count where prompts and scores of a folder were found.

    Args:
        dataset ([`datasets.Dataset`]): Of [`load_image_folder`], or a table that was filled by [`fill`].

    Returns:
        `dict[str, Found]`, *optional*: of `"prompts"` and of `"scores"`; `None` for another dataset.
    """
    if not isinstance(dataset, datasets.Dataset) or not {PROMPT_FROM, UNREAD} <= set(dataset.column_names):
        return None
    found = {}
    for name, column in (("prompts", PROMPT_FROM), ("scores", SCORE_FROM)):
        values = dataset[column] if column in dataset.column_names else [None] * len(dataset)
        lacking = [row for row, value in enumerate(values) if not value]
        places = Counter(value for value in values if value)
        found[name] = Found(
            dict(places.most_common()),
            len(lacking),
            list(map(os.path.basename, paths_of(dataset.select(lacking[:_SHOWN])))),
        )
    return found


def visual_column(dataset: datasets.Dataset) -> str | None:
    """Return the column of images, or of videos, of a dataset that was made of files; `None` for no such column."""
    kinds = (datasets.Image, datasets.Video)
    return next((name for name, kind in dataset.features.items() if isinstance(kind, kinds)), None)


def paths_of(dataset: datasets.Dataset) -> list[str]:
    """Return the paths of the files of such a dataset; "" where a row has none."""
    visual = visual_column(dataset)
    if visual is None:
        return []
    kind = type(dataset.features[visual])
    files = dataset.select_columns([visual]).cast_column(visual, kind(decode=False))[visual]
    return [(file or {}).get("path") or "" for file in files]
