"""Ratings and thumbs to one row per image, scored by their mean."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from tgol_trainer.data.rows import read_score

from .base import (
    Conversion,
    Dropped,
    ImageIndex,
    as_files,
    batches,
    check_source,
    image_key,
    image_path,
    one_row_per_image,
    pick,
    usable_prompt,
)

_UP = ("up", "thumbs up", "thumb up", "thumbsup", "like", "liked", "good", "yes", "true", "👍", "+")
_DOWN = ("down", "thumbs down", "thumb down", "thumbsdown", "dislike", "disliked", "bad", "no", "false", "👎", "-")
_Read = Callable[[Any], tuple[float, str | None]]


def ratings_to_scores(
    dataset: datasets.Dataset,
    *,
    rating_column: str,
    image_column: str = "image",
    prompt_column: str = "prompt",
    annotator_column: str | None = None,
    uid_column: str | None = None,
    image_root: str | Path | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
    name: str = "dataset",
) -> datasets.Dataset:
    """
    Make one row per image from ratings, of which an image may have several. No image is decoded or copied.

    Args:
        dataset ([`datasets.Dataset`]):
            One rating a row, or a list of ratings a row.
        rating_column (`str`):
            Column of numbers, or of lists of numbers; higher is better.
        image_column (`str`, *optional*, defaults to `"image"`):
            Images, paths or encoded bytes.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Texts.
        annotator_column (`str`, *optional*):
            Who rated; lists where the ratings are lists. What one annotator gave one image counts as one rating, its
            mean.
        uid_column (`str`, *optional*):
            Ids of the images; by default the same encoded bytes, or else path, with the same prompt are one image.
        image_root (`str` or `Path`, *optional*):
            Folder that relative paths start from; by default the working directory.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` lists the rows that cannot be used in an error; `"skip"` leaves them out and warns.
        name (`str`, *optional*, defaults to `"dataset"`):
            What messages call the dataset.

    Returns:
        [`datasets.Dataset`]: `prompt`, `image`, `score` (the mean), `num_ratings` and `score_std` (the standard
        deviation of an image's ratings around their mean, divided by their number; 0 for a single one).

    Raises:
        DataError: for a missing column, or rows that cannot be used under `"raise"`.
    """
    columns = (rating_column, image_column, prompt_column, annotator_column, uid_column)
    return convert_ratings(dataset, columns, image_root, on_bad_sample, name).dataset


def thumbs_to_scores(
    dataset: datasets.Dataset,
    *,
    thumbs_column: str,
    image_column: str = "image",
    prompt_column: str = "prompt",
    annotator_column: str | None = None,
    uid_column: str | None = None,
    image_root: str | Path | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
    name: str = "dataset",
) -> datasets.Dataset:
    """
    Make one row per image from thumbs up and down, as 1 and 0; of several votes, the share of thumbs up.

    Args:
        dataset ([`datasets.Dataset`]):
            One vote a row, or a list of votes a row.
        thumbs_column (`str`):
            Words (`up`, `thumbs_down`, `like`, `bad`, `yes`, ...), booleans, 1 and 0, or 1 and -1. Where -1 occurs, 0
            is no vote, and such a row cannot be used.
        image_column (`str`, *optional*, defaults to `"image"`):
            Images, paths or encoded bytes.
        prompt_column (`str`, *optional*, defaults to `"prompt"`):
            Texts.
        annotator_column (`str`, *optional*):
            As for [`ratings_to_scores`].
        uid_column (`str`, *optional*):
            As for [`ratings_to_scores`].
        image_root (`str` or `Path`, *optional*):
            Folder that relative paths start from; by default the working directory.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` lists the rows that cannot be used in an error; `"skip"` leaves them out and warns.
        name (`str`, *optional*, defaults to `"dataset"`):
            What messages call the dataset.

    Returns:
        [`datasets.Dataset`]: the columns of [`ratings_to_scores`].

    Raises:
        DataError: for a missing column, or rows that cannot be used under `"raise"`.
    """
    columns = (thumbs_column, image_column, prompt_column, annotator_column, uid_column)
    return convert_ratings(dataset, columns, image_root, on_bad_sample, name, thumbs=True).dataset


def convert_ratings(
    dataset: datasets.Dataset,
    columns: tuple[str, str, str, str | None, str | None],
    image_root: str | Path | None,
    on_bad_sample: Literal["raise", "skip"],
    name: str,
    *,
    thumbs: bool = False,
) -> Conversion:
    """
    Do what [`ratings_to_scores`] and [`thumbs_to_scores`] do and return the counts too.

    Args:
        dataset ([`datasets.Dataset`]):
            The ratings.
        columns (`tuple`):
            Rating, image, prompt, annotator and uid column; the last two may be `None`.
        image_root (`str` or `Path`, *optional*):
            Folder that relative paths start from.
        on_bad_sample (`str`):
            `"raise"` or `"skip"`.
        name (`str`):
            What messages call the dataset.
        thumbs (`bool`, *optional*, defaults to `False`):
            Whether the ratings are thumbs.

    Returns:
        [`Conversion`]
    """
    check_source(dataset, on_bad_sample, name)
    rating, image, prompt, annotator, uid = columns
    roles = ("thumbs_column" if thumbs else "rating_column", "image_column", "prompt_column", "annotator_column")
    for column, role in zip(columns, (*roles, "uid_column"), strict=True):
        if column is not None:
            pick(dataset.column_names, column, (), role, name)
    small = [column for column in (rating, prompt, annotator, uid) if column is not None]
    files = as_files(dataset, [image], small, image_root, name)
    read = _thumb_reader(files, rating) if thumbs else _read_rating
    index, dropped = ImageIndex(), Dropped()
    images, ratings, groups = array("q"), array("d"), array("q")
    seen: dict[tuple[int, Any], int] = {}
    for start, table in batches(files):
        cells = {column: table.column(column).to_pylist() for column in small}
        for offset in range(table.num_rows):
            row, text = start + offset, cells[prompt][offset]
            if not usable_prompt(text, row, dropped):
                continue
            key, cause = image_key(table.column(image)[offset], cells[uid][offset] if uid else None)
            values = _read_all(cells[rating][offset], read)
            who = cells[annotator][offset] if annotator else None
            people = who if isinstance(who, list) else [who] * len(values[0])
            shown = cells[rating][offset] if cause is None else image_path(table.column(image)[offset])
            if cause is None:
                cause = values[1]
            if cause is None and len(people) != len(values[0]):
                cause = "as many ratings as annotators are needed"
            if cause is not None:
                dropped.add(cause, row, shown)
                continue
            number = index.add(text, key, row, 0)
            for value, person in zip(values[0], people, strict=True):
                group = len(ratings) if person is None else seen.setdefault((number, person), len(ratings))
                images.append(number)
                ratings.append(value)
                groups.append(group)
    dropped.settle(name, len(dataset), on_bad_sample)
    statistics = _statistics(np.array(images), np.array(ratings), np.array(groups), len(index))
    scored = one_row_per_image(files, prompt, [image], index, statistics)
    return Conversion(scored, len(dataset), int(statistics["num_ratings"].sum()), 0, dict(dropped.counts))


def _statistics(images: np.ndarray, ratings: np.ndarray, groups: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Return mean, number and deviation of each image's ratings, after those of one group were made one."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    ratings, images = np.bincount(group, ratings) / np.bincount(group), images[first]
    counts = np.bincount(images, minlength=size)
    means = np.bincount(images, ratings, size) / counts
    squares = np.bincount(images, (ratings - means[images]) ** 2, size) / counts
    return {"score": means, "num_ratings": counts.astype(np.int64), "score_std": np.sqrt(squares)}


def _read_all(value: Any, read: _Read) -> tuple[list[float], str | None]:
    """Return the numbers of a cell, those of a list without its missing ones, and why it cannot be used."""
    values = [one for one in value if one is not None] if isinstance(value, list) else [value]
    if not values:
        return [], "no rating"
    numbers = [read(one) for one in values]
    return [number for number, _ in numbers], next((cause for _, cause in numbers if cause is not None), None)


def _read_rating(value: Any) -> tuple[float, str | None]:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return math.nan, "rating is not a number" if value.strip() else "no rating"
    number, cause = read_score(value)
    return number, cause and cause.replace("score", "rating")


def _thumb_reader(dataset: datasets.Dataset, column: str) -> _Read:
    """Return what reads a vote, after a look at whether the column counts down as -1 or as 0."""
    signed = False
    for votes in dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        cells = votes.column(column).to_pylist()
        flat = [vote for cell in cells for vote in (cell if isinstance(cell, list) else [cell])]
        signed = signed or any(_number(vote) == -1 for vote in flat)

    def read(value: Any) -> tuple[float, str | None]:
        if value is None or (isinstance(value, str) and not value.strip()):
            return math.nan, "no vote"
        number = _number(value)
        if number == 0 and signed:
            return math.nan, "no vote (0 beside -1)"
        if number in (1.0, 0.0, -1.0):
            return max(number, 0.0), None
        word = str(value).strip().lower().replace("_", " ")
        word = word if word in ("-", "+") else word.replace("-", " ")
        if word in _UP + _DOWN:
            return float(word in _UP), None
        return math.nan, "unknown vote"

    return read


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
