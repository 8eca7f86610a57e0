"""Find out which scores an adapter was trained on, from the JSON files beside its weights."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ARGUMENTS, _FACTS = "training_args.json", "card_facts.json"


def trained_scores(source: str, scores: Sequence[str]) -> frozenset[str] | None:
    """
    Return which of some scores an adapter was trained on.

    Args:
        source (`str`): Folder or Hub id of the adapter.
        scores (`Sequence[str]`): Names of the scores.

    Returns:
        `frozenset[str]`, *optional*: the scores that were its score columns, by `training_args.json` or
            `card_facts.json`, or that `card_facts.json` marks as trained on. `None` if those files name none of the
            scores, since a column `score` may hold anything.
    """
    facts = _read(source, _FACTS)
    listed = {item.get("name"): item.get("value") for item in _dictionaries(facts, "hyperparameters")}
    settings = listed | _read(source, _ARGUMENTS)
    marked = [row.get("name") for row in _dictionaries(facts, "evaluations") if row.get("trained") is True]
    for names in (settings.get("score_columns"), [settings.get("score_column")], marked):
        found = frozenset(scores).intersection(names if isinstance(names, list) else [])
        if found:
            return found
    return None


def _dictionaries(facts: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [item for item in facts.get(name, []) if isinstance(item, dict)]


def _read(source: str, name: str) -> dict[str, Any]:
    """Return a JSON object of an adapter's folder; an empty one if there is none, or something else."""
    folder = Path(source).expanduser()
    path = folder / name if folder.exists() else _download(source, name)
    try:
        read = json.loads(path.read_text(encoding="utf-8", errors="replace")) if path and path.is_file() else {}
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


@functools.cache
def _download(source: str, name: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(hf_hub_download(source, name))
    except (OSError, HfHubHTTPError, HFValidationError):  # no such file or no network; loading the weights says which
        return None
