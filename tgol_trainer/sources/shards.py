"""Read what the folders of `tgol generate` and `tgol score` state: their rewards, and which shards are missing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from tgol_trainer.data.images import DataError

GENERATED = "tgol_generate.json"
SCORED = "tgol_score.json"
REWARDS = "rewards.json"
READ = ".read"
"""Folder of a scored stream with one file for each file of its source that was read to its end."""


def read_rewards(folder: str | Path) -> dict[str, dict[str, Any]]:
    """
    Return the facts about the rewards whose scores are in a folder.

    Args:
        folder (`str` or `Path`): Folder of `tgol score`.

    Returns:
        `dict[str, dict]`: the fields of [`RewardFacts`] and the `columns` written, by the name of each reward and of
        the weighted sum; empty where nothing was scored.
    """
    file = Path(folder) / REWARDS
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def missing_shards(folder: str | Path) -> tuple[int, int]:
    """
    Return the number of shards that are not written yet or lack a column of scores, and of all shards; raise a
    [`DataError`] for a folder that neither `tgol generate` nor `tgol score` made.
    """
    folder = Path(folder)
    record = next((folder / name for name in (GENERATED, SCORED) if (folder / name).is_file()), None)
    if record is None:
        raise DataError(
            f"{folder} is not a folder of `tgol generate` or `tgol score`: it holds no {GENERATED} or {SCORED}."
        )
    settings = json.loads(record.read_text(encoding="utf-8"))
    wanted = {name for facts in read_rewards(folder).values() for name in facts["columns"]}
    if "num_files" in settings:  # a stream, whose rows are not counted
        files = list((folder / "data").glob("train-*.parquet"))
        total = len(files) + len(unread_files(folder, settings["num_files"]))
    else:
        total = -(-settings["num_rows"] // settings["shard_size"])
        files = [folder / "data" / f"train-{shard:05d}-of-{total:05d}.parquet" for shard in range(total)]
    done = [file for file in files if file.is_file() and (not wanted or wanted <= set(pq.read_schema(file).names))]
    return total - len(done), total


def incomplete(folder: Path) -> str | None:
    """
    Say how many shards of a folder are missing, why, and what to do; `None` for a complete folder, and for one that
    neither `tgol generate` nor `tgol score` made.
    """
    if not any((folder / record).is_file() for record in (GENERATED, SCORED)):
        return None
    missing, total = missing_shards(folder)
    if not missing:
        return None
    return (
        f"{missing} of {total} shards of {folder} are not there, or lack a score: the command that makes them still "
        "runs, or was stopped. Wait for it, or start it again."
    )


def unread_files(folder: Path, num_files: int) -> list[int]:
    """Return the files of the source of `tgol score --streaming` that were not read to their end, or lack a shard."""
    counts = [len(list((folder / "data").glob(f"train-{index:05d}-of-*"))) for index in range(num_files)]
    return [index for index, count in enumerate(counts) if not is_whole(folder / READ / f"{index:05d}.json", count)]


def is_whole(end: Path, num_parts: int) -> bool:
    """Return whether the file `end` says that a source file was read to its end, and its shards are still there."""
    return end.exists() and json.loads(end.read_text(encoding="utf-8"))["parts"] <= num_parts
