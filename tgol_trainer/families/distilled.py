"""Recognise base models that are distilled to few steps, and name the model to train instead."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_BASES = (
    (r"z-image-turbo", "Tongyi-MAI/Z-Image"),
    (r"flux\.?1-schnell|flux-schnell", "black-forest-labs/FLUX.1-dev"),
    (r"flux\.?2-klein-4b", "black-forest-labs/FLUX.2-klein-base-4B"),
    (r"flux\.?2-klein-9b", "black-forest-labs/FLUX.2-klein-base-9B"),
    (r"sdxl-(turbo|lightning)", "stabilityai/stable-diffusion-xl-base-1.0"),
    (r"stable-diffusion-3\.5-large-turbo", "stabilityai/stable-diffusion-3.5-large"),
    (r"qwen-image.*lightning", "Qwen/Qwen-Image"),
    (r"krea-2-turbo", "krea/Krea-2-Raw"),
    (r"ernie-image-turbo", "baidu/ERNIE-Image"),
    (r"sana[-_]sprint", "a Sana model without `Sprint` in its name"),
    (r"ltx.*distilled", "the `dev` model of the same version"),
)
"""Names of distilled models, in small letters, and what they were distilled from."""

_WORDS = r"turbo|lightning|schnell|hyper-?sd|sprint|lcm|dmd2?|distill(ed)?|few-?step|\d-?steps?"


def warn_of_distillation(pipeline: DiffusionPipeline) -> str | None:
    """
    Return a warning for a pipeline that is distilled to few steps, by its config or the name it was loaded from.

    Args:
        pipeline (`diffusers.DiffusionPipeline`): A loaded pipeline, or one without weights.

    Returns:
        `str`: the warning with the model to train instead; `None` for other pipelines.
    """
    name = Path(str(getattr(pipeline, "name_or_path", None) or "")).name.lower()
    base = next((base for pattern, base in _BASES if re.search(pattern, name)), None)
    if base is None and pipeline.config.get("is_distilled"):  # FLUX.2 klein says so itself
        base = "the `FLUX.2-klein-base` model of its size"
    if base is None and type(pipeline).__name__ == "FluxPipeline" and _is_schnell(pipeline):
        base = "black-forest-labs/FLUX.1-dev"
    if base is None and re.search(rf"(^|[-_.])(?<!de-)({_WORDS})($|[-_.])", name):
        base = "the model that it was distilled from"
    if base is None:
        return None
    return (
        f"This {type(pipeline).__name__} is distilled to few steps, as its name or config says. Training undoes that: "
        f"what it draws in few steps gets worse. Train {base} instead, and try the adapter on this model afterwards."
    )


def _is_schnell(pipeline: DiffusionPipeline) -> bool:
    """Whether a FLUX.1 has no guidance and no shift, as schnell alone has it."""
    guided = pipeline.transformer.config.get("guidance_embeds", True)
    scheduler = pipeline.scheduler.config
    return not guided and not scheduler.get("use_dynamic_shifting") and scheduler.get("shift") == 1.0
