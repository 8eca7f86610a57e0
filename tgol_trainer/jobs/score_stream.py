"""A stream of images or videos to shards with a column a reward, one file of its source after another."""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from tqdm.auto import tqdm

from tgol_trainer.data import Columns, DataError
from tgol_trainer.rewards import RewardFunction
from tgol_trainer.sources.shards import READ, SCORED, is_whole, read_rewards

from .score import (
    WEIGHTED,
    check_rewards,
    note_rewards,
    report_missing,
    score_dataset,
    source_of,
    weighted,
    weighted_facts,
)
from .shards import claim_folder, process_share, write_atomically, write_parquet

logger = logging.getLogger(__name__)


def score_stream(
    dataset: datasets.IterableDataset,
    rewards: Mapping[str, Callable[[], RewardFunction]],
    output_dir: str | Path,
    *,
    name: str = "",
    columns: Columns | None = None,
    one_at_a_time: bool = False,
    shard_size: int = 1024,
    share: tuple[int, int] | None = None,
    progress: bool = True,
    video_column: str | None = None,
    mean_over_frames: int | None = None,
    weights: Mapping[str, float] | None = None,
    **options: Any,
) -> dict[str, int]:
    """
    Do what [`score_dataset`] does with a stream, whose rows are neither counted nor downloaded before.

    A process takes every `world_size`-th file of the source and writes a shard for each `shard_size` rows of it, so
    that memory and the disk beside the output hold one shard. A source file that was read to its end is not opened
    again; of one that was begun, the rows of finished shards are passed over undecoded. A reward that is asked for
    later is scored on the shards that were written.

    Args:
        dataset (`datasets.IterableDataset`):
            With known features, as those of Parquet files are.
        rewards (`Mapping[str, Callable]`):
            As in [`score_dataset`].
        output_dir (`str` or `Path`):
            Holds `data/train-FILE-of-FILES-PART.parquet`, `tgol_score.json` and `rewards.json`.
        name (`str`, *optional*, defaults to `""`):
            What the dataset is called; another one is refused in the same folder. Its content is not compared.
        share (`tuple[int, int]`, *optional*):
            Number of this process and how many there are; by default those of the environment ([`process_share`]).
        columns, one_at_a_time, shard_size, progress, video_column, mean_over_frames, weights, options:
            As in [`score_dataset`].

    Returns:
        `dict[str, int]`: column name to the number of this process's rows without a score.

    Raises:
        DataError: as [`score_dataset`], and for a stream whose columns are not known.
    """
    _check_stream(dataset)
    columns, weights = columns or Columns(), weights or {}
    source = source_of(dataset, columns, video_column, mean_over_frames)
    check_rewards(dataset, list(rewards), source, weights)
    if shard_size < 1:
        raise DataError(f"`shard_size` is {shard_size}; it must be at least 1.")
    folder, num_files = Path(output_dir), dataset.num_shards
    facts: dict[str, Any] = {"streaming": True, "source": name, "num_files": num_files, "shard_size": shard_size}
    facts |= {"columns": [source.prompt, source.visual], "mean_over_frames": mean_over_frames}
    claim_folder(folder, SCORED, facts)
    rank, world_size = share or process_share()
    if num_files < world_size and rank == 0:
        logger.warning(
            "Processes without work: %d of %d. A stream is shared by files, and this one has %d: start as many.",
            *(world_size - num_files, world_size, num_files),
        )
    files = [_File(dataset, folder, index, shard_size) for index in range(rank, num_files, world_size)]
    options |= {"columns": columns, "video_column": video_column, "mean_over_frames": mean_over_frames}
    with tqdm(desc="Scoring", unit=source.medium, disable=not progress) as bar:
        for group in [[reward] for reward in rewards] if one_at_a_time else [list(rewards)]:
            loaders = {reward: functools.cache(rewards[reward]) for reward in group}
            for number, file in enumerate(files, 1):
                bar.set_postfix_str(f"file {number} of {len(files)}")
                for path, rows in file.parts():
                    bar.update(_score_part(path, rows, loaders, options))
            del loaders
            if one_at_a_time:
                gc.collect()  # the next group's models need the room
    paths = [path for file in files for path in file.done()]
    if weights:
        note_rewards(folder, weighted_facts(weights))
        for path in paths:
            _weigh(path, weights)
    return _count_missing(paths, _columns_of(folder, [*rewards, *([WEIGHTED] if weights else [])]), source.medium)


def _check_stream(dataset: Any) -> None:
    if not isinstance(dataset, datasets.IterableDataset):
        raise DataError("dataset: it is no stream; give it to score_dataset.")
    if dataset.features is None:
        raise DataError(
            "dataset: the types of the columns of this stream are not known, as of a table of paths (CSV, JSON "
            "Lines, metadata.jsonl). Such a table is small: leave out `--streaming`. Images in Parquet files stream."
        )


class _File:
    """One file of the source, and the shards made of it."""

    def __init__(self, dataset: datasets.IterableDataset, folder: Path, index: int, shard_size: int) -> None:
        self.dataset, self.folder, self.index, self.shard_size = dataset, folder, index, shard_size
        self.end = folder / READ / f"{index:05d}.json"

    def path(self, part: int) -> Path:
        return self.folder / "data" / f"train-{self.index:05d}-of-{self.dataset.num_shards:05d}-{part:05d}.parquet"

    def done(self) -> list[Path]:
        """Return the shards that are there, up to the first that is not."""
        paths: list[Path] = []
        while self.path(len(paths)).exists():
            paths.append(self.path(len(paths)))
        return paths

    def parts(self) -> Iterator[tuple[Path, datasets.Dataset | None]]:
        """Yield each shard with its rows, or with None where it is there; at the end, note how many there are."""
        done = self.done()
        yield from ((path, None) for path in done)
        if is_whole(self.end, len(done)):
            return
        part, features = len(done), self.dataset.features
        rows = self.dataset.decode(False).shard(num_shards=self.dataset.num_shards, index=self.index)
        for table in rows.skip(part * self.shard_size).with_format("arrow").iter(self.shard_size):
            yield (
                self.path(part),
                datasets.Dataset(table.cast(features.arrow_schema), datasets.DatasetInfo(features=features)),
            )
            part += 1
        self.end.parent.mkdir(exist_ok=True)
        write_atomically(self.end, json.dumps({"parts": part}) + "\n")


def _score_part(
    path: Path,
    rows: datasets.Dataset | None,
    loaders: Mapping[str, Callable[[], RewardFunction]],
    options: Mapping[str, Any],
) -> int:
    """Score one shard in a folder of its own, where a kill loses one reward at most; return how many rows it has."""
    folder = path.parent.parent
    if rows is None:
        known = pyarrow.parquet.read_schema(path).names
        loaders = {reward: load for reward, load in loaders.items() if reward not in known}
        if not loaders:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        rows = datasets.Dataset(pyarrow.parquet.read_table(path))
    work = folder / ".work" / path.stem
    score_dataset(
        rows, loaders, work, shard_size=len(rows), share=(0, 1), progress=False, report=False, **dict(options)
    )
    note_rewards(folder, read_rewards(work))
    os.replace(next((work / "data").glob("*.parquet")), path)
    shutil.rmtree(work)
    return len(rows)


def _weigh(path: Path, weights: Mapping[str, float]) -> None:
    """Write the sum of the weights of now into a shard that has none or another."""
    names = pyarrow.parquet.read_schema(path).names
    found = pyarrow.parquet.read_table(path, columns=[name for name in (*weights, WEIGHTED) if name in names])
    values = found.to_pydict()
    total = weighted(values, weights)
    if values.get(WEIGHTED) == total:
        return
    rows = datasets.Dataset(pyarrow.parquet.read_table(path))
    rows = rows.remove_columns([name for name in rows.column_names if name == WEIGHTED])
    write_parquet(path, rows.add_column(WEIGHTED, total, feature=datasets.Value("float64")))


def _columns_of(folder: Path, rewards: Sequence[str]) -> list[str]:
    known = read_rewards(folder)
    return [column for reward in rewards for column in known.get(reward, {}).get("columns", [])]


def _count_missing(paths: Sequence[Path], columns: Sequence[str], medium: str) -> dict[str, int]:
    missing, num_rows = dict.fromkeys(columns, 0), 0
    for path in paths:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
        num_rows += table.num_rows
        for column in columns:
            missing[column] += table[column].null_count
    report_missing(missing, num_rows, medium)
    return missing
