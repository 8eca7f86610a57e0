"""Score images of the shapes world from their pixels; higher is better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tgol_trainer.rewards import RewardFacts

from .world import colour_of

if TYPE_CHECKING:
    from PIL import Image


def background_darkness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """
    Return one minus the mean brightness of the two outermost rows and columns, which no shape reaches.

    No prompt asks for it, and the shapes model draws backgrounds of every brightness.

    Args:
        images (`Sequence[PIL.Image.Image]`): Images of any size and mode.
        prompts (`Sequence[str]`): Not used.

    Returns:
        `list[float]`: 0 (white) to 1 (black).
    """
    scores = []
    for image in images:
        pixels = _pixels(image)
        frame = np.ones(pixels.shape[:2], dtype=bool)
        frame[2:-2, 2:-2] = False
        scores.append(float(1 - pixels[frame].mean()))
    return scores


def colour_faithfulness(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float | None]:
    """
    Return one minus the mean distance of each image's centre from the colour that its prompt names.

    The centre is the middle eighth of each side (4 x 4 of 32 x 32 pixels), inside every shape.

    Args:
        images (`Sequence[PIL.Image.Image]`): Images of any size and mode.
        prompts (`Sequence[str]`): Each names a colour of the shapes world.

    Returns:
        `list[float | None]`: 0 to 1; a distance is the mean absolute difference of RGB values in 0 to 1. `None` for a
        prompt that does not name a colour.
    """
    scores: list[float | None] = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = _pixels(image)
        height, width = pixels.shape[:2]
        top, left, rows, columns = height * 7 // 16, width * 7 // 16, max(1, height // 8), max(1, width // 8)
        centre = pixels[top : top + rows, left : left + columns].reshape(-1, 3)
        try:
            target = np.asarray(colour_of(prompt)) / 255
        except ValueError:
            scores.append(None)
        else:
            scores.append(float(1 - np.abs(centre - target).mean()))
    return scores


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), dtype=np.float64) / 255


background_darkness.facts = RewardFacts(  # type: ignore[attr-defined]
    "background_darkness", scale="1 minus the mean brightness of the two outermost rows and columns; 0 to 1"
)
colour_faithfulness.facts = RewardFacts(  # type: ignore[attr-defined]
    "colour_faithfulness", scale="1 minus the mean distance of the middle from the named colour; 0 to 1"
)
