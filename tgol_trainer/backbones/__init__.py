"""The only place that knows model names: a pipeline's class name decides its backbone."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .amused import AmusedBackbone
from .base import Backbone, BackboneSettings, ModelOrigin
from .flux import FluxBackbone
from .licenses import hub_license
from .meissonic import MeissonicBackbone, load_meissonic
from .quantization import denoiser_quantization
from .stable_diffusion import StableDiffusionBackbone
from .stable_diffusion_3 import StableDiffusion3Backbone
from .stable_diffusion_xl import StableDiffusionXLBackbone
from .wan import WanBackbone

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

BACKBONES: dict[str, type[Backbone]] = {
    "AmusedPipeline": AmusedBackbone,
    "StableDiffusionPipeline": StableDiffusionBackbone,
    "StableDiffusionXLPipeline": StableDiffusionXLBackbone,
    "StableDiffusion3Pipeline": StableDiffusion3Backbone,
    "FluxPipeline": FluxBackbone,
    "WanPipeline": WanBackbone,
    "Pipeline": MeissonicBackbone,
}
"""Pipeline class name to backbone. A new family is one file and one entry here."""

__all__ = [
    "BACKBONES",
    "AmusedBackbone",
    "Backbone",
    "BackboneSettings",
    "FluxBackbone",
    "MeissonicBackbone",
    "ModelOrigin",
    "StableDiffusion3Backbone",
    "StableDiffusionBackbone",
    "StableDiffusionXLBackbone",
    "WanBackbone",
    "hub_license",
    "load_backbone",
    "load_meissonic",
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
    backbone = BACKBONES[name](pipeline, origin or ModelOrigin.of_pipeline(pipeline), settings)
    if backbone.num_frames is None and backbone.settings.num_frames is not None:
        raise ValueError(f"`num_frames` means nothing to {name}, a model of images: leave it out.")
    return backbone


def _read_dtype(value: Any) -> Any:
    import torch

    if not isinstance(value, str) or value == "auto":
        return value
    dtype = getattr(torch, value, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`model_init_kwargs['dtype']` is {value!r}, which is no torch dtype.")
    return dtype


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
            Passed to `DiffusionPipeline.from_pretrained`: `dtype` (also as a string, `"bfloat16"`, and by
            component, `{"default": "bfloat16", "vae": "float32"}`; float32 by default), `revision`, `variant`,
            `quantization_config` (of the denoiser). With `meissonic_repository`, a clone of Meissonic's repository,
            and `trust_remote_code=True`, passed to [`load_meissonic`] instead.
        settings ([`BackboneSettings`], *optional*):
            Choices of the run.

    Returns:
        [`Backbone`]

    Raises:
        ValueError: for an unsupported pipeline, or `model_init_kwargs` beside a pipeline that is already loaded.
    """
    from diffusers import DiffusionPipeline

    options = dict(model_init_kwargs or {})
    if isinstance(model, DiffusionPipeline):
        if options:
            raise ValueError(
                f"`model_init_kwargs` ({', '.join(options)}) has no effect on a pipeline that is already loaded: "
                "pass a Hub id or folder, or load the pipeline with these arguments yourself."
            )
        return wrap_pipeline(model, settings=settings)
    if "quantization_config" in options:
        options.setdefault("dtype", "float32")  # else diffusers makes the layers that are not quantised float16
    if "dtype" in options:
        parts = options["dtype"] if isinstance(options["dtype"], dict) else {"default": options["dtype"]}
        read = {part: _read_dtype(value) for part, value in parts.items()}
        options["dtype"] = read if isinstance(options["dtype"], dict) else read["default"]
    if "meissonic_repository" in options:
        origin = ModelOrigin.of_source(str(model), options.get("revision"), file="transformer/config.json")
        return wrap_pipeline(load_meissonic(model, **options), origin, settings)
    if "quantization_config" in options:
        options["quantization_config"] = denoiser_quantization(
            str(model), config=options.pop("quantization_config"), **options
        )
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(model), **options)
    except AttributeError as error:
        if "no attribute Pipeline" not in str(error):
            raise
        raise ValueError(
            f"{str(model)!r} names a pipeline class `Pipeline`, which diffusers does not have. For Meissonic add "
            "`model_init_kwargs={'meissonic_repository': 'path/to/a/clone', 'trust_remote_code': True}` "
            "(docs/meissonic.md); else load the pipeline yourself and pass the object."
        ) from error
    return wrap_pipeline(pipeline, ModelOrigin.of_source(str(model), options.get("revision")), settings)
