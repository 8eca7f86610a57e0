"""Read the rows of a source without decoding images, tell images apart, and make one row per image."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from tgol_trainer.data.checks import check_class
from tgol_trainer.data.files import absolute_path
from tgol_trainer.data.images import DataError, describe
from tgol_trainer.data.rows import prompt_problem

logger = logging.getLogger(__name__)

_SHOWN_ROWS = 5
_BATCH_SIZE = 64  # rows whose images are in memory at once
_TEXT_TYPES, _BINARY_TYPES = ("string", "large_string"), ("binary", "large_binary")

Problem = tuple[str, Any]
"""Why a row cannot be used, and the value to show."""


@dataclasses.dataclass(frozen=True)
class Source:
    """
    A dataset to convert; see [`pairs_to_scores`] for its fields. Messages call it by `name`.

    Raises:
        DataError: for another class, a stream, an empty dataset, or an unknown `on_bad_sample`.
    """

    dataset: datasets.Dataset
    image_root: str | Path | None = None
    on_bad_sample: Literal["raise", "skip"] = "raise"
    name: str = "dataset"

    def __post_init__(self) -> None:
        check_class(self.dataset, self.name)
        if not isinstance(self.dataset, datasets.Dataset):
            raise DataError(f"{self.name}: it is a stream, but every row is read twice. Load it without `streaming`.")
        if not len(self.dataset):
            raise DataError(f"{self.name}: it has no rows. Check its split and the filters applied to it.")
        if self.on_bad_sample not in ("raise", "skip"):
            raise DataError(f"`on_bad_sample`: got {self.on_bad_sample!r}; it must be 'raise' or 'skip'.")

    def column(self, given: str | None, option: str, known: Sequence[str] = ()) -> str:
        """Return the given column, or without one the first known column; `option` is the command's, for the error."""
        present = self.dataset.column_names
        found = next((column for column in ([given] if given is not None else known) if column in present), None)
        if found is None:
            wanted = repr(given) if given is not None else f"named {', '.join(known)}"
            raise DataError(
                f"{self.name}: no column {wanted}; the columns are {present}. Name the right one with `--{option}` "
                "(in Python, in `columns`)."
            )
        return found

    def undecoded(self, images: Sequence[str], others: Sequence[str]) -> datasets.Dataset:
        """Return these columns of images, as undecoded files, and these other columns; refuse what is not an image."""
        twice = set(images) & set(others)
        if twice:
            raise DataError(f"{self.name}: column {min(twice)!r} is named for images and for something else too.")
        dataset = self.dataset.with_format(None).select_columns(list(dict.fromkeys([*images, *others])))
        for column in images:
            feature = dataset.features[column]
            dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
            is_file = isinstance(feature, datasets.Image) or dtype in _TEXT_TYPES + _BINARY_TYPES
            if not is_file and not (isinstance(feature, dict) and {"bytes", "path"} & set(feature)):
                raise DataError(
                    f"{self.name}: column {column!r} must hold images, paths or encoded bytes, its type is {feature}. "
                    f'Convert it first: dataset = dataset.cast_column("{column}", datasets.Image())'
                )
            if dtype in _TEXT_TYPES and self.image_root is not None:
                paths = [absolute_path(path, self.image_root) for path in dataset[column]]
                dataset = dataset.remove_columns(column).add_column(column, paths, feature=datasets.Value("string"))
            dataset = dataset.cast_column(column, datasets.Image())
        return dataset


@dataclasses.dataclass(frozen=True)
class Conversion:
    """A converted dataset with one row per image, and its counts."""

    dataset: datasets.Dataset
    num_rows: int  # rows of the source
    num_used: int  # comparisons or ratings that count
    num_ties: int  # comparisons without a winner
    num_dropped: int  # rows left out


class SourceRow(NamedTuple):
    """One row of a source: its cells other than images, and a key per image that is equal for equal images."""

    number: int
    cells: dict[str, Any]
    keys: list[bytes]
    prompt_problem: Problem | None
    image_problem: Problem | None


def read_rows(
    files: datasets.Dataset, prompt: str, images: Sequence[str], uids: Sequence[str] = ()
) -> Iterator[SourceRow]:
    """
    Yield the rows of a [`Source.undecoded`] dataset in order, with a progress bar.

    `uids` are columns of the dataset's own ids, one per column of images. Without them the encoded bytes tell images
    apart, or the paths where there are no bytes.
    """
    number = 0
    with tqdm(total=len(files), desc="Reading", unit=" rows", leave=False) as bar:
        for table in files.with_format("arrow").iter(batch_size=_BATCH_SIZE):
            columns = {name: table.column(name).to_pylist() for name in table.column_names if name not in images}
            for offset in range(table.num_rows):
                cells = {name: column[offset] for name, column in columns.items()}
                cause = prompt_problem(cells[prompt])
                bad_prompt = None if cause is None else (cause, cells[prompt])
                found = {name: table.column(name)[offset] for name in images}
                keys, bad_image = _image_keys(found, [cells[uid] for uid in uids] or [None] * len(images))
                yield SourceRow(number, cells, keys, bad_prompt, bad_image)
                number += 1
            bar.update(table.num_rows)


def _image_keys(images: dict[str, pa.StructScalar], uids: list[Any]) -> tuple[list[bytes], Problem | None]:
    """Return the keys of the images of a row, and what is wrong with the first bad one."""
    keys: list[bytes] = []
    problem = None
    for (column, image), uid in zip(images.items(), uids, strict=True):
        key, cause = _image_key(image, uid)
        keys.append(key)
        if cause is not None and problem is None:
            cause = f"{cause} in {column!r}" if len(images) > 1 else cause
            problem = cause, image["path"].as_py() if image.is_valid else None
    return keys, problem


def _image_key(image: pa.StructScalar, uid: Any) -> tuple[bytes, str | None]:
    """Return a digest of what tells an image (`bytes` and `path`) apart, and why it cannot be used or `None`."""
    data, path = (image["bytes"], image["path"].as_py()) if image.is_valid else (None, None)
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


class Dropped:
    """Counts the rows that cannot be used by cause, and keeps the first few of each cause."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._found: dict[str, tuple[int, list[str]]] = {}

    def add(self, row: int, problem: Problem) -> None:
        """Count one row, numbered from 0, under its problem."""
        cause, value = problem
        count, shown = self._found.get(cause, (0, []))
        shown = shown if count >= _SHOWN_ROWS else [*shown, f"row {row}: {describe(value)}"]
        self._found[cause] = count + 1, shown
        self.num_rows += 1

    def raise_or_warn(self, source: Source) -> None:
        """List the rows that cannot be used in an error, or in a warning if they are to be left out."""
        if not self.num_rows:
            return
        total = len(source.dataset)
        lines = [f"{source.name}: {self.num_rows} of {total} rows cannot be used (rows are counted from 0)."]
        for cause, (count, shown) in self._found.items():
            lines.append(f"  {cause}: {count} ({', '.join(shown)}{', ...' if count > _SHOWN_ROWS else ''})")
        if self.num_rows == total:
            raise DataError("\n".join([*lines, "No row is left. Check the names of the columns and their values."]))
        if source.on_bad_sample == "raise":
            remedy = "Mend these rows, or leave them out: on_bad_sample='skip' (`--on_bad_sample skip`)."
            raise DataError("\n".join([*lines, remedy]))
        logger.warning("\n".join([*lines, "They are left out."]))


class ImageIndex:
    """Numbers the different images of a source in the order they come; under another prompt an image is another."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._prompts: dict[bytes, int] = {}
        self._rows, self._sides, self._prompt_ids = array("q"), array("b"), array("q")

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def prompt_ids(self) -> np.ndarray:
        """(number of images,) int64, equal for images of one prompt."""
        return np.array(self._prompt_ids, dtype=np.int64)

    def add(self, prompt: str, row: SourceRow, side: int = 0) -> int:
        """Return the number of one image of a row, a new number if it was not seen with this prompt."""
        text = hashlib.blake2b(prompt.encode("utf-8"), digest_size=16).digest()
        number = self._numbers.setdefault(text + row.keys[side], len(self))
        if number == len(self):
            self._rows.append(row.number)
            self._sides.append(side)
            self._prompt_ids.append(self._prompts.setdefault(text, len(self._prompts)))
        return number

    def one_row_per_image(
        self, files: datasets.Dataset, prompt: str, images: Sequence[str], values: Mapping[str, np.ndarray]
    ) -> datasets.Dataset:
        """
        Return one row per image in the order of the numbers, with columns of `values` added.

        The rows point into `files`, of which `images` are the columns by side: no image is copied.
        """
        rows, sides = np.array(self._rows, dtype=np.int64), np.array(self._sides, dtype=np.int64)
        parts, numbers = [], []
        for side, image in enumerate(images):
            here = np.flatnonzero(sides == side)
            if not here.size:
                continue
            part = files.select_columns([prompt, image]).rename_columns({prompt: "prompt", image: "image"})
            for name, found in values.items():  # added before rows are chosen: a choice would be copied
                column = np.zeros(len(files), dtype=found.dtype)
                column[rows[here]] = found[here]
                part = part.add_column(name, column)
            parts.append(part.select(rows[here]))
            numbers.append(here)
        return datasets.concatenate_datasets(parts).select(np.argsort(np.concatenate(numbers)))
