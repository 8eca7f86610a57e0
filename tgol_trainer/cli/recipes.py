"""Read `--recipe` before other flags, whose defaults it sets."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgol_trainer.config import RECIPES, recipe_fields

from .console import check_kinds, read_settings

if TYPE_CHECKING:
    from trl import TrlParser

RECIPE_HELP = (
    f"Named settings of the method: {', '.join(RECIPES)} (docs/benchmarks.md). Other flags override single ones."
)


def recipe_defaults(arguments: Sequence[str], settings: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return the defaults that a recipe sets.

    Args:
        arguments (`Sequence[str]`): Flags of a command; `--recipe` is looked for.
        settings (`Mapping[str, Any]`): Those of a settings file, where a flag does not name the recipe.

    Returns:
        `dict[str, Any]`: Fields of [`TGOLConfig`].
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe", default=settings.get("recipe") or "paper")
    try:
        return recipe_fields(parser.parse_known_args(list(arguments))[0].recipe)
    except ValueError as error:
        raise SystemExit(f"error: --recipe: {error}") from error


def parse_flags(parser: TrlParser, arguments: Sequence[str]) -> tuple[Any, ...]:
    """
    Parse the flags of `tgol train` and its kin: a recipe first, then a settings file, then the flags.

    Args:
        parser (`TrlParser`): Of the dataclasses to fill.
        arguments (`Sequence[str]`): Flags, `--config file.yaml` among them.

    Returns:
        `tuple`: one instance of each dataclass.
    """
    settings: dict[str, Any] = {}
    for place in (place for place, word in enumerate(arguments[:-1]) if word == "--config"):
        path = Path(arguments[place + 1])
        settings = read_settings(path)  # the parser's own errors are tracebacks
        check_kinds(settings, path, parser.dataclass_types)
    parser.set_defaults_with_config(**recipe_defaults(arguments, settings))
    try:
        return parser.parse_args_and_config(list(arguments))
    except (ValueError, FileNotFoundError) as error:  # a flag that nobody knows, or a value that TGOLConfig refuses
        raise SystemExit(f"error: {error}") from error
