"""Load the small text-to-image models that ship with the package, and score their images from pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .scores import background_darkness, colour_faithfulness
from .world import COLOURS, PROMPTS, RESOLUTION, SHAPES, colour_of

if TYPE_CHECKING:
    from diffusers import AmusedPipeline, StableDiffusionPipeline

PIPELINE_DIR = Path(__file__).parent / "pipeline"
"""A diffusers folder with weights in float16; `build.json` holds the command, time and quality of its training."""

MASKED_PIPELINE_DIR = Path(__file__).parent / "masked_pipeline"
"""The same for the masked-token model."""

__all__ = [
    "COLOURS",
    "EMBEDDED",
    "MASKED_PIPELINE_DIR",
    "PIPELINE_DIR",
    "PROMPTS",
    "RESOLUTION",
    "SHAPES",
    "background_darkness",
    "colour_faithfulness",
    "colour_of",
    "embedded_model",
    "load_masked_pipeline",
    "load_pipeline",
]


def load_pipeline(**kwargs: Any) -> StableDiffusionPipeline:
    """
    Load the shapes model, a complete `StableDiffusionPipeline` trained on drawn shapes; nothing is downloaded.

    Use 15 DDIM steps and guidance 1.5: `pipe("a red circle", num_inference_steps=15, guidance_scale=1.5)`.

    Args:
        kwargs:
            Passed to `StableDiffusionPipeline.from_pretrained`; `dtype` defaults to `torch.float32`.

    Returns:
        `diffusers.StableDiffusionPipeline`: 32 x 32 images, prompts up to 48 bytes and spaces.
    """
    from diffusers import StableDiffusionPipeline

    return _load(StableDiffusionPipeline, PIPELINE_DIR, kwargs)


def load_masked_pipeline(**kwargs: Any) -> AmusedPipeline:
    """
    Load the masked-token twin, a complete `AmusedPipeline` trained on the same drawn shapes; nothing is downloaded.

    Use 12 steps and guidance 2. Its colours are right for nine images of ten; its shapes are blurred.

    Args:
        kwargs:
            Passed to `AmusedPipeline.from_pretrained`; `dtype` defaults to `torch.float32`.

    Returns:
        `diffusers.AmusedPipeline`: 32 x 32 images.
    """
    from diffusers import AmusedPipeline

    return _load(AmusedPipeline, MASKED_PIPELINE_DIR, kwargs)


def _load(pipeline_class: Any, folder: Path, options: dict[str, Any]) -> Any:
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # Three megabytes load before a progress bar can be read.
    shown = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
    for module in shown:
        module.disable_progress_bar()
    try:
        options = {"dtype": torch.float32, "local_files_only": True, **options}
        pipeline = pipeline_class.from_pretrained(folder, **options)
    finally:
        for module in shown:
            module.enable_progress_bar()
    # The folder is inside site-packages: no path of this machine should look like the model's name.
    pipeline.register_to_config(_name_or_path="")
    return pipeline


class EmbeddedModel(NamedTuple):
    """A model of the package: loader, name and code for cards, settings of sampling and of training, and folder."""

    load: Callable[..., Any]
    note: str
    loading_code: str
    call_arguments: dict[str, Any]
    training_flags: tuple[str, ...]
    folder: Path


EMBEDDED = {
    "shapes": EmbeddedModel(
        load_pipeline,
        "the shapes model embedded in tgol_trainer (32×32 images, 1.35 M parameters)",
        "from tgol_trainer.shapes import load_pipeline\n\npipe = load_pipeline()",
        {"num_inference_steps": 15, "guidance_scale": 1.5},
        ("--learning_rate", "2e-4", "--lr_scheduler_type", "constant"),
        PIPELINE_DIR,
    ),
    "shapes-masked": EmbeddedModel(
        load_masked_pipeline,
        "the masked-token twin of the shapes model embedded in tgol_trainer (32×32 images, 1.16 M parameters)",
        "from tgol_trainer.shapes import load_masked_pipeline\n\npipe = load_masked_pipeline()",
        {"num_inference_steps": 12, "guidance_scale": 2.0},
        ("--learning_rate", "1e-3", "--lr_scheduler_type", "constant"),
        MASKED_PIPELINE_DIR,
    ),
}
"""The models by their name for `TGOLTrainer(model=...)`."""


def embedded_model(name: str | Path) -> EmbeddedModel | None:
    """Return the embedded model of a name, or `None` for another name and where there is a folder of that name."""
    return None if Path(name).exists() else EMBEDDED.get(str(name))
