"""Turn images in memory into the rows and the gallery of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

from tgol_trainer.rewards import score_images

from .measures import MEASURES, SPREAD, measure_image, pixel_descriptor
from .previews import encode_preview, encode_thumbnail
from .report import Gallery
from .results import ModelRows


def score_model(
    name: str,
    images: Sequence[Image.Image],
    prompts: Sequence[str],
    rewards: Mapping[str, Callable[..., Any]],
    *,
    trained: frozenset[str] | None = None,
) -> ModelRows:
    """
    Score and measure one model's images.

    Args:
        name (`str`): Name of the model.
        images (`Sequence[PIL.Image.Image]`): The images.
        prompts (`Sequence[str]`): One per image.
        rewards (`Mapping[str, Callable]`): Name of a score and its reward, a [`RewardFunction`].
        trained (`frozenset[str]`, *optional*):
            Names of the scores that the model was trained on; `None` if that is not known.

    Returns:
        [`ModelRows`]
    """
    measured = [measure_image([image]) for image in images]
    return ModelRows(
        name,
        {score: score_images(reward, images, prompts) for score, reward in rewards.items()},
        {measure: [values[measure] for values in measured] for measure in MEASURES if measure != "motion"},
        {SPREAD: [pixel_descriptor([image]) for image in images]},
        trained,
    )


def make_gallery(
    prompts: Sequence[str], models: Sequence[Sequence[Image.Image]], *, categories: Sequence[str] | None = None
) -> Gallery:
    """
    Make small copies of the images of all models for a report.

    Args:
        prompts (`Sequence[str]`): One per row.
        models (`Sequence[Sequence[PIL.Image.Image]]`): The images of each model, the base model first.
        categories (`Sequence[str]`, *optional*): One per row.

    Returns:
        [`Gallery`]
    """
    seen: dict[str, int] = {}
    numbers = []
    for prompt in prompts:
        numbers.append(seen.get(prompt, 0))
        seen[prompt] = numbers[-1] + 1
    return Gallery(
        prompts,
        numbers,
        [[encode_thumbnail([image]) for image in images] for images in models],
        [[encode_preview([image]) for image in images] for images in models],
        categories,
    )
