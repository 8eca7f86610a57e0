"""The only place that knows model names: a pipeline's class name decides its backbone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .base import Backbone, BackboneSettings, ModelOrigin
from .stable_diffusion import StableDiffusionBackbone

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

BACKBONES: dict[str, type[Backbone]] = {
    "StableDiffusionPipeline": StableDiffusionBackbone,
}
"""Pipeline class name to backbone. A new family is one file and one entry here."""

__all__ = [
    "BACKBONES",
    "Backbone",
    "BackboneSettings",
    "ModelOrigin",
    "StableDiffusionBackbone",
    "load_backbone",
    "wrap_pipeline",
]


def wrap_pipeline(
    pipeline: DiffusionPipeline, origin: ModelOrigin | None = None, settings: BackboneSettings | None = None
) -> Backbone:
    """
    Choose the backbone of a loaded pipeline.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            Any pipeline; used as it is, not copied.
        origin ([`ModelOrigin`], *optional*):
            Where it came from; by default what its own config says.
        settings ([`BackboneSettings`], *optional*):
            Choices of the run.

    Returns:
        [`Backbone`]

    Raises:
        ValueError: for a pipeline class without a backbone.
    """
    name = type(pipeline).__name__
    if name not in BACKBONES:
        raise ValueError(
            f"{name} is not supported yet. Supported pipelines: {', '.join(sorted(BACKBONES))}. Supporting another "
            "takes a backbone: how it encodes prompts and images, what its denoiser is called with, and its "
            "likelihood family (CONTRIBUTING.md, 'A new model family')."
        )
    return BACKBONES[name](pipeline, origin or ModelOrigin.of_pipeline(pipeline), settings)


def load_backbone(
    model: str | Path | DiffusionPipeline,
    model_init_kwargs: dict[str, Any] | None = None,
    settings: BackboneSettings | None = None,
) -> Backbone:
    """
    Load a pipeline and wrap it.

    Args:
        model (`str`, `Path` or `diffusers.DiffusionPipeline`):
            Hub id, local folder, or a loaded pipeline.
        model_init_kwargs (`dict`, *optional*):
            Passed to `DiffusionPipeline.from_pretrained`: `dtype` (also as a string, `"bfloat16"`), `revision`,
            `variant`, ...
        settings ([`BackboneSettings`], *optional*):
            Choices of the run.

    Returns:
        [`Backbone`]

    Raises:
        ValueError: for an unsupported pipeline, or `model_init_kwargs` beside a pipeline that is already loaded.
    """
    import torch
    from diffusers import DiffusionPipeline

    options = dict(model_init_kwargs or {})
    if isinstance(model, DiffusionPipeline):
        if options:
            raise ValueError(
                f"`model_init_kwargs` ({', '.join(options)}) has no effect on a pipeline that is already loaded: "
                "pass a Hub id or folder, or load the pipeline with these arguments yourself."
            )
        return wrap_pipeline(model, settings=settings)
    if isinstance(options.get("dtype"), str) and options["dtype"] != "auto":
        dtype = getattr(torch, options["dtype"], None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"`model_init_kwargs['dtype']` is {options['dtype']!r}, which is no torch dtype.")
        options["dtype"] = dtype
    pipeline = DiffusionPipeline.from_pretrained(str(model), **options)
    return wrap_pipeline(pipeline, ModelOrigin.of_source(str(model), options.get("revision")), settings)
