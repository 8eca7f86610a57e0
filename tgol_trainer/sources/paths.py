"""Make the paths in a table absolute, and their columns of type image or video."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

import datasets

from tgol_trainer.data.files import absolute_path
from tgol_trainer.data.rows import Columns

from .folders import VIDEOS

AnyDataset: TypeAlias = datasets.Dataset | datasets.IterableDataset


def resolve_files(dataset: AnyDataset, folder: Path, columns: Columns) -> AnyDataset:
    """Make paths absolute and their columns of type image or video; the check of the columns refuses other types."""
    arguments = {"folder": str(folder.resolve()), "image": columns.image, "video": columns.video or "video"}
    if dataset.features is None:
        # The types of a streamed CSV or JSON file are known once rows are read.
        return dataset.map(_absolute_row, fn_kwargs=arguments)
    if "file_name" in dataset.features and not {arguments["image"], arguments["video"]} & set(dataset.features):
        first: dict[str, Any] = next(iter(dataset.select_columns(["file_name"])), {})
        medium = "video" if _is_video(first.get("file_name")) else "image"
        dataset = dataset.rename_column("file_name", arguments[medium])
    for medium in ("image", "video"):
        if arguments[medium] in dataset.features:
            dataset = _resolve_column(dataset, arguments["folder"], arguments[medium], medium)
    return dataset


def _resolve_column(dataset: AnyDataset, folder: str, column: str, medium: str) -> AnyDataset:
    feature = dataset.features[column]
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    texts = dtype in ("string", "large_string", "null")
    if texts:
        features = dataset.features.copy()
        features[column] = datasets.Value("string")
        dataset = dataset.map(
            _resolve_paths,
            batched=True,
            fn_kwargs={"folder": folder, "column": column},
            features=features,
            **({} if isinstance(dataset, datasets.IterableDataset) else {"desc": f"Resolving {medium} paths"}),
        )
    if texts or dtype in ("binary", "large_binary") or isinstance(feature, dict):
        # Videos stay encoded: `datasets` decodes them with another package than this library.
        kind = datasets.Image() if medium == "image" else datasets.Video(decode=False)
        dataset = dataset.cast_column(column, kind)
    return dataset


def _is_video(path: Any) -> bool:
    return isinstance(path, str) and path.lower().endswith(VIDEOS)


def _resolve_paths(batch: dict[str, list[Any]], folder: str, column: str) -> dict[str, list[Any]]:
    return {column: [absolute_path(path, folder) for path in batch[column]]}


def _absolute_row(row: dict[str, Any], folder: str, image: str, video: str) -> dict[str, Any]:
    found = {name: absolute_path(row[name], folder) for name in (image, video) if name in row}
    if found or "file_name" not in row:
        return found or {image: None}
    name = video if _is_video(row["file_name"]) else image
    return {name: absolute_path(row["file_name"], folder)}
