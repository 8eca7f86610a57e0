"""The scores of millions of rows, read through Arrow with the checks of training; images are not touched."""

from __future__ import annotations

import dataclasses
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.utils import tqdm

from .checks import check_class, check_columns, check_score_columns, check_score_type
from .images import DataError
from .parquet import ParquetColumns
from .rows import DEFAULT_COLUMNS, BadRows, Columns, prompt_problem, read_score

logger = logging.getLogger(__name__)

_BATCH = 100_000
_MULTIPLIER, _SEED = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xD6E8FEB86659FD93)
_WORD_SHIFT = np.uint64(32)
_MASKS = np.array([2 ** (8 * size) - 1 for size in range(9)], dtype=np.uint64)
_BLOCK = 16_384  # texts whose keys fit a processor's cache


@dataclasses.dataclass(frozen=True)
class ScoredRows:
    """
    Scores of the usable rows of a dataset, and which rows share a prompt or a group.

    Args:
        scores (`numpy.ndarray`):
            (N,) float64, raw; (N, K) of several columns.
        row_ids (`numpy.ndarray`):
            (N,) integers, their numbers in the user's dataset.
        num_rows (`int`):
            Rows of the dataset, or read of the stream.
        dropped (`dict[str, int]`):
            Cause to number of rows left out; a row with two causes counts under both.
        keys (`dict[str, numpy.ndarray]`):
            Column of texts to (N,) uint64 keys, equal for equal texts; [`groups`] takes them out.
        texts ([`Texts`]):
            Of all rows read, by row id.
    """

    scores: np.ndarray
    row_ids: np.ndarray
    num_rows: int
    dropped: dict[str, int]
    keys: dict[str, np.ndarray]
    texts: Texts

    def groups(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        """
        Put rows with equal text side by side: sums over groups then read memory in order.

        Args:
            column (`str`):
                A column of `keys`.

        Returns:
            `tuple[numpy.ndarray, numpy.ndarray]`: (N,) int64, positions in `scores`, and (N,) int64, the numbers
            0 .. G - 1 of their groups, in no particular order of the groups.
        """
        return side_by_side(self.keys.pop(column))

    def kept(self, mask: np.ndarray) -> ScoredRows:
        """
        Return the rows where a mask is true.

        Args:
            mask (`numpy.ndarray`):
                (N,) bool.
        """
        return dataclasses.replace(
            self,
            scores=self.scores[mask],
            row_ids=self.row_ids[mask],
            keys={column: keys[mask] for column, keys in self.keys.items()},
        )


class Texts:
    """Text columns of the rows read, in a file without a name, so that memory does not grow with the dataset."""

    def __init__(self, columns: list[str]) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this
        self._schema = pa.schema([(column, pa.large_string()) for column in columns])
        self._writer = pa.ipc.new_file(pa.PythonFile(self._file, "w"), self._schema)
        self._ends: list[int] = []

    def add(self, columns: dict[str, pa.Array]) -> None:
        """
        Append rows.

        Args:
            columns (`dict[str, pyarrow.Array]`):
                Column to texts of type `large_string`.
        """
        batch = pa.record_batch(columns, schema=self._schema)
        self._writer.write_batch(batch)
        self._ends.append((self._ends[-1] if self._ends else 0) + batch.num_rows)

    def close(self) -> None:
        """End writing; texts can be looked up from here on."""
        self._writer.close()
        self._file.seek(0)

    def __call__(self, column: str, rows: np.ndarray) -> list[str | None]:
        """Return the texts of rows, which cost reading a hundred thousand rows each at most."""
        reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))
        part = np.searchsorted(self._ends, rows, side="right")
        found: list[str | None] = [None] * len(rows)
        for number in np.unique(part):
            batch = reader.get_batch(int(number))
            start = self._ends[number - 1] if number else 0
            for index in np.flatnonzero(part == number):
                found[index] = batch.column(column)[int(rows[index]) - start].as_py()
        return found


def read_scores(
    dataset: datasets.Dataset | datasets.IterableDataset | ParquetColumns,
    columns: Columns = DEFAULT_COLUMNS,
    *,
    score_columns: Sequence[str] | None = None,
    group_column: str | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
    scores_alone: bool = False,
    limit: int | None = None,
    name: str = "train_dataset",
    progress: bool = True,
) -> ScoredRows:
    """
    Read the scores, prompts and groups of a dataset or stream that Arrow can read, with the checks of training.

    Args:
        dataset ([`datasets.Dataset`], [`datasets.IterableDataset`] or [`ParquetColumns`]):
            The column of images may be missing.
        columns ([`Columns`], *optional*):
            Names of the prompt and score columns.
        score_columns (`Sequence[str]`, *optional*):
            K columns of scores instead of the one of `columns`; a row is usable if all of them are.
        group_column (`str`, *optional*):
            Column of texts or numbers that groups rows.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` lists all rows with a bad score or prompt in one error; `"skip"` leaves them out and warns.
        scores_alone (`bool`, *optional*, defaults to `False`):
            Check scores and not prompts, as the threshold of a stream and of a proxy set is made.
        limit (`int`, *optional*):
            Stop after this many usable rows; `None` reads all.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            The argument it was given as, for messages.
        progress (`bool`, *optional*, defaults to `True`):
            Show a progress bar.

    Returns:
        [`ScoredRows`]

    Raises:
        DataError: for a missing column or a wrong type, bad rows under `"raise"`, or no usable row.
    """
    texts = [] if scores_alone and name == "proxy_dataset" else [columns.prompt]
    texts += [group_column] if group_column and group_column not in texts else []
    reader = _Reader(columns, score_columns, texts, group_column, name, scores_alone)
    total = None if isinstance(dataset, datasets.IterableDataset) else len(dataset)
    with tqdm(total=total, desc="Reading scores", unit=" rows", unit_scale=True, disable=not progress) as bar:
        for table in _read_ahead(reader.tables(dataset)):
            reader.add(table, None if limit is None else limit - reader.num_kept)
            bar.update(table.num_rows)
            if limit is not None and reader.num_kept >= limit:
                break
    bad, seen = reader.bad, reader.num_rows
    if not seen:
        raise DataError(f"{name}: it has no rows. Check its split and the filters applied to it.")
    if bad.num_rows and (on_bad_sample == "raise" or not reader.num_kept):
        raise bad.error(f"{seen} rows", can_skip=on_bad_sample == "raise" and reader.num_kept > 0)
    if bad.num_rows:
        logger.warning("%s: %d of %d rows are left out.\n%s", name, bad.num_rows, seen, bad.listing())
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
    Read several columns of scores.

    Args:
        dataset ([`datasets.Dataset`]):
            With these columns.
        score_columns (`Sequence[str]`):
            K names.
        bad ([`BadRows`]):
            Gets what cannot be used; its `num_rows` is left to the caller.

    Returns:
        `numpy.ndarray`: (N, K) float64, NaN for what cannot be used.
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
    for index, column in enumerate(score_columns):
        _report(bad, np.isnan(scores[:, index]), table.column(column), start, _score_problem, column)


def _score_problem(value: Any) -> str | None:
    return read_score(value)[1]


def _report(
    bad: BadRows,
    wrong: np.ndarray,
    cells: pa.ChunkedArray,
    start: int,
    cause: Callable[[Any], str | None],
    column: str | None = None,
) -> None:
    """Count wrong values by cause: a value stands for its kind, so one of each is looked at."""
    rows = np.flatnonzero(wrong)
    if not rows.size:
        return
    values = pc.dictionary_encode(cells.take(pa.array(rows)).combine_chunks(), null_encoding="encode")
    for code, value in enumerate(values.dictionary.to_pylist()):
        found = rows[np.asarray(values.indices) == code]
        bad.add_rows(cause(value) or "score is not a number", found + start, value, column)


class _Reader:
    """What has been read so far."""

    def __init__(
        self,
        columns: Columns,
        score_columns: Sequence[str] | None,
        texts: list[str],
        group_column: str | None,
        name: str,
        scores_alone: bool,
    ) -> None:
        self.several = list(score_columns or [])
        self.columns, self.names, self.name, self.scores_alone = columns, texts, name, scores_alone
        self.group_column = group_column
        self.bad, self.num_rows, self.num_kept = BadRows(name, columns), 0, 0
        self.texts = Texts(texts)
        self._scores: list[np.ndarray] = []
        self._left_out: list[np.ndarray] = []
        self._keys: dict[str, list[np.ndarray]] = {column: [] for column in texts}
        self._class_names: list[str] | None = None

    def tables(self, dataset: Any) -> Iterator[pa.Table]:
        """Yield the needed columns in pieces, after checking that they are there and of the right type."""
        columns = list(dict.fromkeys([*self.names, *(self.several or [self.columns.score])]))
        if isinstance(dataset, ParquetColumns):
            for number, table in enumerate(dataset.tables(_BATCH)):
                if not number:
                    self._check(dataset.head(table))
                yield table
            return
        check_class(dataset, self.name)
        if dataset.features is None:  # a stream of text files: its first piece tells
            pieces = dataset.with_format("arrow").iter(_BATCH)
            first = next(iter(pieces), None)
            if first is not None:
                self._check(datasets.Dataset(pa.table(first)))
                yield pa.table(first).select(columns)
                yield from (pa.table(piece).select(columns) for piece in pieces)
            return
        self._check(dataset)
        yield from dataset.select_columns(columns).with_format("arrow").iter(_BATCH)

    def _check(self, dataset: Any) -> None:
        if self.several:
            check_score_columns(dataset, self.several, self.name)
            if self.columns.prompt in self.names:
                check_columns(dataset, self.columns, self.name, scored=False, shown=False)
        elif self.columns.prompt in self.names or self.columns.score not in dataset.features:
            check_columns(dataset, self.columns, self.name, shown=False)
        else:
            check_score_type(dataset, self.columns.score, self.name)
        group = self.group_column
        if group is None:
            return
        if group not in dataset.features:
            raise DataError(
                f"{self.name}: no column {group!r} (group_column); the columns are {list(dataset.features)}."
            )
        feature = dataset.features[group]
        if not isinstance(feature, (datasets.Value, datasets.ClassLabel)):
            raise DataError(
                f"{self.name}: column {group!r} must hold one text or number a row, its type is {feature}."
            )
        if isinstance(feature, datasets.ClassLabel):
            self._class_names = feature.names

    def add(self, table: pa.Table, room: int | None) -> None:
        """Take in the rows of a table, of usable ones at most `room`."""
        wanted = self.several or [self.columns.score]
        scores = _matrix(table, wanted)
        good = ~np.isnan(scores).any(axis=1)
        empty = np.zeros(len(scores), dtype=bool)
        if not self.scores_alone:
            empty = _blank(table.column(self.columns.prompt))
        if room is not None and np.count_nonzero(good & ~empty) > room:
            end = int(np.flatnonzero(good & ~empty)[room - 1]) + 1
            table, scores, good, empty = table.slice(0, end), scores[:end], good[:end], empty[:end]
        _report_scores(self.bad, scores, table, wanted, self.num_rows)
        if not self.scores_alone:
            _report(self.bad, empty, table.column(self.columns.prompt), self.num_rows, prompt_problem)
        self.bad.num_rows += int(np.count_nonzero(~good | empty))
        kept = np.flatnonzero(good & ~empty)
        self._scores.append(scores[kept] if self.several else scores[kept, 0])
        self._left_out.append(np.flatnonzero(~good | empty) + self.num_rows)
        texts = {column: self._as_text(table.column(column), column) for column in self.names}
        for column, array in texts.items():
            keys = self._text_keys(array, column)
            self._keys[column].append(keys if kept.size == keys.size else keys[kept])
        if texts:
            self.texts.add(texts)
        self.num_rows += len(scores)
        self.num_kept += kept.size

    def _as_text(self, column: pa.ChunkedArray, name: str) -> pa.Array:
        array = column.combine_chunks()
        if pa.types.is_dictionary(array.type):
            array = array.dictionary_decode()
        if name == self.group_column and self._class_names is not None:
            array = pa.array(self._class_names, pa.large_string()).take(array)
        return array.cast(pa.large_string())

    def _text_keys(self, array: pa.Array, column: str) -> np.ndarray:
        if column != self.group_column:
            return text_keys(array)
        encoded = pc.fill_null(array, "None").dictionary_encode()  # as training names it; few different values
        return text_keys(encoded.dictionary)[encoded.indices.to_numpy()]

    def result(self) -> ScoredRows:
        """Close the texts and join the pieces."""
        self.texts.close()
        left_out = np.concatenate(self._left_out)
        rows = np.arange(self.num_rows, dtype=np.int32 if self.num_rows < 2**31 else np.int64)
        rows = np.delete(rows, left_out) if left_out.size else rows
        keys = {column: _joined(parts) for column, parts in self._keys.items()}
        return ScoredRows(_joined(self._scores), rows, self.num_rows, dict(self.bad.counts), keys, self.texts)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate, freeing each part as soon as it is copied."""
    joined = np.empty((sum(len(part) for part in parts), *parts[0].shape[1:]), dtype=parts[0].dtype)
    start = 0
    parts.reverse()
    while parts:
        part = parts.pop()
        joined[start : start + len(part)] = part
        start += len(part)
    return joined


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) float64, NaN for null and for what is no number."""
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), np.nan)
    if pa.types.is_decimal(kind):
        column = column.cast(pa.string())  # text is read with correct rounding
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        return np.array([read_score(value)[0] for value in column.to_pylist()])  # a later piece of another type
    elif pa.types.is_boolean(kind):
        column = column.cast(pa.uint8())
    return pc.fill_null(column.cast(pa.float64(), safe=False), float("nan")).to_numpy()


def _blank(column: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool, prompts that are null or hold no more than white space."""
    column = column.cast(pa.large_string())
    blank = pc.or_(pc.equal(pc.binary_length(column), 0), pc.utf8_is_space(column))
    return pc.fill_null(blank, True).to_numpy()


def side_by_side(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    Order keys so that equal ones are neighbours, in less than half the time of an `argsort`.

    The leading bits of a key with the row's number behind them are sorted as they are. Rows whose keys differ behind
    equal leading bits (some fifty pairs of ten million) are sorted again.

    Args:
        keys (`numpy.ndarray`):
            (N,) uint64, evenly spread; N >= 1.

    Returns:
        `tuple[numpy.ndarray, numpy.ndarray]`: (N,) int64, positions, and (N,) int64, the numbers 0 .. G - 1 of the
        different keys there.
    """
    bits = np.uint64(max(1, (keys.size - 1).bit_length()))
    row = (np.uint64(1) << bits) - np.uint64(1)
    packed = keys & ~row
    packed |= np.arange(keys.size, dtype=np.uint64)
    packed.sort()
    new, mixed = np.zeros(keys.size, dtype=bool), set()
    for start in range(0, keys.size - 1, _BATCH):
        part = packed[start : start + _BATCH + 1]
        ordered, heads = keys[part & row], part & ~row
        new[start + 1 : start + part.size] = differs = ordered[1:] != ordered[:-1]
        mixed.update(heads[1:][differs & (heads[1:] == heads[:-1])].tolist())
    first = np.array(sorted(mixed), dtype=np.uint64)
    runs = zip(np.searchsorted(packed, first), np.searchsorted(packed, first | row, side="right"), strict=True)
    packed &= row
    order = packed.view(np.int64)
    for start, stop in runs:
        order[start:stop] = order[start:stop][np.argsort(keys[order[start:stop]], kind="stable")]
        new[start + 1 : stop] = np.diff(keys[order[start:stop]]) != 0
    return order, np.cumsum(new, dtype=np.int64)


def text_keys(texts: pa.Array) -> np.ndarray:
    """
    Return a 64-bit key of each text, eight bytes at a time over all texts at once.

    Equal texts have equal keys. Among ten million different texts, two share a key with probability 3e-6.

    Args:
        texts (`pyarrow.Array`):
            (N,) of type `large_string`; null counts as the empty text.

    Returns:
        `numpy.ndarray`: (N,) uint64.
    """
    texts = pc.fill_null(texts, "") if texts.null_count else texts
    _, offsets_buffer, data_buffer = texts.buffers()
    if not len(texts) or data_buffer is None:
        return np.zeros(len(texts), dtype=np.uint64)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int64)[texts.offset : texts.offset + len(texts) + 1]
    data = np.frombuffer(data_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]]
    data = np.concatenate([data, np.zeros(8, dtype=np.uint8)])
    words = np.ndarray((data.size - 7,), dtype="<u8", buffer=data, strides=(1,))  # at every byte
    offsets = offsets - offsets[0]
    blocks = range(0, len(texts), _BLOCK)
    return np.concatenate([_block_keys(words, offsets[start : start + _BLOCK + 1]) for start in blocks])


def _block_keys(words: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    starts, left = offsets[:-1], np.diff(offsets)
    keys = (left.astype(np.uint64) + _SEED) * _MULTIPLIER
    active: np.ndarray | slice = slice(None)
    shortest, longest = left.min(), left.max()
    while longest > 0:
        if shortest <= 0:
            still = np.flatnonzero(left > 0)
            active = still if isinstance(active, slice) else active[still]
            starts, left = starts[still], left[still]
            shortest = left.min()
        word = words[starts]
        if shortest < 8:  # the bytes behind a text's end belong to the next one
            word &= _MASKS[np.minimum(left, 8)]
        word ^= keys[active]
        word *= _MULTIPLIER
        keys[active] = word ^ (word >> _WORD_SHIFT)
        starts, left = starts + 8, left - 8
        shortest, longest = shortest - 8, longest - 8
    return keys
