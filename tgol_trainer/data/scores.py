"""Read the scores of millions of rows through Arrow with the checks of training. Images are not read."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm
from pandas.util import hash_array

from .checks import check_class, check_columns, check_score_columns, check_score_type
from .images import DataError
from .parquet import ParquetColumns
from .rows import DEFAULT_COLUMNS, BadRows, Columns, OnBadSample, prompt_problem, read_score

_BATCH = 100_000


@dataclasses.dataclass(frozen=True)
class ScoredRows:
    """
    Scores of the usable rows of a dataset, and which rows share a prompt or a group.

    Args:
        scores (`numpy.ndarray`): (N,) float64, raw; (N, K) of several columns.
        row_ids (`numpy.ndarray`): (N,) integers, their numbers in the user's dataset.
        num_rows (`int`): Rows of the dataset, or rows read of the stream.
        dropped (`dict[str, int]`): Cause to number of rows left out; a row with two causes counts under both.
        keys (`dict[str, numpy.ndarray]`):
            Column of texts to (N,) uint64 keys. Equal texts have equal keys; among ten million different texts, two
            share a key with probability 3e-6.
        texts ([`Texts`]): Texts of all rows read, by row id.
    """

    scores: np.ndarray
    row_ids: np.ndarray
    num_rows: int
    dropped: dict[str, int]
    keys: dict[str, np.ndarray]
    texts: Texts

    def pop_groups(self, column: str) -> np.ndarray:
        """Remove a column's keys, which frees their memory, and return (N,) integers 0 .. G - 1, the rows' groups."""
        keys = self.keys.pop(column)
        order = np.argsort(keys)
        keys = keys[order]
        starts = np.append(False, keys[1:] != keys[:-1])
        del keys
        groups = np.empty(order.size, dtype=np.int64)
        groups[order] = np.cumsum(starts)
        return groups

    def kept(self, mask: np.ndarray) -> ScoredRows:
        """Return the rows where a mask, (N,) bool, is true."""
        return dataclasses.replace(
            self,
            scores=self.scores[mask],
            row_ids=self.row_ids[mask],
            keys={column: keys[mask] for column, keys in self.keys.items()},
        )


class Texts:
    """Text columns of the rows read, kept in a temporary file so that memory does not grow with the dataset."""

    def __init__(self, columns: list[str]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        self._schema = pa.schema([(column, pa.large_string()) for column in columns])
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), self._schema)
        self._starts = [0]

    def add(self, columns: dict[str, pa.Array]) -> None:
        """Append rows: column to texts of type `large_string`."""
        batch = pa.record_batch(columns, schema=self._schema)
        self._writer.write_batch(batch)
        self._starts.append(self._starts[-1] + batch.num_rows)

    def close(self) -> None:
        """End writing; texts can be looked up from here on."""
        self._writer.close()
        self._file.seek(0)

    def __call__(self, column: str, rows: np.ndarray) -> list[str | None]:
        """Return the texts of rows. Each looked-up row may cost reading the hundred thousand rows around it."""
        reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))
        part = np.searchsorted(self._starts, rows, side="right") - 1
        found: list[str | None] = [None] * len(rows)
        for number in np.unique(part):
            batch = reader.get_batch(int(number))
            for index in np.flatnonzero(part == number):
                found[index] = batch.column(column)[int(rows[index]) - self._starts[number]].as_py()
        return found


def read_scores(
    dataset: datasets.Dataset | datasets.IterableDataset | ParquetColumns,
    columns: Columns = DEFAULT_COLUMNS,
    *,
    score_columns: Sequence[str] | None = None,
    group_column: str | None = None,
    on_bad_sample: OnBadSample = "raise",
    scores_alone: bool = False,
    limit: int | None = None,
    name: str = "train_dataset",
) -> ScoredRows:
    """
    Read the scores, prompts and groups of a dataset or stream that Arrow can read, with the checks of training.

    Args:
        dataset ([`datasets.Dataset`], [`datasets.IterableDataset`] or [`ParquetColumns`]):
            The column of images may be missing.
        columns ([`Columns`], *optional*): Names of the prompt and score columns.
        score_columns (`Sequence[str]`, *optional*):
            K columns of scores instead of the one of `columns`; a row is usable if all of them are.
        group_column (`str`, *optional*): Column of texts or numbers that groups rows.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` lists all rows with a bad score or prompt in one error; `"skip"` leaves them out and warns.
        scores_alone (`bool`, *optional*, defaults to `False`):
            Check scores and not prompts, as training does for the threshold of a stream and of a proxy set.
        limit (`int`, *optional*): Stop after this many usable rows; `None` reads all.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            The argument that the dataset was given as, for messages. The prompts of a `"proxy_dataset"` whose scores
            are read alone are not read.

    Returns:
        [`ScoredRows`]

    Raises:
        DataError: for a missing column or a wrong type, bad rows under `"raise"`, or no usable row.
    """
    texts = [] if scores_alone and name == "proxy_dataset" else [columns.prompt]
    texts += [group_column] if group_column and group_column not in texts else []
    reader = _Reader(columns, score_columns, texts, group_column, BadRows(name, columns), scores_alone)
    total = None if isinstance(dataset, datasets.IterableDataset) else len(dataset)
    with tqdm(total=total, desc="Reading scores", unit=" rows", unit_scale=True, delay=1) as bar:
        for table in _read_ahead(reader.tables(dataset)):
            reader.add(table, None if limit is None else limit - reader.num_kept)
            bar.update(table.num_rows)
            if limit is not None and reader.num_kept >= limit:
                break
    if not reader.num_rows:
        raise DataError(f"{name}: it has no rows. Check its split and the filters applied to it.")
    reader.bad.raise_or_warn(reader.num_rows, on_bad_sample)
    return reader.result()


def _read_ahead(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield each table while another thread reads the next one; Arrow does so without Python's lock."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(next, tables, None)
        while (table := pending.result()) is not None:
            pending = pool.submit(next, tables, None)
            yield table


def read_columns(dataset: datasets.Dataset, score_columns: Sequence[str], bad: BadRows) -> np.ndarray:
    """
    Read K columns of scores as (N, K) float64, NaN for what cannot be used. That is added to `bad`, but for its
    `num_rows`, which is left to the caller.
    """
    check_score_columns(dataset, score_columns, bad.name)
    scores, start = np.empty((len(dataset), len(score_columns))), 0
    for table in dataset.select_columns(list(score_columns)).with_format("arrow").iter(_BATCH):
        scores[start : start + table.num_rows] = found = _matrix(table, score_columns)
        _report_scores(bad, found, table, score_columns, start)
        start += table.num_rows
    return scores


def _matrix(table: pa.Table, score_columns: Sequence[str]) -> np.ndarray:
    scores = np.stack([_numbers(table.column(column)) for column in score_columns], axis=1)
    scores[~np.isfinite(scores)] = np.nan
    return scores


def _report_scores(
    bad: BadRows, scores: np.ndarray, table: pa.Table, score_columns: Sequence[str], start: int
) -> None:
    for column, values in zip(score_columns, scores.T, strict=True):
        wrong = np.flatnonzero(np.isnan(values))
        _report(bad, wrong, table.column(column), start, lambda value: read_score(value)[1], column)


def _report(
    bad: BadRows,
    wrong: np.ndarray,
    cells: pa.ChunkedArray,
    start: int,
    cause: Callable[[Any], str | None],
    column: str | None = None,
) -> None:
    """Count the rows `wrong` of a piece by cause. Equal values have one cause, so each value is looked at once."""
    if not wrong.size:
        return
    values = pc.dictionary_encode(cells.take(pa.array(wrong)).combine_chunks(), null_encoding="encode")
    for code, value in enumerate(values.dictionary.to_pylist()):
        rows = wrong[np.asarray(values.indices) == code] + start
        bad.add_rows(cause(value) or "score is not a number", rows, value, column)


class _Reader:
    """Collect scores, keys and texts piece by piece."""

    def __init__(
        self,
        columns: Columns,
        score_columns: Sequence[str] | None,
        texts: list[str],
        group_column: str | None,
        bad: BadRows,
        scores_alone: bool,
    ) -> None:
        self.several = bool(score_columns)
        self.score_columns = list(score_columns or [columns.score])
        self.columns, self.names, self.group_column, self.scores_alone = columns, texts, group_column, scores_alone
        self.bad, self.num_rows, self.num_kept = bad, 0, 0
        self.texts = Texts(texts)
        self._scores: list[np.ndarray] = []
        self._usable: list[np.ndarray] = []
        self._keys: dict[str, list[np.ndarray]] = {column: [] for column in texts}
        self._class_names: list[str] | None = None
        self._checked = False

    def tables(self, dataset: Any) -> Iterator[pa.Table]:
        """Yield the needed columns in pieces, after checking that they are there and of the right type."""
        columns = list(dict.fromkeys([*self.names, *self.score_columns]))
        head: Any = datasets.Dataset
        if isinstance(dataset, ParquetColumns):
            pieces, head = dataset.tables(_BATCH), dataset.head
        else:
            check_class(dataset, self.bad.name)
            if dataset.features is not None:
                self._check(dataset)
                dataset = dataset.select_columns(columns)
            pieces = dataset.with_format("arrow").iter(_BATCH)
        for piece in pieces:
            if not self._checked:  # the first piece tells the columns of a stream of text files
                self._check(head(piece))
            piece = piece.select(columns)
            prompt = self.columns.prompt
            if self.columns.prompt_syntax == "strip" and prompt in self.names:
                texts = pa.array(map(self.columns.text, piece.column(prompt).to_pylist()), pa.large_string())
                piece = piece.set_column(piece.column_names.index(prompt), prompt, texts)
            yield piece

    def _check(self, dataset: Any) -> None:
        self._checked = True
        name, group = self.bad.name, self.group_column
        if self.several:
            check_score_columns(dataset, self.score_columns, name)
        if self.columns.prompt in self.names or not (self.several or self.columns.score in dataset.features):
            check_columns(dataset, self.columns, name, scored=not self.several, shown=False)
        elif not self.several:
            check_score_type(dataset, self.columns.score, name)
        if group is None:
            return
        if group not in dataset.features:
            raise DataError(f"{name}: no column {group!r} (group_column); the columns are {list(dataset.features)}.")
        feature = dataset.features[group]
        if isinstance(feature, datasets.ClassLabel):
            self._class_names = feature.names
        elif not isinstance(feature, datasets.Value):
            raise DataError(f"{name}: column {group!r} must hold one text or number per row, its type is {feature}.")

    def add(self, table: pa.Table, room: int | None) -> None:
        """Take in the rows of a table, at most `room` usable ones."""
        scores = _matrix(table, self.score_columns)
        scored = ~np.isnan(scores).any(axis=1)
        blank = np.zeros(len(scores), dtype=bool)
        if not self.scores_alone:
            blank = _blank(table.column(self.columns.prompt))
        usable = scored & ~blank
        if room is not None and np.count_nonzero(usable) > room:
            self.add(table.slice(0, int(np.flatnonzero(usable)[room - 1]) + 1), None)
            return
        _report_scores(self.bad, scores, table, self.score_columns, self.num_rows)
        if not self.scores_alone:
            prompts = table.column(self.columns.prompt)
            _report(self.bad, np.flatnonzero(blank), prompts, self.num_rows, prompt_problem)
        num_kept = int(np.count_nonzero(usable))
        self.bad.num_rows += len(usable) - num_kept
        self._scores.append(scores[usable] if self.several else scores[usable, 0])
        self._usable.append(usable)
        texts = {column: self._as_text(table.column(column), column) for column in self.names}
        for column, array in texts.items():
            self._keys[column].append(self._text_keys(array, column)[usable])
        if texts:
            self.texts.add(texts)
        self.num_rows += len(usable)
        self.num_kept += num_kept

    def _as_text(self, column: pa.ChunkedArray, name: str) -> pa.Array:
        array = column.combine_chunks()
        if name == self.group_column and self._class_names is not None:
            array = pa.array(self._class_names, pa.large_string()).take(array)
        return array.cast(pa.large_string())

    def _text_keys(self, array: pa.Array, column: str) -> np.ndarray:
        texts = pc.fill_null(array, "None" if column == self.group_column else "")  # as training names it
        return hash_array(texts.cast(pa.large_binary()).to_numpy(zero_copy_only=False), categorize=False)

    def result(self) -> ScoredRows:
        """Close the texts and join the pieces."""
        self.texts.close()
        row_ids = np.flatnonzero(np.concatenate(self._usable)).astype(np.min_scalar_type(self.num_rows))
        keys = {column: np.concatenate(parts) for column, parts in self._keys.items()}
        scores = np.concatenate(self._scores)
        return ScoredRows(scores, row_ids, self.num_rows, dict(self.bad.counts), keys, self.texts)


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) float64, NaN for null and for what is not a number."""
    kind = column.type
    if pa.types.is_decimal(kind):
        column = column.cast(pa.string())  # text is read with correct rounding
    elif pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind)):
        return np.array([read_score(value)[0] for value in column.to_pylist()])  # a later piece of another type
    return pc.fill_null(column.cast(pa.float64(), safe=False), float("nan")).to_numpy()


def _blank(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool, prompts that are null or hold no more than white space."""
    column = column.cast(pa.large_string())
    blank = pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column))
    return pc.fill_null(blank, True).to_numpy()
