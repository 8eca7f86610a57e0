"""A small text-to-image model that ships with the package, and scores computed from its pictures' pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .scores import background_darkness, colour_faithfulness
from .world import COLOURS, PROMPTS, RESOLUTION, SHAPES, colour_of

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

PIPELINE_DIR = Path(__file__).parent / "pipeline"
"""A diffusers folder: weights in float16, `build.json` with the command, time and quality of its training."""

NOTE = "the shapes model embedded in tgol_trainer (32×32 pictures, 1.35 M parameters)"
CALL_ARGUMENTS = "num_inference_steps=15, guidance_scale=1.5"
LOADING_CODE = "from tgol_trainer.shapes import load_pipeline\n\npipe = load_pipeline()"

__all__ = [
    "CALL_ARGUMENTS",
    "COLOURS",
    "LOADING_CODE",
    "NOTE",
    "PIPELINE_DIR",
    "PROMPTS",
    "RESOLUTION",
    "SHAPES",
    "background_darkness",
    "colour_faithfulness",
    "colour_of",
    "load_pipeline",
]


def load_pipeline(**kwargs: Any) -> StableDiffusionPipeline:
    """
    Load the shapes model: a complete `StableDiffusionPipeline` trained on drawn shapes, no download.

    15 DDIM steps and guidance 1.5 suit it: `pipe("a red circle", num_inference_steps=15, guidance_scale=1.5)`.

    Args:
        kwargs:
            Passed to `StableDiffusionPipeline.from_pretrained`; `dtype` defaults to `torch.float32`.

    Returns:
        `diffusers.StableDiffusionPipeline`: 32 x 32 pictures, prompts up to 48 bytes and spaces.
    """
    import torch
    from diffusers import StableDiffusionPipeline

    with _no_loading_bars():
        pipeline = StableDiffusionPipeline.from_pretrained(
            PIPELINE_DIR, **{"dtype": torch.float32, "local_files_only": True, **kwargs}
        )
    # The folder is inside site-packages: no path of this machine should look like the model's name.
    pipeline.register_to_config(_name_or_path="")
    return pipeline


@contextlib.contextmanager
def _no_loading_bars() -> Iterator[None]:
    # Three megabytes load before a bar can be read.
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in shown:
            module.enable_progress_bar()
