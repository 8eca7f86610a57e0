"""Columns of a WebDataset: one for each field of its JSON files, and those that are plainly meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets

from tgol_trainer.data.rows import Columns

_MEANT = {
    "prompt": ("json.prompt", "json.caption", "json.text", "txt"),
    "image": ("png", "jpg", "jpeg", "webp"),
    "score": ("json.score", "json.rating", "json.stars"),
}
"""Columns of a WebDataset that are read as prompt, image and score where there is one of them alone."""


def flattened(dataset: Any, columns: Columns, only: Sequence[str] | None) -> Any:
    """
    Return a WebDataset with a column for each field of its JSON files, such as `json.prompt`. Those that are plainly
    meant by a column that is wanted and not there get its name.
    """
    features = getattr(dataset, "features", None) or {}
    if "__key__" not in features:
        return dataset
    if isinstance(features.get("json"), dict):
        dataset = _fields(dataset)
    for role in ("prompt", "image", "score"):
        name = getattr(columns, role)
        found = [each for each in _MEANT[role] if each in dataset.column_names]
        if name not in dataset.column_names and len(found) == 1 and (only is None or name in only):
            dataset = dataset.rename_column(found[0], name)
    return dataset


def _fields(dataset: Any) -> Any:
    if isinstance(dataset, datasets.Dataset):
        return dataset.flatten()
    dataset = dataset.decode(False)
    fields = {f"json.{name}": feature for name, feature in dataset.features["json"].items()}
    kept = {name: feature for name, feature in dataset.features.items() if name != "json"}
    return dataset.map(_json_fields, remove_columns="json", features=datasets.Features({**kept, **fields}))


def _json_fields(row: dict[str, Any]) -> dict[str, Any]:
    return {f"json.{name}": value for name, value in (row["json"] or {}).items()}
