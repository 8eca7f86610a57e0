"""Compare a table of images with the folder that it lies in: which split a row belongs to, and what goes unused."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets.data_files import SPLIT_KEYWORDS

from tgol_trainer.data.images import DataError
from tgol_trainer.data.rows import Columns

logger = logging.getLogger(__name__)

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".heif", ".hif", ".jxl")
VIDEOS = (".mp4", ".webm", ".mov", ".mkv", ".avi", ".m4v", ".mpg", ".mpeg")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_WORDS = {str(split): words for split, words in SPLIT_KEYWORDS.items()}
_SHOWN = 3


def words_of(split: str) -> list[str]:
    """Return the names that folders and files of a split go by, such as `val` and `dev` of `"validation"`."""
    return list(_WORDS.get(split, [split.lower()]))


def file_names(dataset: datasets.Dataset, columns: Columns) -> list[Any]:
    """Return what the rows of a table name as their files; nothing where no column does."""
    known = dataset.column_names
    name = next((name for name in ("file_name", columns.image, columns.video or "video") if name in known), None)
    return [] if name is None else list(dataset.select_columns([name]).with_format(None)[name])


def rows_of_split(names: Sequence[Any], table: Path, split: str) -> list[bool]:
    """
    Choose the rows of a split from a table that lies above the folders of several splits.

    Args:
        names (`Sequence`): What the rows name as their files.
        table (`Path`): The table.
        split (`str`): Split, without a slice.

    Returns:
        `list[bool]`: whether each row belongs to the split. Without folders of splits, all belong to `"train"`.

    Raises:
        DataError: if no row belongs to the split.
    """
    keywords = {word: name for name in (*_WORDS, split) for word in words_of(name)}
    found = [keywords.get(_first_folder(name)) for name in names]
    if not any(found):
        if split != "train":
            raise DataError(
                f"`split`: {str(table)!r} has no rows of {split!r}: all of its rows are one split, 'train'. Put the "
                f"files of the other rows into a folder {split!r} beside it, and name them '{split}/...' in the table."
            )
        return [True] * len(names)
    chosen = [(each or "train") == split for each in found]
    if not any(chosen):
        splits = sorted({each or "train" for each in found})
        raise DataError(f"`split`: {str(table)!r} has no rows in a folder of {split!r}; it has rows of {splits}.")
    return chosen


def _first_folder(name: Any) -> str:
    parts = Path(name.replace("\\", "/")).parts if isinstance(name, str) and "://" not in name else ()
    return parts[0].lower() if len(parts) > 1 else ""


def tell_of_files(names: Sequence[Any], table: Path) -> None:
    """Warn of files outside of the folder, of images that no row names, and of archives that hold what rows name."""
    folder = table.parent
    paths = [name for name in names if isinstance(name, str) and "://" not in name]
    inside = os.path.normpath(_comparable(folder, "")) + os.sep
    outside = [name for name in paths if not os.path.normpath(_comparable(folder, name)).startswith(inside)]
    if outside:
        logger.warning(
            "%s: %d of %d rows name files outside of its folder, such as %r, and these are read. Look through a table "
            "that somebody else made.",
            *(table, len(outside), len(names), outside[0]),
        )
    named = {_comparable(folder, name) for name in names if isinstance(name, str)}
    unused = [path for path in _media(folder) if _comparable(folder, path) not in named]
    if unused:
        logger.warning(
            "%s: %d of %d images and videos beside it are named by no row and are not used (%s%s).",
            *(table, len(unused), len(unused) + len(named), ", ".join(sorted(unused)[:_SHOWN])),
            ", ..." if len(unused) > _SHOWN else "",
        )
    first = next((name for name in names if isinstance(name, str) and "://" not in name), None)
    archives = sorted(entry.name for entry in folder.iterdir() if entry.suffix.lower() in _ARCHIVES)
    if archives and first is not None and not (folder / first).exists():
        logger.warning(
            "%s: %s beside it is not opened, and %r is not in the folder. Unpack the archive there.",
            *(table, archives[0], first),
        )


def _comparable(folder: Path, name: str) -> str:
    return unicodedata.normalize("NFC", os.path.join(os.path.abspath(folder), name.strip().replace("\\", os.sep)))


def _media(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if name.lower().endswith(IMAGES + VIDEOS):
                yield os.path.relpath(os.path.join(place, name), folder)


def tell_of_copies(dataset: datasets.Dataset, table: Path, columns: Columns) -> None:
    """Warn of files that a table lists several times with one prompt and different scores."""
    known = dataset.column_names
    file = next((name for name in ("file_name", columns.image, columns.video or "video") if name in known), None)
    if file is None or not {columns.prompt, columns.score} <= set(known):
        return
    rows = dataset.select_columns([file, columns.prompt, columns.score]).with_format("arrow")[:]
    texts = [rows.column(name).type for name in (file, columns.prompt)]
    if not all(map(pa.types.is_string, texts)) or not pa.types.is_primitive(rows.column(columns.score).type):
        return
    groups = rows.group_by([file, columns.prompt]).aggregate([(columns.score, "min"), (columns.score, "max")])
    low, high = (groups.column(f"{columns.score}_{end}") for end in ("min", "max"))
    several = groups.filter(pc.less(low, high))
    if several.num_rows:
        example = several.slice(0, 1).to_pylist()[0]
        logger.warning(
            "%s: files that are listed with one prompt and several scores: %d (such as %r: %g and %g). Each row "
            "counts. To give each one score, `tgol convert ratings` makes one row per image with the mean.",
            *(table, several.num_rows, example[file], example[f"{columns.score}_min"]),
            example[f"{columns.score}_max"],
        )
