"""Check the rows of a stream while they are read, and read its scores before training."""

from __future__ import annotations

import hashlib
import logging
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from datasets.distributed import split_dataset_by_node
from datasets.utils import tqdm
from PIL import Image

from .checks import check_class, check_columns, check_score_type
from .images import DataError, describe
from .rows import DEFAULT_COLUMNS, BadRows, Columns, OnBadSample, check_policy, read_row, read_score
from .videos import Video

logger = logging.getLogger(__name__)

_ERRORS_SHOWN = 5


class ScoredStream(torch.utils.data.IterableDataset):
    """
    The usable rows of a stream, checked while it is read.

    Rows are those of [`ScoredDataset`], with the image already opened as an RGB image, or a video decoded once and
    found good (training decodes it again, since clips in memory are large). `row_id` is a 63-bit hash of the row's
    prompt, score and pixels, the same whatever reads the row and in which order; equal rows share it. `dropped` counts
    by cause the rows that this process has left out so far; each worker of a DataLoader counts its own.

    Args:
        dataset ([`datasets.IterableDataset`]): With one prompt, image or video, and score a row.
        columns ([`Columns`], *optional*): Their names.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops at the first bad row; `"skip"` leaves it out, counts it and warns.
        name (`str`, *optional*, defaults to `"train_dataset"`): The argument it was given as, for messages.

    Attributes:
        follower (`Callable[[], Callable[[float], dict]]`, *optional*):
            Makes, for each pass over the stream or a part of it, a function from a row's raw score to its labels, such
            as [`labels.Labeler.follower`]; set by the trainer on the whole stream. Each process and worker follows the
            rows that it reads.
        source ([`datasets.IterableDataset`]): The dataset as it was given.

    Raises:
        DataError: for a wrong class, column or type; while reading, for a bad row under `"raise"`.
    """

    follower: Callable[[], Callable[[float], dict[str, Any]]] | None = None

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        columns: Columns = DEFAULT_COLUMNS,
        *,
        on_bad_sample: OnBadSample = "raise",
        name: str = "train_dataset",
    ) -> None:
        check_class(dataset, name)
        check_policy(on_bad_sample)
        if not isinstance(dataset, datasets.IterableDataset):
            raise DataError(f"{name}: it is not a stream. Use prepare_dataset for a datasets.Dataset.")
        check_columns(dataset, columns, name)
        self.source = dataset
        self._whole = self  # parts read its `follower`
        self._dataset = undecoded(dataset, columns.names)
        self._columns = columns
        self._on_bad_sample = on_bad_sample
        self._name = name
        self.dropped: Counter[str] = Counter()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        columns = self._columns
        bad, index = BadRows(self._name, columns), -1
        follower = self._whole.follower
        label = follower() if follower is not None else None
        for index, values in enumerate(self._dataset):
            prompt, visual, score = (values.get(column) for column in columns.names)
            row = read_row(columns.text(prompt), visual, score, columns.num_frames)
            if row.visual is not None and not row.problems:
                row_id = _content_id(row.prompt, row.score, row.visual)
                sample = {"prompt": row.prompt, columns.medium: row.visual, "score": row.score, "row_id": row_id}
                yield sample if label is None else {**sample, **label(row.score)}
                continue
            bad.add(index, row.problems)
            if self._on_bad_sample == "raise":
                raise bad.error(f"the {index + 1} rows that this process has read")
            self.dropped.update(cause for cause, _ in row.problems)
            if bad.num_rows == 1:
                logger.warning("%s: a row is left out.\n%s", self._name, bad.listing())
        if bad.num_rows > 1:
            logger.warning(
                "%s: %d of %d rows that this process read are left out.\n%s",
                self._name,
                bad.num_rows,
                index + 1,
                bad.listing(),
            )

    def set_epoch(self, epoch: int) -> None:
        """
        Pass the epoch on to the stream, which shuffles by it.

        Args:
            epoch (`int`): Counted from 0.
        """
        self._dataset.set_epoch(epoch)

    @property
    def num_shards(self) -> int:
        """Parts that the stream can be read in; more workers than this stay idle."""
        return self._dataset.num_shards

    def split(self, rank: int, world_size: int) -> ScoredStream:
        """
        Return the part of the stream that one process reads; the parts are disjoint and complete.

        Args:
            rank (`int`): Number of the process, from 0.
            world_size (`int`): Number of processes.
        """
        part = ScoredStream.__new__(ScoredStream)
        part.__dict__.update(self.__dict__)
        part._dataset = split_dataset_by_node(self._dataset, rank=rank, world_size=world_size)
        part.dropped = Counter()
        return part


def undecoded(dataset: datasets.IterableDataset, names: Sequence[str]) -> datasets.IterableDataset:
    """Return a stream of the named columns with files left encoded; of all columns where the features are unknown."""
    dataset = dataset.with_format(None)
    if dataset.features is None:
        return dataset  # nothing is known to decode
    dataset = dataset.select_columns(list(names))
    for column in names:
        feature = dataset.features[column]
        if isinstance(feature, (datasets.Image, datasets.Video)):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
        elif isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):  # frames of a video
            dataset = dataset.cast_column(column, datasets.List(datasets.Image(decode=False)))
    return dataset


def _content_id(prompt: str, score: float, visual: Image.Image | Video) -> int:
    text = prompt.encode("utf-8")
    digest = hashlib.blake2b(struct.pack("<qdqq", len(text), score, *visual.size), digest_size=8)
    digest.update(text)
    digest.update(visual.tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


def stream_scores(
    dataset: datasets.IterableDataset,
    columns: Columns,
    *,
    on_bad_sample: OnBadSample = "raise",
    limit: int | None = None,
    name: str = "train_dataset",
) -> tuple[np.ndarray, list[str] | None]:
    """
    Read the scores of a stream without opening an image, for a threshold before the first step.

    Args:
        dataset ([`datasets.IterableDataset`]): The stream.
        columns ([`Columns`]): Its column names.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` stops once five bad scores are found, or at the end; `"skip"` leaves them out and warns.
        limit (`int`, *optional*): Stop after this many usable scores; `None` reads to the end.
        name (`str`, *optional*, defaults to `"train_dataset"`): The argument it was given as, for messages.

    Returns:
        `tuple[numpy.ndarray, list[str] | None]`: (N,) float64, and the N names of their groups where `columns` name a
        group.

    Raises:
        DataError: for no score column, bad scores under `"raise"`, or no usable score.
    """
    check_class(dataset, name)
    check_policy(on_bad_sample)
    if dataset.features is not None:
        if not {columns.score, columns.group or columns.score} <= set(dataset.features):
            check_columns(dataset, columns, name)
        check_score_type(dataset, columns.score, name)
    scores: list[float] = []
    groups: list[str] = []
    bad, index = BadRows(name, columns), -1
    rows = enumerate(undecoded(dataset, [columns.score, *([columns.group] if columns.group else [])]))
    for index, row in tqdm(rows, desc="Reading scores", unit=" rows"):
        value = row.get(columns.score)
        score, cause = read_score(value)
        if cause is None:
            scores.append(score)
            if columns.group:
                name_of = row.get(columns.group)
                groups.append(str(columns.text(name_of) if columns.group == columns.prompt else name_of))
        else:
            bad.add(index, [(cause, describe(value))])
            if on_bad_sample == "raise" and bad.num_rows == _ERRORS_SHOWN:
                break
        if limit is not None and len(scores) >= limit:
            break
    if index < 0:
        raise DataError(f"{name}: the stream has no rows. Check its split and its filters.")
    if bad.num_rows and (on_bad_sample == "raise" or not scores):
        raise bad.error(f"{index + 1} rows read", can_skip=bool(scores) and on_bad_sample == "raise")
    if bad.num_rows:
        logger.warning("%s: %d of %d scores are left out.\n%s", name, bad.num_rows, index + 1, bad.listing())
    return np.array(scores, dtype=np.float64), groups if columns.group else None
