"""Convert ratings, or thumbs up and down, to one row per image, scored by their mean."""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from tgol_trainer.data.rows import read_score

from .base import Conversion, Dropped, ImageIndex, Source, read_rows

_UP = ("up", "thumbs up", "thumb up", "thumbsup", "like", "liked", "good", "yes", "true", "👍", "+")
_DOWN = ("down", "thumbs down", "thumb down", "thumbsdown", "dislike", "disliked", "bad", "no", "false", "👎", "-")
_Read = Callable[[Any], tuple[float, str | None]]


@dataclasses.dataclass(frozen=True)
class RatingColumns:
    """
    The columns of a dataset of ratings or thumbs.

    Args:
        rating (`str`):
            Ratings: numbers or lists of numbers, higher is better. Thumbs: words (`up`, `thumbs_down`, `like`, `bad`,
            `yes`, ...), booleans, 1 and 0, or 1 and -1, or lists of them. Where -1 occurs, 0 is no vote, and such a
            row cannot be used.
        image (`str`, *optional*, defaults to `"image"`): Images, paths or encoded bytes.
        prompt (`str`, *optional*, defaults to `"prompt"`): Texts.
        annotator (`str`, *optional*):
            Who rated; lists where the ratings are lists. What one annotator gave one image counts as one rating, its
            mean.
        uid (`str`, *optional*):
            Ids of the images; by default the same encoded bytes, or else path, with the same prompt are one image.
    """

    rating: str
    image: str = "image"
    prompt: str = "prompt"
    annotator: str | None = None
    uid: str | None = None


def ratings_to_scores(
    dataset: datasets.Dataset,
    columns: RatingColumns,
    *,
    image_root: str | Path | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
) -> datasets.Dataset:
    """
    Make one row per image from ratings; an image may have several. No image is decoded or copied.

    Args:
        dataset ([`datasets.Dataset`]): One rating per row, or a list of ratings per row.
        columns ([`RatingColumns`]): Its columns.
        image_root (`str` or `Path`, *optional*):
            Folder that relative paths start from; by default the working directory.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` lists the rows that cannot be used in an error; `"skip"` leaves them out and warns.

    Returns:
        [`datasets.Dataset`]: `prompt`, `image`, `score` (the mean), `num_ratings` and `score_std` (the standard
        deviation of an image's ratings around their mean, divided by their number; 0 for a single one).

    Raises:
        DataError: for a missing column, or rows that cannot be used under `"raise"`.
    """
    return convert_ratings(Source(dataset, image_root, on_bad_sample), columns).dataset


def thumbs_to_scores(
    dataset: datasets.Dataset,
    columns: RatingColumns,
    *,
    image_root: str | Path | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
) -> datasets.Dataset:
    """
    Make one row per image from thumbs up and down, as 1 and 0; several votes become their share of thumbs up.

    Args:
        dataset ([`datasets.Dataset`]): One vote per row, or a list of votes per row.
        columns ([`RatingColumns`]): Its columns.
        image_root (`str` or `Path`, *optional*): As in [`ratings_to_scores`].
        on_bad_sample (`str`, *optional*, defaults to `"raise"`): As in [`ratings_to_scores`].

    Returns:
        [`datasets.Dataset`]: the columns of [`ratings_to_scores`].

    Raises:
        DataError: for a missing column, or rows that cannot be used under `"raise"`.
    """
    return convert_ratings(Source(dataset, image_root, on_bad_sample), columns, thumbs=True).dataset


def convert_ratings(source: Source, columns: RatingColumns, *, thumbs: bool = False) -> Conversion:
    """Convert as [`ratings_to_scores`] and [`thumbs_to_scores`] do, and return the counts too."""
    for option, column in dataclasses.asdict(columns).items():
        if column is not None:
            source.column(column, "thumbs_column" if thumbs and option == "rating" else f"{option}_column")
    uids = [columns.uid] if columns.uid else []
    annotators = [columns.annotator] if columns.annotator else []
    files = source.undecoded([columns.image], [columns.rating, columns.prompt, *annotators, *uids])
    read = _thumb_reader(files, columns.rating) if thumbs else _read_rating
    index, dropped = ImageIndex(), Dropped()
    images, ratings, groups = array("q"), array("d"), array("q")
    seen: dict[tuple[int, Any], int] = {}
    for row in read_rows(files, columns.prompt, [columns.image], uids):
        values, cause = _read_all(row.cells[columns.rating], read)
        people = row.cells[columns.annotator] if columns.annotator else None
        people = people if isinstance(people, list) else [people] * len(values)
        if cause is None and len(people) != len(values):
            cause = "as many ratings as annotators are needed"
        bad_rating = None if cause is None else (cause, row.cells[columns.rating])
        problem = row.prompt_problem or row.image_problem or bad_rating
        if problem is not None:
            dropped.add(row.number, problem)
            continue
        number = index.add(row.cells[columns.prompt], row)
        for value, person in zip(values, people, strict=True):
            group = len(ratings) if person is None else seen.setdefault((number, person), len(ratings))
            images.append(number)
            ratings.append(value)
            groups.append(group)
    dropped.raise_or_warn(source)
    statistics = _statistics(np.array(images), np.array(ratings), np.array(groups), len(index))
    scored = index.one_row_per_image(files, columns.prompt, [columns.image], statistics)
    return Conversion(scored, len(files), int(statistics["num_ratings"].sum()), 0, dropped.num_rows)


def _statistics(images: np.ndarray, ratings: np.ndarray, groups: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Return mean, number and deviation of each image's ratings, after those of one group were made one."""
    _, first, group = np.unique(groups, return_index=True, return_inverse=True)
    ratings, images = np.bincount(group, ratings) / np.bincount(group), images[first]
    counts = np.bincount(images, minlength=size)
    means = np.bincount(images, ratings, size) / counts
    squares = np.bincount(images, (ratings - means[images]) ** 2, size) / counts
    return {"score": means, "num_ratings": counts.astype(np.int64), "score_std": np.sqrt(squares)}


def _read_all(value: Any, read: _Read) -> tuple[list[float], str | None]:
    """Return the numbers of a cell, those of a list without its missing ones, and why it cannot be used or `None`."""
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
    """Return the function that reads a vote; it depends on whether a thumb down is -1 or 0 in this column."""
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
