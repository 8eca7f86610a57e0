"""Read a dataset once, in several processes: check each row as training does, and keep facts about it."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from tgol_trainer.data.datasets import cell
from tgol_trainer.data.images import Stored, describe, stored_form
from tgol_trainer.data.prompts import foreign_syntax
from tgol_trainer.data.rows import CAUSES, BadRows, Columns, read_row, read_score
from tgol_trainer.data.streams import undecoded

from .duplicates import MARK_BYTES, image_mark
from .limits import CountLongPrompts

_CHUNK = 16  # rows per task: encoded images in memory for each task that waits
_PROMPTS_AT_ONCE = 512
_SHOWN = 5
_DIGEST_BYTES = 16

_Values = tuple[Any, Any, tuple[Any, ...]]  # prompt, image or video, scores
_Facts = tuple[
    tuple[float, ...], tuple[int, int], str, str, np.ndarray, np.ndarray
]  # the fields of a row after the prompt


class _Examined(NamedTuple):
    """What one row holds: `facts` if it is usable, else what is wrong with it."""

    problems: tuple[tuple[str, str], ...]  # cause and text, of prompt and image
    bad_scores: tuple[tuple[int, str, Any], ...]  # number of the score column, cause, value
    facts: _Facts | None


class Survey:
    """What is known of the rows: about 100 bytes per row and per different prompt, whatever the images' sizes."""

    def __init__(
        self, columns: Columns, score_columns: list[str], name: str, count_long_prompts: CountLongPrompts | None
    ) -> None:
        self.columns, self.score_columns = columns, score_columns
        self.num_rows = 0
        self.bad = BadRows(name, columns)
        self.bad_rows: dict[tuple[str, str], list[int]] = {}  # by cause and column
        self.token_limit: int | None = None
        self.long_prompts: dict[int, str] = {}  # the first few, by their first row
        self.num_long_prompts = 0
        self.foreign_prompts: dict[str, list[int]] = {}  # by what other programs read in them, the prompts' first rows
        self._count_long_prompts = count_long_prompts
        self._new_prompts: list[tuple[int, str]] = []
        self._prompts: dict[bytes, int] = {}
        # Of a usable row: its number from 0, its prompt (equal numbers are equal prompts), scores, width and height,
        # mode as stored, the format if the file holds several images, digest of the pixels, and mark (not of videos).
        self._fields = np.dtype(
            [
                ("row", np.int64),
                ("prompt", np.int64),
                ("scores", np.float64, (len(score_columns),)),
                ("size", np.int32, (2,)),
                ("mode", "S8"),
                ("several", "S8"),
                ("digest", np.uint8, (_DIGEST_BYTES,)),
                ("mark", np.uint8, (MARK_BYTES,)),
            ]
        )
        self._table = bytearray()

    def add(self, prompt: Any, found: _Examined) -> None:
        """Take in the next row."""
        row = self.num_rows
        self.num_rows += 1
        if found.facts is None:
            self.bad.add(row, found.problems)
            bad = [(cause, getattr(self.columns, CAUSES[cause][0])) for cause, _ in found.problems]
            for index, cause, value in found.bad_scores:
                self.bad.add_rows(cause, np.array([row]), value, self.score_columns[index])
                bad.append((cause, self.score_columns[index]))
            for cause_and_column in bad:
                self.bad_rows.setdefault(cause_and_column, []).append(row)
            return
        key = hashlib.blake2b(prompt.encode("utf-8"), digest_size=16).digest()
        if key not in self._prompts:
            self._new_prompts.append((row, prompt))
            for kind in foreign_syntax(prompt):
                self.foreign_prompts.setdefault(kind, []).append(row)
            if len(self._new_prompts) == _PROMPTS_AT_ONCE:
                self.count_prompts()
        prompt_id = self._prompts.setdefault(key, len(self._prompts))
        self._table += np.array((row, prompt_id, *found.facts), dtype=self._fields).tobytes()

    def count_prompts(self) -> None:
        """Count the long prompts among those that came since the last call."""
        new, self._new_prompts = self._new_prompts, []
        if self._count_long_prompts is None or not new:
            return
        number, self.token_limit = self._count_long_prompts([prompt for _, prompt in new])
        self.num_long_prompts += number
        if number and len(self.long_prompts) < _SHOWN:
            long = ((row, describe(prompt)) for row, prompt in new if self._count_long_prompts([prompt])[0])
            self.long_prompts.update(islice(long, _SHOWN - len(self.long_prompts)))

    @property
    def num_prompts(self) -> int:
        """Different prompts of usable rows."""
        return len(self._prompts)

    @property
    def table(self) -> np.ndarray:
        """(N,) records of the usable rows: `row`, `prompt`, `scores`, `size`, `mode`, `several`, `digest`, `mark`."""
        return np.frombuffer(self._table, dtype=self._fields)


def survey_rows(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: Columns,
    *,
    score_columns: Sequence[str] | None,
    name: str,
    count_long_prompts: CountLongPrompts | None,
    num_proc: int,
    progress: bool,
) -> Survey:
    """
    Read every row once, in order, and examine rows in several processes.

    A few chunks of encoded rows per process are in memory at a time, and one decoded image per process. Arguments are
    those of [`diagnose`]; with several score columns a row needs a score in each.

    Raises:
        ChildProcessError: if one of several processes was stopped from outside.
    """
    survey = Survey(columns, list(score_columns or [columns.score]), name, count_long_prompts)
    total = len(dataset) if isinstance(dataset, datasets.Dataset) else None
    values = _values(dataset, columns, survey.score_columns)
    chunks = iter(lambda: list(islice(values, _CHUNK)), [])
    with tqdm(total=total, desc="Checking", unit=columns.medium, disable=not progress) as bar:
        for prompts, found in _examined(chunks, columns.num_frames, num_proc):
            for prompt, row in zip(prompts, found, strict=True):
                survey.add(prompt, row)
            bar.update(len(prompts))
    survey.count_prompts()
    return survey


def _values(
    dataset: datasets.Dataset | datasets.IterableDataset, columns: Columns, scores: list[str]
) -> Iterator[_Values]:
    prompt, visual = columns.prompt, columns.visual
    names = [prompt, visual, *scores]
    if isinstance(dataset, datasets.IterableDataset):
        for row in undecoded(dataset, names):
            yield columns.text(row.get(prompt)), row.get(visual), tuple(row.get(score) for score in scores)
        return
    for table in dataset.select_columns(names).with_format("arrow").iter(_CHUNK):
        parts = [table.column(column) for column in names]
        for index in range(table.num_rows):
            first, second, *others = (cell(part, index) for part in parts)
            yield columns.text(first), second, tuple(others)


def _examined(
    chunks: Iterator[list[_Values]], num_frames: int | None, num_proc: int
) -> Iterator[tuple[list[Any], list[_Examined]]]:
    """Yield the prompts of each chunk and the facts of its rows, in order."""
    if num_proc <= 1:
        for chunk in chunks:
            yield [prompt for prompt, _, _ in chunk], _examine(chunk, num_frames)
        return
    # A pool that is given all chunks at once would hold the whole dataset.
    waiting: deque[tuple[list[Any], Future[list[_Examined]]]] = deque()
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
                f"One of the {num_proc} decoding processes ended without an error. The system probably stopped it for "
                "want of memory. Start again with fewer processes: `num_proc=1` (`--num_proc 1`)."
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _examine(chunk: list[_Values], num_frames: int | None) -> list[_Examined]:
    examined = []
    for prompt, visual, values in chunk:
        row = read_row(prompt, visual, 0.0, num_frames)  # the scores come after it
        read = [read_score(value) for value in values]
        bad = tuple((index, cause, values[index]) for index, (_, cause) in enumerate(read) if cause is not None)
        facts: _Facts | None = None
        if row.visual is not None and not row.problems and not bad:
            digest = hashlib.blake2b(repr(row.visual.size).encode(), digest_size=_DIGEST_BYTES)
            digest.update(row.visual.tobytes())
            stored, mark = Stored("RGB", None, False), bytes(MARK_BYTES)
            if isinstance(row.visual, Image.Image):
                stored, mark = stored_form(visual) or Stored("unknown", None, False), image_mark(row.visual)
            pixels = np.frombuffer(digest.digest(), np.uint8)
            scores = tuple(score for score, _ in read)
            extra = (stored.format or "") if stored.several else ""
            facts = scores, row.visual.size, stored.mode, extra, pixels, np.frombuffer(mark, np.uint8)
        examined.append(_Examined(row.problems, bad, facts))
    return examined
