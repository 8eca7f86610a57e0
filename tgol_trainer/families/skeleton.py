"""A pipeline without its weights: enough to know limits and sizes, for the price of a few JSON files."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path
from typing import Any

import torch

from .base import FamilySettings, ModelFamily

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")


def load_skeleton(
    model: str | Path, *, revision: str | None = None, settings: FamilySettings | None = None
) -> ModelFamily:
    """
    Load tokenizers, schedulers and configs of a pipeline; its networks stand on torch's meta device, without weights.

    `native_size`, `resolution_multiple`, `num_frames` and `count_long_prompts` of the result are those of the model;
    it can neither encode nor predict.

    Args:
        model (`str` or `Path`):
            Hub id or folder of a diffusers pipeline.
        revision (`str`, *optional*):
            Revision on the Hub.
        settings ([`FamilySettings`], *optional*):
            Choices of the run.

    Returns:
        [`ModelFamily`]

    Raises:
        FileNotFoundError: for a folder that holds no pipeline, and for what is neither a folder nor a Hub id.
        ValueError: for an unsupported pipeline, Meissonic among them, whose classes are not in diffusers, and for
            tokenizers without files.
    """
    import diffusers

    from . import checked_index, wrap_pipeline

    options = {"revision": revision} if revision is not None else {}
    index = checked_index(str(model), options)
    kind = getattr(diffusers, index["_class_name"], None)
    if kind is None:
        raise ValueError(f"{str(model)!r} is of the class {index['_class_name']}, which diffusers does not have.")
    known = inspect.signature(kind.__init__).parameters
    arguments: dict[str, Any] = {}
    for name, value in index.items():
        if name not in known:
            continue
        if not isinstance(value, (list, tuple)):
            arguments[name] = value
        elif name in _LEFT_OUT or value[1] is None:
            arguments[name] = None
        else:
            arguments[name] = _component(str(model), name, value[0], value[1], options)
    if "requires_safety_checker" in known:
        arguments["requires_safety_checker"] = False
    return wrap_pipeline(kind(**arguments), settings=settings)


def _component(model: str, name: str, library: str, class_name: str, options: dict[str, Any]) -> Any:
    kind = getattr(importlib.import_module(library), class_name)
    place = {"subfolder": name, **options}
    if hasattr(kind, "load_config"):  # diffusers: networks and schedulers
        config = kind.load_config(model, **place)
        if not issubclass(kind, torch.nn.Module):
            return kind.from_config(config)
        with torch.device("meta"):
            return kind.from_config(config)
    if not issubclass(kind, torch.nn.Module):
        return kind.from_pretrained(model, **place)
    config = kind.config_class.from_pretrained(model, **place)
    with torch.device("meta"):
        return kind(config)
