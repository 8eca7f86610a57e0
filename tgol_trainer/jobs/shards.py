"""Fill a folder of Parquet shards in any order, by any number of processes, over any number of starts."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from tgol_trainer._files import replacing, write_json
from tgol_trainer.data import DataError


def process_share() -> tuple[int, int]:
    """Return this process's number and the number of processes (`RANK`, `WORLD_SIZE`); 0 and 1 if they are not set."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def claim_folder(folder: Path, record: str, settings: dict[str, Any]) -> None:
    """
    Write the settings that decide the content of a folder of shards to its JSON file `record`; the shards go to
    `data`.

    Raises:
        DataError: if `folder` holds shards made with other settings, or other files in the place of the shards.
    """
    path, data = folder / record, folder / "data"
    settings = json.loads(json.dumps(settings))  # as it will be read back
    if path.exists() and any(folder.rglob("*.parquet")):  # without a shard, other settings may take the folder over
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = sorted(name for name in before.keys() | settings if before.get(name) != settings.get(name))
        if changed:
            lines = "\n".join(
                f"  {name}: {str(before.get(name))[:80]} there, {str(settings.get(name))[:80]} now" for name in changed
            )
            raise DataError(
                f"`output_dir`: {folder} was begun with other settings:\n{lines}\n"
                "Give these again to continue it, or another `output_dir`."
            )
    elif not path.exists() and data.is_dir() and any(data.iterdir()):
        raise DataError(f"`output_dir`: {data} holds files of something else. Give another `output_dir`.")
    data.mkdir(parents=True, exist_ok=True)
    write_json(path, settings)


def prompts_digest(prompts: Sequence[str]) -> str:
    """Return a hash of prompts and their order."""
    return hashlib.blake2b("\0".join(prompts).encode(), digest_size=16).hexdigest()


def weights_digest(adapter: str | None) -> str | None:
    """Return a hash of the weights in a local folder or file, or `None` for a Hub id: it tells retrained weights."""
    folder = Path(adapter).expanduser() if adapter is not None else None
    if folder is None or not folder.exists():
        return None
    digest = hashlib.blake2b(digest_size=16)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*/*.safetensors"))
    for file in [folder] if folder.is_file() else files:
        if not file.parent.name.startswith("checkpoint-") or file.parent == folder:
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


class Shards:
    """
    Fixed ranges of rows, each in a file that is either complete or absent.

    A shard is written under another name and then renamed, so a kill loses at most the shard in work. Which rows a
    shard holds depends on `num_rows` and `shard_size` alone, never on the number of processes.

    Args:
        folder (`Path`):
            Made if missing; the shards go to `folder/data`, where `datasets.load_dataset(folder)` finds them.
        num_rows (`int`): Rows in all, at least 1.
        shard_size (`int`): Rows per shard, at least 1; the last may be smaller.
        record (`str`): Name of the JSON file in `folder` that keeps the settings.
        settings (`Mapping[str, Any]`): What decides the content. A second start with other settings is refused.

    Raises:
        DataError: if `folder` holds shards made with other settings, or other files in the place of the shards.
    """

    def __init__(self, folder: Path, num_rows: int, shard_size: int, record: str, settings: Mapping[str, Any]) -> None:
        if num_rows < 1:
            raise DataError("There are no rows to work on.")
        if shard_size < 1:
            raise DataError(f"`shard_size` is {shard_size}; it must be at least 1.")
        self.folder, self.num_rows, self.shard_size = folder, num_rows, shard_size
        self.num_shards = -(-num_rows // shard_size)
        claim_folder(folder, record, {**settings, "num_rows": num_rows, "shard_size": shard_size})

    def rows(self, shard: int) -> range:
        """Return the rows of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.num_rows))

    def count(self, shards: Iterable[int]) -> int:
        """Return the number of rows of some shards."""
        return sum(len(self.rows(shard)) for shard in shards)

    def path(self, shard: int) -> Path:
        """Return the file of a shard."""
        return self.folder / "data" / f"train-{shard:05d}-of-{self.num_shards:05d}.parquet"

    def share(self, rank: int, world_size: int) -> range:
        """Return the shards of one process, made or not: every `world_size`-th, from `rank` on."""
        return range(rank, self.num_shards, world_size)

    def write(self, shard: int, rows: datasets.Dataset) -> None:
        """Write a shard; it appears whole or not at all."""
        write_parquet(self.path(shard), rows)


def write_parquet(path: Path, rows: datasets.Dataset) -> None:
    """Write a dataset, whose images hold their bytes, as one Parquet file that appears whole or not at all."""
    with replacing(path) as draft:
        rows.to_parquet(draft)
