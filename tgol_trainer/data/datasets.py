"""Check a dataset with a length before training, and read its usable rows."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from .buckets import Buckets
from .checks import check_class, check_columns
from .images import DataError, content_key, cropped_share
from .prompts import PromptSyntax, apply_syntax
from .rows import BadRows, Columns, OnBadSample, check_policy, read_row
from .scores import read_columns

logger = logging.getLogger(__name__)

# Part of the cache key of the check. `datasets` hashes a library function by its name, not its code: raise this number
# with every change of what `_check_batch` finds.
_CHECK_VERSION = 4
_CHECK_FEATURES = datasets.Features(
    {
        "score": datasets.Value("float64"),
        "width": datasets.Value("int32"),
        "height": datasets.Value("int32"),
        "digest": datasets.Value("binary"),
        "stamp": datasets.Value("string"),
        "causes": datasets.List(datasets.Value("string")),
        "details": datasets.List(datasets.Value("string")),
    }
)
_CROPPED_SHARE_LIMIT = 0.1
_BLOCK = 10_000
_SHOWN_ROWS = 5


@dataclasses.dataclass(frozen=True)
class DataReport:
    """
    Findings of the check of a dataset.

    Args:
        name (`str`): The argument that the dataset was given as.
        num_rows (`int`): Rows of the user's dataset.
        num_kept (`int`): Rows that can be trained on.
        dropped (`dict[str, int]`): Cause to number of rows; a row with two causes counts under both.
        num_smaller (`int`): Kept images or videos with a side below the resolution, which are enlarged.
        mean_cropped_share (`float`):
            Mean over the kept images or videos of the share of the area, 0 to 1, that the centre crop cuts away.
        num_unique_prompts (`int`): Different prompts among the kept rows.
        resolution (`tuple[int, int]`): (height, width) that the last numbers refer to, in pixels.
    """

    name: str
    num_rows: int
    num_kept: int
    dropped: dict[str, int]
    num_smaller: int
    mean_cropped_share: float
    num_unique_prompts: int
    resolution: tuple[int, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        return dataclasses.asdict(self) | {"resolution": list(self.resolution)}


class RowValues(Protocol):
    """Values of each row that are made after the rows are read, such as labels."""

    def row(self, index: int) -> dict[str, Any]:
        """Return the values of one row by their names in a batch."""
        ...


def cell(column: pa.ChunkedArray, index: int) -> Any:
    """Return an Arrow value as a Python value; nested lists of numbers as an array, 20 times faster than as lists."""
    scalar = column[index]
    values = scalar.value if isinstance(scalar, pa.ExtensionScalar) else scalar
    if not isinstance(values, (pa.ListScalar, pa.LargeListScalar)) or not values.is_valid:
        return scalar.as_py()
    nested, shape = values.values, [len(values.values)]
    while len(nested) and isinstance(nested, (pa.ListArray, pa.LargeListArray)):
        lengths = np.unique(nested.value_lengths().to_numpy(zero_copy_only=False))
        if nested.null_count or len(lengths) != 1:
            return scalar.as_py()  # ragged: opening it as an image says so
        shape.append(int(lengths[0]))
        nested = nested.flatten()
    if not pa.types.is_primitive(nested.type):  # the frames of a video: files, paths
        return scalar.as_py()
    return nested.to_numpy(zero_copy_only=False).reshape(shape)


def _check_batch(
    table: pa.Table, names: list[str], num_frames: int | None, prompt_syntax: PromptSyntax, version: int
) -> pa.Table:
    found = []
    for index in range(table.num_rows):  # one opened image or video at a time
        prompt, visual, *score = (cell(table.column(column), index) for column in names)
        if isinstance(prompt, str):
            prompt = apply_syntax(prompt, prompt_syntax)
        row = read_row(prompt, visual, score[0] if score else 0.0, num_frames)  # several are read elsewhere
        width, height = row.visual.size if row.visual else (0, 0)
        digest = b""
        if row.visual:
            digest = content_key(row.visual.size, row.visual.tobytes())
        causes, details = zip(*row.problems, strict=True) if row.problems else ((), ())
        facts = {"score": row.score, "width": width, "height": height, "digest": digest, "stamp": _stamp(visual)}
        found.append({**facts, "causes": causes, "details": details})
    return pa.Table.from_pylist(found, schema=_CHECK_FEATURES.arrow_schema)


def _stamp(visual: Any) -> str:
    """Size and time of the file that a path names, to notice a file that changed; "" for anything else."""
    path = visual.get("path") if isinstance(visual, dict) and visual.get("bytes") is None else visual
    if not isinstance(path, str) or "://" in path:
        return ""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return ""
    return f"{status.st_size} {status.st_mtime_ns}"


def _changed_files(rows: datasets.Dataset, visual: str, table: pa.Table) -> np.ndarray:
    """(M,) numbers of the rows whose file is another than the one that was checked."""
    changed, visuals = [], rows.select_columns([visual])
    for start in range(0, table.num_rows, _BLOCK):
        stamps = table.column("stamp").slice(start, _BLOCK).to_pylist()
        if any(stamps):
            column = visuals[start : start + _BLOCK].column(0)
            changed += [start + i for i, stamp in enumerate(stamps) if stamp and _stamp(column[i].as_py()) != stamp]
    return np.array(changed, dtype=np.int64)


def _checked_table(rows: datasets.Dataset, columns: Columns, num_proc: int | None) -> pa.Table:
    names = [column for column in columns.names if column in rows.column_names]
    arguments: dict[str, Any] = {
        "names": names,
        "num_frames": columns.num_frames,
        "prompt_syntax": columns.prompt_syntax,
        "version": _CHECK_VERSION,
    }
    folders = {os.path.dirname(file["filename"]) for file in rows.cache_files}
    checked = rows.map(
        _check_batch,
        batched=True,
        batch_size=256,  # each is a chunk of the cached table, and a chunk takes 5 kB of memory whatever it holds
        fn_kwargs=arguments,
        remove_columns=rows.column_names,
        features=_CHECK_FEATURES,
        num_proc=num_proc,
        # `map` writes its cache beside the data, which may lie on a read-only disk.
        keep_in_memory=not all(os.access(folder or ".", os.W_OK) for folder in folders),
        desc=f"Checking {columns.medium}s",
    )
    table = checked.with_format("arrow")[:]
    # The cache key holds the paths of the images, not their content: rows that were bad, which may have been mended,
    # and rows whose file changed get a second look.
    stale = np.union1d(np.flatnonzero(_num_causes(table)), _changed_files(rows, columns.visual, table))
    if not stale.size:
        return table
    again = pa.concat_tables(_check_batch(rows[int(index)], **arguments) for index in stale)
    order = np.arange(table.num_rows)
    order[stale] = table.num_rows + np.arange(stale.size)
    return pa.concat_tables([table.cast(again.schema), again]).take(order)


def _num_causes(checked: pa.Table) -> np.ndarray:
    return pc.list_value_length(checked.column("causes")).to_numpy()


def prepare_dataset(
    dataset: datasets.Dataset,
    columns: Columns,
    resolution: tuple[int, int],
    *,
    score_columns: Sequence[str] | None = None,
    on_bad_sample: OnBadSample = "raise",
    num_proc: int | None = None,
    name: str = "train_dataset",
    buckets: Buckets | None = None,
) -> tuple[ScoredDataset, DataReport]:
    """
    Find every bad row of a dataset in one pass before training. The result is cached beside the data.

    Args:
        dataset ([`datasets.Dataset`]): Each row has a prompt, an image or video, and a score.
        columns ([`Columns`]): Their names.
        resolution (`tuple[int, int]`): (height, width) in pixels, for the warnings about small and cut images.
        score_columns (`Sequence[str]`, *optional*):
            K columns of scores instead of the one of `columns`; the rows' scores are then (N, K).
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` lists all bad rows in one error; `"skip"` leaves them out and warns.
        num_proc (`int`, *optional*): Number of processes that check; `None` checks in this process.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            The argument that the dataset was given as, for messages.
        buckets ([`Buckets`], *optional*): Sizes for images of other shapes than `resolution`.

    Returns:
        `tuple[ScoredDataset, DataReport]`: the usable rows, and the findings.

    Raises:
        DataError: for a wrong class, column or type, an empty dataset, bad rows under `"raise"`, or no usable row.
    """
    check_class(dataset, name)
    check_policy(on_bad_sample)
    if not isinstance(dataset, datasets.Dataset):
        raise DataError(f"{name}: it is a stream, which is checked while it is read; use ScoredStream.")
    if not len(dataset):
        raise DataError(f"{name}: it has no rows. Check its split and the filters applied to it.")
    check_columns(dataset, columns, name, scored=score_columns is None)
    bad = BadRows(name, columns)
    several = None if score_columns is None else read_columns(dataset, score_columns, bad)
    read = columns.read if several is None else [column for column in columns.read if column != columns.score]
    rows = dataset.select_columns(read).with_format("arrow")
    table = _checked_table(rows, columns, num_proc)
    good = _num_causes(table) == 0
    if several is not None:
        unscored = np.isnan(several).any(axis=1)
        bad.num_rows += int((unscored & good).sum())
        good &= ~unscored
    for index in np.flatnonzero(_num_causes(table)).tolist():
        causes, details = (table.column(part)[index].as_py() for part in ("causes", "details"))
        bad.add(index, list(zip(causes, details, strict=True)))
    bad.raise_or_warn(len(dataset), on_bad_sample)
    kept = np.flatnonzero(good)
    scores = table.column("score").to_numpy() if several is None else several
    sizes = np.stack([table.column(side).to_numpy()[kept] for side in ("width", "height")], axis=1)
    digests = table.column("digest").take(kept).cast(pa.binary(16)).combine_chunks()
    keys = np.frombuffer(digests.buffers()[1], dtype=np.uint64).reshape(-1, 2)
    scored = ScoredDataset(rows, columns, scores[kept], kept, sizes=sizes, image_keys=keys)
    targets = np.full_like(sizes, resolution) if buckets is None else buckets.sizes[buckets.of(sizes)]
    num_smaller, mean_cropped_share = _warn_of_sizes(sizes, targets, kept, name, columns.medium)
    report = DataReport(
        name=name,
        num_rows=len(dataset),
        num_kept=len(scored),
        dropped=dict(bad.counts),
        num_smaller=num_smaller,
        mean_cropped_share=mean_cropped_share,
        num_unique_prompts=len(set(scored.prompts)),
        resolution=(int(resolution[0]), int(resolution[1])),
    )
    return scored, report


def _warn_of_sizes(
    sizes: np.ndarray, targets: np.ndarray, row_ids: np.ndarray, name: str, medium: str
) -> tuple[int, float]:
    """
    Warn of small and of cut images; return the number of small ones and the mean share that is cut away.

    `sizes` are (N, 2) widths and heights, `targets` the (N, 2) heights and widths that they are trained at.
    """
    small = np.flatnonzero((sizes < targets[:, ::-1]).any(axis=1))
    if small.size:
        first = ", ".join(f"row {row_ids[i]}: {sizes[i, 0]}x{sizes[i, 1]}" for i in small[:_SHOWN_ROWS])
        height, width = targets[small[0]]
        logger.warning(
            "%s: %d of %d %ss are smaller than they are trained at (the first one at %dx%d, width x height in pixels) "
            "and are enlarged, which blurs them (%s%s). Leave them out, or lower `resolution`.",
            *(name, small.size, len(sizes), medium, width, height),
            *(first, ", ..." if small.size > _SHOWN_ROWS else ""),
        )
    shapes, counts = np.unique(np.concatenate([sizes, targets], axis=1), axis=0, return_counts=True)
    shares = np.array([cropped_share(w, h, (height, width)) for w, h, height, width in shapes.tolist()])
    mean = float((shares * counts).sum() / counts.sum())
    if mean > _CROPPED_SHARE_LIMIT:
        logger.warning(
            "%s: the centre crop cuts away %.0f %% of the %s area on average, so training sees a part of what was "
            "scored. Leave `aspect_buckets` True, set `resolution` to the shape of most %ss, or crop and score them "
            "yourself.",
            *(name, 100 * mean, medium, medium),
        )
    return int(small.size), mean


class ScoredDataset(torch.utils.data.Dataset):
    """
    The usable rows of a checked dataset; made by [`prepare_dataset`]. Images stay encoded, and on disk if they were.

    `dataset[i]` is `{"prompt": str, "image": undecoded value, "score": raw score, "row_id": int}`, with `"video"`
    instead of `"image"` for videos. `row_id` is the row's number in the user's dataset, whatever rows were left out.
    `"image_key"` (16 bytes) is a hash of its pixels. Where `columns` name a group, `"group"` is a 63-bit hash of it.
    Where `labels` are set, the values of [`labels.RowLabels.row`] are added, and `"score"` is the normalised score.
    Where `encoded` is set, `"size"` stands in for the image, which is not read. Where `resolutions` are set there is
    `"resolution"`.

    Args:
        rows ([`datasets.Dataset`]): The user's dataset.
        columns ([`Columns`]): Its column names.
        scores (`numpy.ndarray`): (N,) float64 raw scores of the usable rows; (N, K) of several columns.
        row_ids (`numpy.ndarray`): (N,) int64, the numbers of the usable rows in `rows`.
        sizes (`numpy.ndarray`): (N, 2) integers, width and height of the images or videos in pixels.
        image_keys (`numpy.ndarray`): (N, 2) uint64, a hash of the images' pixels, or of the videos' chosen frames.

    Attributes:
        labels ([`labels.RowLabels`], *optional*): What the scores mean to training; set by the trainer.
        encoded (`bool`): Whether the images are encoded elsewhere; set by the trainer.
        resolutions (`numpy.ndarray`, *optional*):
            (N, 2) heights and widths that the images are trained at, where they differ; set by the trainer.
    """

    labels: RowValues | None = None
    encoded = False
    resolutions: np.ndarray | None = None

    def __init__(
        self,
        rows: datasets.Dataset,
        columns: Columns,
        scores: np.ndarray,
        row_ids: np.ndarray,
        *,
        sizes: np.ndarray,
        image_keys: np.ndarray,
    ) -> None:
        self._rows = rows.with_format("arrow")
        self._columns = columns
        self.scores = np.asarray(scores, dtype=np.float64)
        self.row_ids = np.asarray(row_ids, dtype=np.int64)
        self.sizes, self.image_keys = sizes, image_keys

    def __len__(self) -> int:
        return len(self.row_ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row_id = int(self.row_ids[index])
        row = (self._unseen if self.encoded else self._rows)[row_id]
        sample = {
            "prompt": self._columns.text(row.column(self._columns.prompt)[0].as_py()),
            "score": self.scores[index].tolist(),
            "row_id": row_id,
            "image_key": self.image_keys[index].tobytes(),
        }
        if self.encoded:
            sample["size"] = tuple(self.sizes[index].tolist())
        else:
            sample[self._columns.medium] = cell(row.column(self._columns.visual), 0)
        if self.resolutions is not None:
            sample["resolution"] = tuple(self.resolutions[index].tolist())
        if self._columns.group is not None:
            same = self._columns.group == self._columns.prompt
            sample["group"] = _group_id(sample["prompt"] if same else str(row.column(self._columns.group)[0].as_py()))
        return sample if self.labels is None else {**sample, **self.labels.row(index)}

    @functools.cached_property
    def _unseen(self) -> datasets.Dataset:
        return self._rows.remove_columns(self._columns.visual)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the usable rows, in order; read from the dataset at each call."""
        return self._texts(self._columns.prompt, self._columns.text)

    @property
    def written_prompts(self) -> list[str]:
        """The prompts as the dataset has them."""
        return self._texts(self._columns.prompt)

    @property
    def groups(self) -> list[str]:
        """The names of the usable rows' groups, in order; read from the dataset at each call."""
        if self._columns.group is None:
            raise ValueError("`columns.group` is not given: these rows have no groups.")
        if self._columns.group == self._columns.prompt:
            return self.prompts
        return self._texts(self._columns.group, str)

    @property
    def group_ids(self) -> list[int] | None:
        """The rows' `"group"`, in order; `None` where `columns` name no group."""
        return None if self._columns.group is None else [_group_id(name) for name in self.groups]

    def _texts(self, name: str, change: Callable[[Any], Any] = lambda text: text) -> list[Any]:
        """Return the changed values of a column, one object for equal ones: rows may be millions."""
        column = self._rows.select_columns([name])[:].column(0)
        if pa.types.is_nested(column.type):  # a group named by several values
            return [change(text) for text in column.take(pa.array(self.row_ids)).to_pylist()]
        encoded = column.dictionary_encode("encode").combine_chunks()
        texts = np.empty(len(encoded.dictionary), dtype=object)
        texts[:] = [change(text) for text in encoded.dictionary.to_pylist()]
        return texts[encoded.indices.to_numpy()[self.row_ids]].tolist()

    def kept(self, mask: np.ndarray) -> ScoredDataset:
        """
        Return the rows where a mask is true, without labels.

        Args:
            mask (`numpy.ndarray`): (N,) bool.
        """
        kept = copy.copy(self)
        kept.labels, kept.resolutions = None, None
        kept.scores, kept.row_ids = self.scores[mask], self.row_ids[mask]
        kept.sizes, kept.image_keys = self.sizes[mask], self.image_keys[mask]
        return kept


def _group_id(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
