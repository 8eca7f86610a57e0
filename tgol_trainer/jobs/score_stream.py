"""Score a stream of images or videos: add one column per reward, one source file after another."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from tqdm.auto import tqdm

from tgol_trainer._files import write_json
from tgol_trainer.data import DataError
from tgol_trainer.sources.shards import READ, SCORED, is_whole, read_rewards

from .score import (
    WEIGHTED,
    Loaders,
    ScoringSettings,
    check_made_of,
    check_rewards,
    no_scores,
    note_rewards,
    report_missing,
    rewards_in_turn,
    score_one_shard,
    source_of,
    weighted,
    weighted_facts,
)
from .shards import claim_folder, process_share, write_parquet

logger = logging.getLogger(__name__)


def score_stream(
    dataset: datasets.IterableDataset,
    rewards: Loaders,
    output_dir: str | Path,
    settings: ScoringSettings | None = None,
    *,
    name: str = "",
    share: tuple[int, int] | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """
    Score a stream as [`score_dataset`] scores a dataset, without counting or downloading its rows first.

    A process takes every `world_size`-th file of the source and writes a shard for each `shard_size` rows of it, so
    memory, and the disk beside the output, hold one shard. A source file that was read to its end is not opened
    again; in one that was begun, the rows of finished shards are skipped undecoded. A reward that is added later is
    scored on the shards that were written.

    Args:
        dataset (`datasets.IterableDataset`): With known features, as Parquet files have them.
        rewards (`Mapping[str, Callable]`): As in [`score_dataset`].
        output_dir (`str` or `Path`):
            Holds `data/train-FILE-of-FILES-PART.parquet`, `tgol_score.json` and `rewards.json`.
        settings ([`ScoringSettings`], *optional*): Columns, weights, sizes of shards and batches.
        name (`str`, *optional*, defaults to `""`):
            Name of the dataset; a dataset of another name is refused in the same folder. The content is not compared.
        share, progress: As in [`score_dataset`].

    Returns:
        `dict[str, int]`: column name to the number of this process's rows without a score.

    Raises:
        DataError: as [`score_dataset`], and for a stream whose columns are not known.
    """
    _check_stream(dataset)
    settings = settings or ScoringSettings()
    settings.check()
    source, weights = source_of(dataset.column_names, settings), settings.weights
    check_rewards(dataset, list(rewards), source, weights)
    folder, num_files = Path(output_dir), dataset.num_shards
    record = {"streaming": True, "source": name, "num_files": num_files, "shard_size": settings.shard_size}
    record |= {"columns": [source.prompt, source.visual], "mean_over_frames": settings.mean_over_frames}
    claim_folder(folder, SCORED, record)
    check_made_of(folder, settings.made_of)
    rank, world_size = share or process_share()
    if num_files < world_size and rank == 0:
        logger.warning(
            "Processes without work: %d of %d. The files of a stream are shared among the processes, and this one has "
            "%d: start as many processes.",
            *(world_size - num_files, world_size, num_files),
        )
    files = [_File(dataset, folder, index, settings.shard_size) for index in range(rank, num_files, world_size)]
    with tqdm(desc="Scoring", unit=source.medium, disable=not progress) as bar:
        for loaders in rewards_in_turn(rewards, settings.one_at_a_time):
            for number, file in enumerate(files, 1):
                bar.set_postfix_str(f"file {number} of {len(files)}")
                for path, rows in file.parts():
                    bar.update(_score_part(path, rows, loaders, settings))
    paths = [path for file in files for path in file.done()]
    if weights:
        note_rewards(folder, weighted_facts(weights))
        for path in paths:
            _add_weighted_sum(path, weights)
    known, scored = read_rewards(folder), [*rewards, WEIGHTED] if weights else list(rewards)
    columns = [column for reward in scored for column in known.get(reward, {}).get("columns", [])]
    return _count_missing(paths, columns, source.medium)


def _check_stream(dataset: Any) -> None:
    if not isinstance(dataset, datasets.IterableDataset):
        raise DataError("dataset: it is not a stream; give it to score_dataset.")
    if dataset.features is None:
        raise DataError(
            "dataset: the types of the columns of this stream are not known. This is so for a table of paths (CSV, "
            "JSON Lines, metadata.jsonl). Such a table is small: leave out `--streaming`. Images in Parquet files "
            "stream."
        )


class _File:
    """One file of the source, and the shards made from it."""

    def __init__(self, dataset: datasets.IterableDataset, folder: Path, index: int, shard_size: int) -> None:
        self.dataset, self.folder, self.index, self.shard_size = dataset, folder, index, shard_size

    def path(self, part: int) -> Path:
        return self.folder / "data" / f"train-{self.index:05d}-of-{self.dataset.num_shards:05d}-{part:05d}.parquet"

    def done(self) -> list[Path]:
        """Return the existing shards, up to the first that is missing."""
        paths: list[Path] = []
        while self.path(len(paths)).exists():
            paths.append(self.path(len(paths)))
        return paths

    def parts(self) -> Iterator[tuple[Path, datasets.Dataset | None]]:
        """Yield each shard with its rows, or with None if it exists; at the end, record the number of shards."""
        done, end = self.done(), self.folder / READ / f"{self.index:05d}.json"
        yield from ((path, None) for path in done)
        if is_whole(end, len(done)):
            return
        part, features = len(done), self.dataset.features
        rows = self.dataset.decode(False).shard(num_shards=self.dataset.num_shards, index=self.index)
        for table in rows.skip(part * self.shard_size).with_format("arrow").iter(self.shard_size):
            yield (
                self.path(part),
                datasets.Dataset(table.cast(features.arrow_schema), datasets.DatasetInfo(features=features)),
            )
            part += 1
        write_json(end, {"parts": part})


def _score_part(path: Path, rows: datasets.Dataset | None, loaders: Loaders, settings: ScoringSettings) -> int:
    """Score one shard; return its number of rows."""
    folder = path.parent.parent
    if rows is None:
        known = pyarrow.parquet.read_schema(path).names
        loaders = {reward: load for reward, load in loaders.items() if reward not in known}
        if not loaders:
            return int(pyarrow.parquet.read_metadata(path).num_rows)
        rows = datasets.Dataset(pyarrow.parquet.read_table(path))
    work = folder / ".work" / path.stem
    scored = score_one_shard(rows, loaders, work, settings, report=False)
    note_rewards(folder, read_rewards(work))
    os.replace(scored, path)
    shutil.rmtree(work)
    return len(rows)


def _add_weighted_sum(path: Path, weights: Mapping[str, float]) -> None:
    """Write the weighted sum into a shard that has none, or the sum of other weights."""
    names = pyarrow.parquet.read_schema(path).names
    found = pyarrow.parquet.read_table(path, columns=[name for name in (*weights, WEIGHTED) if name in names])
    values = found.to_pydict()
    total = weighted(values, weights)
    if values.get(WEIGHTED) == total:
        return
    rows = datasets.Dataset(pyarrow.parquet.read_table(path))
    rows = rows.remove_columns([name for name in rows.column_names if name == WEIGHTED])
    write_parquet(path, rows.add_column(WEIGHTED, total, feature=datasets.Value("float64")))


def _count_missing(paths: Sequence[Path], columns: Sequence[str], medium: str) -> dict[str, int]:
    missing, num_rows = dict.fromkeys(columns, 0), 0
    for path in paths:
        table = pyarrow.parquet.read_table(path, columns=list(columns))
        num_rows += table.num_rows
        for column in columns:
            missing[column] += table[column].null_count
    report_missing(missing, num_rows, medium)
    silent = [column for column in columns if num_rows and missing[column] == num_rows]
    if silent:
        raise DataError(no_scores(silent[0], num_rows))
    return missing
