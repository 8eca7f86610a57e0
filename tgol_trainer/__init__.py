"""Align visual generative models from unpaired scores: threshold-guided optimization on `transformers.Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._quiet import silence

if TYPE_CHECKING:
    from .config import TGOLConfig
    from .trainer import TGOLTrainer

__version__ = "0.1.0"
__all__ = ["TGOLConfig", "TGOLTrainer", "__version__"]

silence()

# Resolved on first use: importing the package must not import torch or transformers.
_LOCATIONS = {"TGOLConfig": "config", "TGOLTrainer": "trainer"}


def __getattr__(name: str) -> Any:
    if name not in _LOCATIONS:
        raise AttributeError(f"module 'tgol_trainer' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_LOCATIONS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
