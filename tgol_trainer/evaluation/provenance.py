"""Which score an adapter was trained on, as the files beside its weights tell."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_ARGUMENTS, _CARD = "training_args.json", "README.md"
# A row of the card's table of hyperparameters, and one of its table of scores.
_COLUMN_ROW = re.compile(r"(?m)^\| `score_column` \| ([^|\n]+) \|$")
_TRAINED_ROW = re.compile(r"(?m)^\| ([^|\n]+) \| \*\*yes\*\* \|")


def score_column(source: str) -> str | None:
    """
    Return the column of scores that an adapter was trained on.

    Args:
        source (`str`):
            Folder or Hub id of the adapter.

    Returns:
        `str`, *optional*: `score_column` in `training_args.json`, or that in the table of hyperparameters of a card
            that this library wrote; `None` where neither is there.
    """
    column = _argument(source, "score_column")
    if isinstance(column, str):
        return column
    row = _COLUMN_ROW.search(_text(source, _CARD) or "")
    return row[1].strip() if row else None


def trained_scores(source: str, scores: Sequence[str]) -> frozenset[str] | None:
    """
    Return which of some scores an adapter was trained on.

    Args:
        source (`str`):
            Folder or Hub id of the adapter.
        scores (`Sequence[str]`):
            Names of the scores.

    Returns:
        `frozenset[str]`, *optional*: those that were its columns, or that its card marks as trained on; `None`
            where none of the scores is named there, since a column `score` may hold anything.
    """
    several = _argument(source, "score_columns")
    if isinstance(several, list) and set(several) & set(scores):
        return frozenset(several) & frozenset(scores)
    column = score_column(source)
    if column is not None and column in scores:
        return frozenset({column})
    marked = {match.strip() for match in _TRAINED_ROW.findall(_text(source, _CARD) or "")} & set(scores)
    return frozenset(marked) if marked else None


def _argument(source: str, name: str) -> Any:
    try:
        return json.loads(_text(source, _ARGUMENTS) or "{}").get(name)
    except (ValueError, AttributeError):
        return None


def _text(source: str, name: str) -> str | None:
    folder = Path(source).expanduser()
    if folder.exists():
        path = folder / name
        return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    return _hub_text(source, name)


@functools.cache
def _hub_text(source: str, name: str) -> str | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, name)).read_text(encoding="utf-8", errors="replace")
    except (OSError, HfHubHTTPError, HFValidationError):  # no such file there, or no network; the weights say which
        return None
