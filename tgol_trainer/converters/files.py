"""Find the folder that paths in a table start from, and write a converted dataset as Parquet files."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
from datasets.table import embed_table_storage
from tqdm.auto import tqdm

from tgol_trainer._files import replacing

_SHARD_BYTES = 500_000_000
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def image_root(source: str, split: str) -> Path | None:
    """
    Return the folder that the paths in a table are relative to: the folder of the table.

    Args:
        source (`str`): The table, the folder that holds it, or a Hub id.
        split (`str`): Name of the split, which may have a folder of its own.

    Returns:
        `Path`; `None` for a Hub id.
    """
    path = Path(source).expanduser()
    if path.is_file():
        return path.parent
    if not path.is_dir():
        return None
    folders = (path / split, path)
    return next((folder for folder in folders if any((folder / name).is_file() for name in _METADATA)), path)


def write_shards(dataset: datasets.Dataset, folder: Path, rows_per_shard: int | None = None) -> int:
    """
    Write `train-*.parquet` with the images in them.

    Args:
        dataset ([`datasets.Dataset`]): With a column `image` of images.
        folder (`Path`): Where the files go.
        rows_per_shard (`int`, *optional*): Rows per file; by default about 500 MB per file.

    Returns:
        `int`: number of files.
    """
    rows = rows_per_shard or _rows_per_shard(dataset)
    num_shards = -(-len(dataset) // rows)
    with tqdm(total=len(dataset), desc="Writing", unit="image") as bar:
        for shard in range(num_shards):
            part = dataset.select(range(shard * rows, min((shard + 1) * rows, len(dataset))))
            embedded = []
            for table in part.with_format("arrow").iter(16):
                embedded.append(embed_table_storage(table.cast(part.features.arrow_schema)))
                bar.update(table.num_rows)
            with replacing(folder / f"train-{shard:05d}-of-{num_shards:05d}.parquet") as draft:
                datasets.Dataset(pa.concat_tables(embedded)).to_parquet(draft)
    return num_shards


def _rows_per_shard(dataset: datasets.Dataset) -> int:
    """Estimate how many rows fill a file from the sizes of at most 64 images."""
    sample = np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))
    sizes = []
    for image in dataset.select(sample).cast_column("image", datasets.Image(decode=False))["image"]:
        path = image["path"] or ""
        sizes.append(len(image["bytes"]) if image["bytes"] else os.path.getsize(path) if os.path.isfile(path) else 0)
    return max(1, int(_SHARD_BYTES / max(1.0, float(np.mean(sizes)))))
