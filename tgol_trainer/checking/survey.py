"""One pass over a dataset in several processes: every row checked as training checks it, and what else there is."""

from __future__ import annotations

import dataclasses
import hashlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from tgol_trainer.data.datasets import cell
from tgol_trainer.data.images import describe, stored_mode
from tgol_trainer.data.rows import CAUSES, BadRows, Columns, read_row, read_score
from tgol_trainer.data.streams import undecoded

from .duplicates import MARK_BYTES, image_mark

_CHUNK = 16
"""Rows a task: so many encoded images are in memory for each task that waits."""
_PROMPTS_AT_ONCE = 512
_SHOWN = 5

_Values = tuple[Any, Any, tuple[Any, ...]]
CountLongPrompts = Callable[[Sequence[str]], tuple[int, int]]
"""Prompts to (how many are cut, the limit in tokens), as `ModelFamily.count_long_prompts`."""


@dataclasses.dataclass(frozen=True)
class _Facts:
    """
    What one row holds: causes and texts of what is wrong with prompt and image, number of the column, cause and value
    of scores that are none; the last four are of a usable row.
    """

    scores: tuple[float, ...]
    problems: tuple[tuple[str, str], ...]
    bad_scores: tuple[tuple[int, str, Any], ...]
    size: tuple[int, int] = (0, 0)
    mode: str | None = None
    digest: bytes = b""
    mark: bytes = b""


class Survey:
    """
    What is known of the rows after the pass: about 100 bytes a row and as much a prompt, whatever the images' sizes.

    Args:
        columns ([`Columns`]):
            Of the dataset.
        score_columns (`Sequence[str]`):
            K columns of scores, in place of that of `columns`.
        name (`str`):
            What messages call the dataset.
        count_long_prompts (`Callable`, *optional*):
            Counts prompts that the text encoder cuts; `None` counts none.
    """

    def __init__(
        self,
        columns: Columns,
        score_columns: Sequence[str],
        name: str,
        count_long_prompts: CountLongPrompts | None,
    ) -> None:
        self.columns, self.score_columns = columns, list(score_columns)
        self.num_rows = 0
        self.bad = BadRows(name, columns)
        self.bad_rows: dict[tuple[str, str], array] = {}  # by cause and column
        self.modes: Counter[str] = Counter()
        self.mode_rows: dict[str, list[int]] = {}  # the first of each mode
        self.token_limit: int | None = None
        self.long_prompts: dict[int, str] = {}  # the first, by the row they come in first
        self.num_long_prompts = 0
        self._count_long_prompts = count_long_prompts
        self._new_prompts: list[tuple[int, str]] = []
        self._prompts: dict[bytes, int] = {}
        self._rows, self._prompt_ids, self._scores = array("q"), array("q"), array("d")
        self._sizes, self._digests, self._marks = array("i"), bytearray(), bytearray()

    def add(self, prompt: Any, facts: _Facts) -> None:
        """
        Take in the next row.

        Args:
            prompt (`Any`):
                Its prompt.
            facts (`_Facts`):
                What its examination found.
        """
        row = self.num_rows
        self.num_rows += 1
        if facts.problems or facts.bad_scores:
            self.bad.add(row, facts.problems)
            found = [(cause, getattr(self.columns, CAUSES[cause][0])) for cause, _ in facts.problems]
            for index, cause, value in facts.bad_scores:
                self.bad.add_rows(cause, np.array([row]), value, self.score_columns[index])
                found.append((cause, self.score_columns[index]))
            for cause_and_column in found:
                self.bad_rows.setdefault(cause_and_column, array("q")).append(row)
            return
        key = hashlib.blake2b(prompt.encode("utf-8"), digest_size=16).digest()
        if key not in self._prompts:
            self._new_prompts.append((row, prompt))
            if len(self._new_prompts) == _PROMPTS_AT_ONCE:
                self.count_prompts()
        self._prompt_ids.append(self._prompts.setdefault(key, len(self._prompts)))
        self._rows.append(row)
        self._scores.extend(facts.scores)
        self._sizes.extend(facts.size)
        self._digests += facts.digest
        self._marks += facts.mark
        mode = facts.mode or "unknown"
        self.modes[mode] += 1
        if self.modes[mode] <= _SHOWN:
            self.mode_rows.setdefault(mode, []).append(row)

    def count_prompts(self) -> None:
        """Count the long ones among the prompts that are new since the last time."""
        new, self._new_prompts = self._new_prompts, []
        if self._count_long_prompts is None or not new:
            return
        number, self.token_limit = self._count_long_prompts([prompt for _, prompt in new])
        self.num_long_prompts += number
        if number and len(self.long_prompts) < _SHOWN:
            long = ((row, describe(prompt)) for row, prompt in new if self._count_long_prompts([prompt])[0])
            self.long_prompts.update(islice(long, _SHOWN - len(self.long_prompts)))

    @property
    def rows(self) -> np.ndarray:
        """(N,) int64, the numbers of the usable rows, from 0."""
        return np.array(self._rows, dtype=np.int64)

    @property
    def prompt_ids(self) -> np.ndarray:
        """(N,) int64, equal for equal prompts."""
        return np.array(self._prompt_ids, dtype=np.int64)

    @property
    def num_prompts(self) -> int:
        """Different prompts of usable rows."""
        return len(self._prompts)

    @property
    def scores(self) -> np.ndarray:
        """(N, K) float64."""
        return np.array(self._scores, dtype=np.float64).reshape(-1, len(self.score_columns))

    @property
    def sizes(self) -> np.ndarray:
        """(N, 2) int32, width and height in pixels."""
        return np.array(self._sizes, dtype=np.int32).reshape(-1, 2)

    @property
    def digests(self) -> np.ndarray:
        """(N, 16) uint8, equal for equal pixels."""
        return np.frombuffer(bytes(self._digests), dtype=np.uint8).reshape(-1, 16)

    @property
    def marks(self) -> np.ndarray | None:
        """(N, `MARK_BYTES`) uint8 of [`image_mark`]; `None` for videos."""
        if self.columns.video is not None:
            return None
        return np.frombuffer(bytes(self._marks), dtype=np.uint8).reshape(-1, MARK_BYTES)


def survey_rows(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: Columns,
    *,
    score_columns: Sequence[str] | None = None,
    name: str = "dataset",
    count_long_prompts: CountLongPrompts | None = None,
    num_proc: int = 1,
    progress: bool = True,
) -> Survey:
    """
    Read every row once, in order, and examine rows in several processes.

    A few chunks of encoded rows a process are in memory at a time, and one decoded image each.

    Args:
        dataset ([`datasets.Dataset`] or [`datasets.IterableDataset`]):
            With the columns, of fitting types.
        columns ([`Columns`]):
            Their names.
        score_columns (`Sequence[str]`, *optional*):
            Several columns of scores, in place of that of `columns`; a row needs a score in each.
        name (`str`, *optional*, defaults to `"dataset"`):
            What messages call it.
        count_long_prompts (`Callable`, *optional*):
            As in [`Survey`].
        num_proc (`int`, *optional*, defaults to 1):
            Processes that decode; 1 decodes in this one.
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar.

    Returns:
        [`Survey`]

    Raises:
        ChildProcessError: if one of several processes was stopped from outside.
    """
    survey = Survey(columns, score_columns or [columns.score], name, count_long_prompts)
    total = len(dataset) if isinstance(dataset, datasets.Dataset) else None
    chunks = _chunks(_values(dataset, [columns.prompt, columns.visual, *survey.score_columns]))
    with tqdm(total=total, desc="Checking", unit=columns.medium, disable=not progress) as bar:
        for prompts, found in _examined(chunks, columns.num_frames, num_proc):
            for prompt, facts in zip(prompts, found, strict=True):
                survey.add(prompt, facts)
            bar.update(len(prompts))
    survey.count_prompts()
    return survey


def _values(dataset: datasets.Dataset | datasets.IterableDataset, names: list[str]) -> Iterator[_Values]:
    prompt, visual, *scores = names
    if isinstance(dataset, datasets.IterableDataset):
        for row in undecoded(dataset, names):
            yield row.get(prompt), row.get(visual), tuple(row.get(score) for score in scores)
        return
    for table in dataset.select_columns(names).with_format("arrow").iter(_CHUNK):
        parts = [table.column(column) for column in names]
        for index in range(table.num_rows):
            first, second, *others = (cell(part, index) for part in parts)
            yield first, second, tuple(others)


def _chunks(values: Iterable[_Values]) -> Iterator[list[_Values]]:
    values = iter(values)
    while chunk := list(islice(values, _CHUNK)):
        yield chunk


def _examined(
    chunks: Iterator[list[_Values]], num_frames: int | None, num_proc: int
) -> Iterator[tuple[list[Any], list[_Facts]]]:
    """Yield the prompts of each chunk and what was found, in order."""
    if num_proc <= 1:
        for chunk in chunks:
            yield [prompt for prompt, _, _ in chunk], _examine(chunk, num_frames)
        return
    # Never more than this many are submitted: a pool that is given all at once would hold the whole dataset.
    waiting: deque[tuple[list[Any], Future[list[_Facts]]]] = deque()
    with ProcessPoolExecutor(num_proc) as pool:
        try:
            for chunk in chunks:
                if len(waiting) == 3 * num_proc:
                    prompts, future = waiting.popleft()
                    yield prompts, future.result()
                waiting.append(([prompt for prompt, _, _ in chunk], pool.submit(_examine, chunk, num_frames)))
            while waiting:
                prompts, future = waiting.popleft()
                yield prompts, future.result()
        except BrokenProcessPool as error:
            raise ChildProcessError(
                f"One of {num_proc} processes that decode ended without an error, as one does that the system stops "
                "for want of memory. Start again with fewer: `num_proc=1` (`--num_proc 1`)."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _examine(chunk: list[_Values], num_frames: int | None) -> list[_Facts]:
    found = []
    for prompt, visual, values in chunk:
        row = read_row(prompt, visual, 0.0, num_frames)  # the scores come after it
        read = [read_score(value) for value in values]
        bad = tuple((index, cause, values[index]) for index, (_, cause) in enumerate(read) if cause is not None)
        scores = tuple(score for score, _ in read)
        if row.problems or bad or row.visual is None:
            found.append(_Facts(scores, row.problems, bad))
            continue
        digest = hashlib.blake2b(repr(row.visual.size).encode(), digest_size=16)
        digest.update(row.visual.tobytes())
        image = row.visual if isinstance(row.visual, Image.Image) else None
        mode, mark = (stored_mode(visual), image_mark(image)) if image else ("RGB", b"")
        found.append(_Facts(scores, (), (), row.visual.size, mode, digest.digest(), mark))
    return found
