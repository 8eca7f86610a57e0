"""Give the rows of a folder's table the prompts and the scores that it lacks, out of the files that they name."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

from tgol_trainer.data.checks import SYNONYMS
from tgol_trainer.data.rows import DEFAULT_COLUMNS, Columns

from .files import FileFacts, read_file
from .found import PROMPT_FROM, SCORE_FROM, UNREAD, found_in, paths_of, visual_column
from .image_folder import scores_by_folders, stamp_of, warn_of_first_stars, warn_of_unread

logger = logging.getLogger(__name__)

_TEXTS = ("string", "large_string", "null")


def lacking(table: datasets.Dataset, columns: Columns, only: Sequence[str] | None = None) -> list[str]:
    """
    Return which of `"prompt"` and `"score"` a table lacks: the prompt of some row, or the scores of all.

    Nothing is lacking where another column may be meant: one that the user named, or one called `caption` or `rating`
    for instance. The check of the columns asks for its name.

    Args:
        table ([`datasets.Dataset`]): The table.
        columns ([`Columns`]): Names of the columns.
        only (`Sequence[str]`, *optional*): Columns that are wanted, where not all are.
    """
    found = []
    known = {name.strip(): name for name in table.column_names}
    for role in ("prompt", "score"):
        name = getattr(columns, role)
        if name != getattr(DEFAULT_COLUMNS, role) or (only is not None and name not in only):
            continue
        if name not in known:
            found += [] if {each.lower() for each in known}.intersection(SYNONYMS[role]) else [role]
            continue
        values = table.select_columns([known[name]]).with_format("arrow")[:].column(0)
        texts = getattr(table.features[known[name]], "dtype", "") in _TEXTS
        if values.null_count == len(values) or (role == "prompt" and texts and any(map(_blank, values.to_pylist()))):
            found.append(role)
    return found


def fill(
    dataset: datasets.Dataset, table: Path, columns: Columns, roles: Sequence[str], *, folder_scores: bool = False
) -> datasets.Dataset:
    """
    Fill what a table lacks out of its files. What the table says stays as it is.

    A row without a prompt gets its file's. Scores come from the files only where the table has none at all: its own
    and theirs would be two scales in one column.

    Args:
        dataset ([`datasets.Dataset`]): Rows of the table, whose column of images or videos has absolute paths.
        table (`Path`): The table.
        columns ([`Columns`]): Names of the columns.
        roles (`Sequence[str]`): Of [`lacking`].
        folder_scores (`bool`, *optional*, defaults to `False`): Take the scores from the names of folders.

    Returns:
        [`datasets.Dataset`] with `prompt_from`, `score_from` and `unread`, as those of [`load_image_folder`]. A column
        that the table lacks is added if a file has a value for it.
    """
    visual = visual_column(dataset)
    if visual is None or not len(dataset):
        return dataset
    before, kind = dataset.column_names, dataset.features[visual]
    dataset = dataset.cast_column(visual, type(kind)(decode=False))
    paths = paths_of(dataset)
    scores = None
    if folder_scores and "score" in roles:
        names = [os.path.relpath(path, table.parent.absolute()) for path in paths]
        by_name = scores_by_folders(table.parent, names)
        scores = {path: by_name.get(name) for path, name in zip(paths, names, strict=True)}
    features = {name: datasets.Value("string") for name in (columns.prompt, PROMPT_FROM, SCORE_FROM, UNREAD)}
    if "score" in roles:
        features[columns.score] = datasets.Value("float64")
    settings = {"visual": visual, "prompt": columns.prompt, "score": columns.score, "table": table.name}
    dataset = dataset.map(
        _filled,
        features=datasets.Features({**dataset.features, **features}),
        fn_kwargs={
            "folder": str(table.parent.absolute()),
            "settings": settings,
            "scores": scores,
            "reads_scores": "score" in roles,
            "stamp": stamp_of(table.parent),
        },
        desc=f"Reading {table.parent.name}",
    ).cast_column(visual, kind)
    for name, places in (found_in(dataset) or {}).items():
        logger.info("%s: %s: %s", table, name, places)
        column = getattr(columns, name.removesuffix("s"))
        if column not in before and not places.places:
            dataset = dataset.remove_columns(column)
    warn_of_unread(table.parent, [os.path.basename(path) for path in paths], dataset)
    warn_of_first_stars(table.parent, dataset, columns.score)
    return dataset


def _filled(
    row: dict[str, Any],
    folder: str,
    settings: dict[str, str],
    scores: dict[str, float | None] | None,
    reads_scores: bool,
    stamp: str,
) -> dict[str, Any]:
    """Return the new values of a row; `stamp` is there for the cache of `datasets` alone."""
    visual = row[settings["visual"]]
    path = None if visual is None else visual["path"]
    prompt, score = row.get(settings["prompt"]), row.get(settings["score"])
    prompt_from = None if _blank(prompt) else settings["table"]
    score_from = None if score is None else settings["table"]
    found = FileFacts()
    if (prompt_from is None or reads_scores) and path is not None and os.path.isfile(path):
        found = read_file(Path(path), Path(folder))
    if prompt_from is None:
        prompt, prompt_from = found.prompt or prompt, found.prompt_from
    if reads_scores:
        score, score_from = found.score, found.score_from
    if scores is not None:
        score = None if path is None else scores[path]
        score_from = None if score is None else "names of folders"
    new = {settings["prompt"]: prompt, PROMPT_FROM: prompt_from, SCORE_FROM: score_from, UNREAD: found.unread}
    return new | ({settings["score"]: score} if reads_scores else {})


def _blank(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())
