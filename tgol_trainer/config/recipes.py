"""Named settings of the method, for kinds of data."""

from __future__ import annotations

from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {},
    "anchored": {
        "loss_type": "tgol_anchored",
        "threshold_strategy": "group",
        "group_statistic": "mean",
        "score_normalization": "zscore",
        "value_baseline": True,
    },
}
"""Name to the fields of [`TGOLConfig`] that it sets. 'paper' is the defaults. docs/benchmarks.md compares both."""


def recipe_fields(name: str) -> dict[str, Any]:
    """
    Return the fields of a recipe, a fresh dictionary.

    Args:
        name (`str`): A key of `RECIPES`.

    Raises:
        ValueError: for any other name.
    """
    if name not in RECIPES:
        raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}, got {name!r}.")
    return dict(RECIPES[name])
