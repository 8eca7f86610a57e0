"""What the converters share: naming an image by its content, and one row per image without decoding or copying it."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from tgol_trainer.data.checks import check_class
from tgol_trainer.data.images import DataError, describe
from tgol_trainer.data.rows import prompt_problem
from tgol_trainer.sources.loading import absolute_path

logger = logging.getLogger(__name__)

PROMPT_COLUMNS = ("prompt", "caption", "text")
_SHOWN_ROWS = 5
_BATCH_SIZE = 64  # rows whose images are in memory at once
_FILE_TYPES = ("string", "large_string", "binary", "large_binary")


@dataclasses.dataclass(frozen=True)
class Conversion:
    """
    A converted dataset and what went into it.

    Args:
        dataset ([`datasets.Dataset`]):
            One row per image.
        num_rows (`int`):
            Rows of the source.
        num_used (`int`):
            Comparisons or ratings that count.
        num_ties (`int`):
            Comparisons without a winner.
        dropped (`dict[str, int]`):
            Cause to number of rows left out.
    """

    dataset: datasets.Dataset
    num_rows: int
    num_used: int
    num_ties: int
    dropped: dict[str, int]


class Dropped:
    """Counts the rows that cannot be used by cause, and keeps the first few of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def add(self, cause: str, row: int, value: Any) -> None:
        """
        Take in one row.

        Args:
            cause (`str`):
                Why it cannot be used.
            row (`int`):
                Its number, from 0.
            value (`Any`):
                What it holds.
        """
        self.counts[cause] += 1
        shown = self._examples.setdefault(cause, [])
        if len(shown) < _SHOWN_ROWS:
            shown.append(f"row {row}: {describe(value)}")

    def settle(self, name: str, num_rows: int, on_bad_sample: Literal["raise", "skip"]) -> None:
        """
        Raise or warn, if there are any.

        Args:
            name (`str`):
                The argument that the dataset was given as.
            num_rows (`int`):
                Rows looked at.
            on_bad_sample (`str`):
                `"raise"` or `"skip"`.

        Raises:
            DataError: for any such row under `"raise"`, or if no other is left.
        """
        total = sum(self.counts.values())
        if not total:
            return
        lines = [f"{name}: {total} of {num_rows} rows cannot be used (rows are counted from 0)."]
        for cause, count in self.counts.items():
            more = ", ..." if count > _SHOWN_ROWS else ""
            lines.append(f"  {cause}: {count} ({', '.join(self._examples[cause])}{more})")
        if total == num_rows:
            raise DataError("\n".join([*lines, "No row is left. Check the names of the columns and their values."]))
        if on_bad_sample == "raise":
            remedy = "Mend these rows, or leave them out: on_bad_sample='skip' (`--on_bad_sample skip`)."
            raise DataError("\n".join([*lines, remedy]))
        logger.warning("\n".join([*lines, "They are left out."]))


class ImageIndex:
    """Numbers the images of a dataset in the order they come, the same image with the same prompt once."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._prompts: dict[bytes, int] = {}
        self.rows, self.sides, self.prompts = array("q"), array("b"), array("q")

    def __len__(self) -> int:
        return len(self.rows)

    def add(self, prompt: str, key: bytes, row: int, side: int) -> int:
        """
        Return the number of an image, a new one if it was not seen with this prompt.

        Args:
            prompt (`str`):
                Its prompt.
            key (`bytes`):
                Of [`image_key`].
            row (`int`):
                Row of the dataset.
            side (`int`):
                Which of the row's image columns holds it.
        """
        text = hashlib.blake2b(prompt.encode("utf-8"), digest_size=16).digest()
        number = self._numbers.setdefault(text + key, len(self.rows))
        if number == len(self.rows):
            self.rows.append(row)
            self.sides.append(side)
            self.prompts.append(self._prompts.setdefault(text, len(self._prompts)))
        return number


def image_key(image: pa.StructScalar, uid: Any = None) -> tuple[bytes, str | None]:
    """
    Return what tells an image from others, and why it cannot be used or `None`.

    Args:
        image (`pa.StructScalar`):
            `bytes` and `path` of a column of [`datasets.Image`].
        uid (`Any`, *optional*):
            The dataset's own name of it; without one, the encoded bytes decide, or the path where there are none.
    """
    data, path = image["bytes"] if image.is_valid else None, image["path"].as_py() if image.is_valid else None
    if data is not None and data.is_valid and data.as_buffer().size:
        kind, content = b"bytes", memoryview(data.as_buffer())
    elif path:
        if "://" not in path and not os.path.isfile(path):
            return b"", "image file not found"
        kind, content = b"path", memoryview(os.path.abspath(path).encode("utf-8", "surrogateescape"))
    else:
        return b"", "missing image"
    if uid is not None:
        kind, content = b"uid", memoryview(str(uid).encode("utf-8"))
    return hashlib.blake2b(content, digest_size=16, person=kind).digest(), None


def image_path(image: pa.StructScalar) -> str | None:
    """Return the path of an image of a column of [`datasets.Image`], to name it in a message."""
    return image["path"].as_py() if image.is_valid else None


def pick(present: Sequence[str], given: str | None, known: Sequence[str], role: str, name: str) -> str:
    """
    Return the column of a role: the one given, or the first known one that is there.

    Args:
        present (`Sequence[str]`):
            The dataset's columns.
        given (`str`, *optional*):
            The user's.
        known (`Sequence[str]`):
            Usual names.
        role (`str`):
            Name of the argument, for the message.
        name (`str`):
            The argument that the dataset was given as.

    Raises:
        DataError: if it is not there.
    """
    found = next((column for column in ([given] if given is not None else known) if column in present), None)
    if found is None:
        wanted = repr(given) if given is not None else f"named {', '.join(known)}"
        raise DataError(f"{name}: no column {wanted}; the columns are {list(present)}. Name it: `{role}='...'`.")
    return found


def check_source(dataset: Any, on_bad_sample: str, name: str) -> None:
    """
    Check the class of a dataset and that it has rows.

    Args:
        dataset (`Any`):
            What the user gave.
        on_bad_sample (`str`):
            Checked as well.
        name (`str`):
            The argument it was given as.

    Raises:
        DataError: for another class, a stream, an empty dataset, or an unknown policy.
    """
    check_class(dataset, name)
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"{name}: it is a stream, and every row must be read twice. Load it without `streaming`.")
    if not len(dataset):
        raise DataError(f"{name}: it has no rows. Check its split and the filters applied to it.")
    if on_bad_sample not in ("raise", "skip"):
        raise DataError(f"`on_bad_sample`: got {on_bad_sample!r}; it must be 'raise' or 'skip'.")


def as_files(
    dataset: datasets.Dataset, images: Sequence[str], others: Sequence[str], root: str | Path | None, name: str
) -> datasets.Dataset:
    """
    Return the named columns alone, those of images as undecoded files.

    Args:
        dataset ([`datasets.Dataset`]):
            With columns of images, paths or encoded bytes.
        images (`Sequence[str]`):
            The columns of images.
        others (`Sequence[str]`):
            The columns kept beside them.
        root (`str` or `Path`, *optional*):
            Folder that relative paths start from; by default the working directory.
        name (`str`):
            The argument it was given as.

    Raises:
        DataError: for a column of another type.
    """
    dataset = dataset.with_format(None).select_columns(list(dict.fromkeys([*images, *others])))
    for column in images:
        feature = dataset.features[column]
        dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
        is_file = isinstance(feature, datasets.Image) or dtype in _FILE_TYPES
        if not is_file and not (isinstance(feature, dict) and {"bytes", "path"} & set(feature)):
            raise DataError(
                f"{name}: column {column!r} must hold images, paths or encoded bytes, its type is {feature}. Convert "
                f'it first: dataset = dataset.cast_column("{column}", datasets.Image())'
            )
        if dtype in _FILE_TYPES[:2] and root is not None:
            paths = [absolute_path(path, root) for path in dataset[column]]
            dataset = dataset.remove_columns(column).add_column(column, paths, feature=datasets.Value("string"))
        dataset = dataset.cast_column(column, datasets.Image())
    return dataset


def batches(dataset: datasets.Dataset) -> Iterator[tuple[int, pa.Table]]:
    """Yield (number of the first row, rows as Arrow) in small batches, under a bar; nothing is decoded."""
    start = 0
    with tqdm(total=len(dataset), desc="Reading", unit=" rows", leave=False) as bar:
        for table in dataset.with_format("arrow").iter(batch_size=_BATCH_SIZE):
            yield start, table
            start += table.num_rows
            bar.update(table.num_rows)


def usable_prompt(prompt: Any, row: int, dropped: Dropped) -> bool:
    """Return whether a prompt can be used; if not, the row is counted."""
    cause = prompt_problem(prompt)
    if cause is not None:
        dropped.add(cause, row, prompt)
    return cause is None


def one_row_per_image(
    dataset: datasets.Dataset,
    prompt: str,
    images: Sequence[str],
    index: ImageIndex,
    values: Mapping[str, np.ndarray],
) -> datasets.Dataset:
    """
    Return one row per image of an index, in its order. The rows point into `dataset`: no image is copied.

    Args:
        dataset ([`datasets.Dataset`]):
            Of [`as_files`].
        prompt (`str`):
            Its column of prompts.
        images (`Sequence[str]`):
            Its columns of images, by side.
        index ([`ImageIndex`]):
            The images.
        values (`Mapping[str, np.ndarray]`):
            Columns to add, one number an image.
    """
    rows, sides = np.array(index.rows, dtype=np.int64), np.array(index.sides, dtype=np.int64)
    for side in range(len(images)):
        here = sides == side
        for name, numbers in values.items():
            column = np.zeros(len(dataset), dtype=numbers.dtype)
            column[rows[here]] = numbers[here]
            dataset = dataset.add_column(f"{name} of side {side}", column)
    parts, numbered = [], []
    for side, image in enumerate(images):
        here = np.flatnonzero(sides == side)
        if not here.size:
            continue
        names = {prompt: "prompt", image: "image"} | {f"{name} of side {side}": name for name in values}
        part = dataset.select_columns(list(names))
        part = part.rename_columns({old: new for old, new in names.items() if old != new})
        parts.append(part.select_columns(["prompt", "image", *values]).select(rows[here]))
        numbered.append(here)
    return datasets.concatenate_datasets(parts).select(np.argsort(np.concatenate(numbered)))
