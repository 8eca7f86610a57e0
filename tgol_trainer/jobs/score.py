"""A dataset of pictures to the same dataset with a column a reward, in shards that survive a kill."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from tqdm.auto import tqdm

from tgol_trainer.data import Columns, DataError, ImageError, open_image
from tgol_trainer.rewards import RewardFunction, reward_facts, score_images

from .shards import Shards, process_share, write_atomically, write_parquet

logger = logging.getLogger(__name__)

RECORD = "tgol_score.json"


def score_dataset(
    dataset: datasets.Dataset,
    rewards: Mapping[str, Callable[[], RewardFunction]],
    output_dir: str | Path,
    *,
    columns: Columns | None = None,
    one_at_a_time: bool = False,
    shard_size: int = 1024,
    batch_size: int = 32,
    num_workers: int = 2,
    share: tuple[int, int] | None = None,
    progress: bool = True,
) -> dict[str, int]:
    """
    Add one float64 column a reward and write the dataset as Parquet shards.

    The scores of a shard are kept as soon as they are made (`.scores/<reward>/`), so a kill loses at most one shard of
    one reward, and a reward that is asked for later is scored alone. Rows whose image cannot be decoded get `None`
    everywhere and are counted. Memory holds one shard of encoded images and one batch of decoded ones.

    Args:
        dataset (`datasets.Dataset`):
            With columns of prompts and images; other columns are kept.
        rewards (`Mapping[str, Callable]`):
            Column name to a function without arguments that loads the reward; it is called when scores are missing.
        output_dir (`str` or `Path`):
            Holds `data/train-*.parquet` and `tgol_score.json`; `datasets.load_dataset(output_dir)` reads it.
        columns ([`Columns`], *optional*):
            Names of the prompt and image columns.
        one_at_a_time (`bool`, *optional*, defaults to `False`):
            Keep one reward in memory at a time and decode the images once for each.
        shard_size (`int`, *optional*, defaults to 1024):
            Rows a shard.
        batch_size (`int`, *optional*, defaults to 32):
            Images a call of a reward.
        num_workers (`int`, *optional*, defaults to 2):
            Threads that decode images.
        share (`tuple[int, int]`, *optional*):
            Number of this process and how many there are; by default those of the environment ([`process_share`]).
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar a group of rewards, over this process's rows.

    Returns:
        `dict[str, int]`: column name to the number of this process's rows without a score.

    Raises:
        DataError: if no reward is given, if a column is missing or the name of a reward is taken, or if `output_dir`
            was begun with another dataset or other shards.
    """
    columns = columns or Columns()
    _check(dataset, rewards, columns)
    dataset = dataset.cast_column(columns.image, datasets.Image(decode=False))
    shards = _shards(dataset, rewards, Path(output_dir), columns, shard_size)
    mine = list(shards.share(*(share or process_share())))
    groups = [[name] for name in rewards] if one_at_a_time else [list(rewards)]
    for group in groups:
        wanted = [shard for shard in mine if any(not _part(shards, name, shard).exists() for name in group)]
        if not wanted:
            continue
        group = [name for name in group if any(not _part(shards, name, shard).exists() for shard in wanted)]
        loaded = {name: rewards[name]() for name in group}
        total = sum(len(shards.rows(shard)) for shard in wanted)
        with tqdm(total=total, desc=f"Scoring ({', '.join(group)})", unit="image", disable=not progress) as bar:
            for shard in wanted:
                rows = dataset.select(shards.rows(shard))
                _score_shard(rows, loaded, shards, shard, columns, batch_size, num_workers, bar)
        del loaded
        gc.collect()  # the next group's models need the room
    missing = dict.fromkeys(rewards, 0)
    for shard in mine:
        found = {name: _read_column(_part(shards, name, shard), name) for name in rewards}
        for name, values in found.items():
            missing[name] += sum(value is None for value in values)
        if not _has_columns(shards.path(shard), list(rewards)):
            shards.write(shard, _assembled(dataset.select(shards.rows(shard)), found, columns))
    _report_missing(missing, sum(len(shards.rows(shard)) for shard in mine))
    return missing


def _check(dataset: datasets.Dataset, rewards: Mapping[str, Any], columns: Columns) -> None:
    if not rewards:
        raise DataError("`rewards`: none is given. Name at least one, such as `jpeg_compressibility`.")
    absent = [name for name in (columns.prompt, columns.image) if name not in dataset.column_names]
    if absent:
        raise DataError(
            f"dataset: no column {' and '.join(map(repr, absent))}; the columns are {dataset.column_names}. Name "
            "yours: Columns(prompt=..., image=...)."
        )
    taken = [name for name in rewards if name in dataset.column_names]
    if taken:
        raise DataError(f"`rewards`: the dataset already has a column {taken[0]!r}. Rename or remove it first.")
    wrong = [name for name in rewards if Path(name).name != name or name.startswith(".")]
    if wrong:
        raise DataError(f"`rewards`: {wrong[0]!r} cannot be a column and folder name. Leave out slashes.")


def _shards(
    dataset: datasets.Dataset, rewards: Mapping[str, Any], folder: Path, columns: Columns, shard_size: int
) -> Shards:
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.select_columns([columns.prompt]).with_format("arrow").iter(10_000):
        digest.update("\0".join(str(prompt) for prompt in batch[columns.prompt].to_pylist()).encode())
    settings = {"columns": [columns.prompt, columns.image], "prompts_blake2b": digest.hexdigest()}
    return Shards(folder, len(dataset), shard_size, RECORD, settings)


def _part(shards: Shards, name: str, shard: int) -> Path:
    return shards.folder / ".scores" / name / f"{shard:05d}.parquet"


def _score_shard(
    rows: datasets.Dataset,
    rewards: dict[str, RewardFunction],
    shards: Shards,
    shard: int,
    columns: Columns,
    batch_size: int,
    num_workers: int,
    bar: tqdm,
) -> None:
    wanted = [name for name in rewards if not _part(shards, name, shard).exists()]
    scores: dict[str, list[float | None]] = {name: [] for name in wanted}
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for batch in rows.iter(batch_size):
            prompts = [prompt or "" for prompt in batch[columns.prompt]]
            images = list(pool.map(_opened, batch[columns.image]))
            good = [index for index, image in enumerate(images) if image is not None]
            for name in wanted:
                values: list[float | None] = [None] * len(images)
                returned = score_images(
                    rewards[name],
                    [images[index] for index in good],
                    [prompts[index] for index in good],
                    batch_size=batch_size,
                )
                for index, value in zip(good, returned, strict=True):
                    values[index] = value
                scores[name] += values
            bar.update(len(images))
    for name, column in scores.items():
        features = datasets.Features({name: datasets.Value("float64")})
        write_parquet(_part(shards, name, shard), datasets.Dataset.from_dict({name: column}, features=features))
        facts = json.dumps(dataclasses.asdict(reward_facts(rewards[name])), indent=2, ensure_ascii=False)
        write_atomically(_part(shards, name, shard).with_name("facts.json"), facts + "\n")


def _opened(value: Any) -> Any:
    try:
        return open_image(value)
    except ImageError:
        return None


def _read_column(path: Path, name: str) -> list[float | None]:
    return pyarrow.parquet.read_table(path)[name].to_pylist()  # `datasets` would keep a copy in its cache


def _has_columns(path: Path, names: list[str]) -> bool:
    if not path.exists():
        return False
    return set(names) <= set(pyarrow.parquet.read_schema(path).names)


def _assembled(rows: datasets.Dataset, scores: dict[str, list[float | None]], columns: Columns) -> datasets.Dataset:
    """Return the rows with their images as bytes and the score columns behind."""
    features = datasets.Features({**rows.features, **{name: datasets.Value("float64") for name in scores}})
    features[columns.image] = datasets.Image()
    content: dict[str, Any] = {name: list(rows[name]) for name in rows.column_names}
    content[columns.image] = [_with_bytes(value) for value in content[columns.image]]
    return datasets.Dataset.from_dict({**content, **scores}, features=features)


def _with_bytes(value: dict[str, Any] | None) -> dict[str, Any] | None:
    if value is None or value.get("bytes") is not None:
        return value
    path = Path(value.get("path") or "")
    return {"bytes": path.read_bytes(), "path": path.name} if path.is_file() else None


def _report_missing(missing: Mapping[str, int], num_rows: int) -> None:
    for name, count in missing.items():
        if count:
            logger.warning(
                "%s: %d of %d rows have no score (an image that cannot be decoded, or a reward that gave none). "
                "Training leaves them out with `on_bad_sample='skip'`.",
                *(name, count, num_rows),
            )
