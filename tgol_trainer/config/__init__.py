"""`TGOLConfig`: one dataclass on `transformers.TrainingArguments`; the method's fields have a file of their own."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .method import CONFIDENT_LOSSES, MethodArguments, default_of
from .recipes import RECIPES, recipe_fields
from .resolution import check_sides, read_resolution, size_of

if TYPE_CHECKING:
    from .arguments import CHANGED_DEFAULTS, FULL_LEARNING_RATE, LORA_LEARNING_RATE, TGOLConfig

__all__ = [
    "CHANGED_DEFAULTS",
    "CONFIDENT_LOSSES",
    "FULL_LEARNING_RATE",
    "LORA_LEARNING_RATE",
    "RECIPES",
    "MethodArguments",
    "TGOLConfig",
    "check_sides",
    "default_of",
    "read_resolution",
    "recipe_fields",
    "size_of",
]


def __getattr__(name: str) -> Any:
    # transformers takes seconds to import; `tgol label` needs the method's fields alone.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.arguments"), name)
