"""Score images by their size as JPEG files; no model is needed."""

from __future__ import annotations

import io

from PIL import Image

from .base import RewardFacts


def jpeg_compressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """
    Return minus the size of each image as a JPEG file of quality 95, in kilobytes (1000 bytes).

    Source: the compressibility reward of DDPO (Black et al., 2023, "Training Diffusion Models with Reinforcement
    Learning", arXiv 2305.13301). Sizes depend a little on the JPEG library that Pillow was built with.

    Args:
        images (`list[PIL.Image.Image]`): Images of any mode, converted to RGB first; transparency is dropped.
        prompts (`list[str]`): Not used.

    Returns:
        `list[float]`: negative numbers; higher means a smaller file.
    """
    return [-size for size in jpeg_incompressibility(images, prompts)]


def jpeg_incompressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """
    Return the size of each image as a JPEG file of quality 95: minus [`jpeg_compressibility`].

    Source: the incompressibility reward of DDPO (arXiv 2305.13301).

    Args:
        images, prompts:
            As in [`jpeg_compressibility`].

    Returns:
        `list[float]`: kilobytes (1000 bytes); higher means a larger file.
    """
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="JPEG", quality=95)
        sizes.append(buffer.tell() / 1000)
    return sizes


_SCALE = "kilobytes (1000 bytes) as a JPEG file of quality 95"
jpeg_compressibility.facts = RewardFacts("jpeg_compressibility", scale=f"minus {_SCALE}")  # type: ignore[attr-defined]
jpeg_incompressibility.facts = RewardFacts("jpeg_incompressibility", scale=_SCALE)  # type: ignore[attr-defined]
