"""Rewards that read the file size of an image: no model, useful to see a trainer work."""

from __future__ import annotations

import io

from PIL import Image

from .base import RewardFacts


def jpeg_compressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """
    Score an image by how small it gets as a JPEG file: minus the size in kilobytes (1000 bytes) at quality 95.

    Source: the compressibility reward of DDPO (Black et al., 2023, "Training Diffusion Models with Reinforcement
    Learning", arXiv 2305.13301). Sizes depend a little on the JPEG library that Pillow was built with.

    Args:
        images (`list[PIL.Image.Image]`):
            Images of any mode, converted to RGB first; transparency is dropped.
        prompts (`list[str]`):
            Not used.

    Returns:
        `list[float]`: negative numbers; higher means a smaller file.
    """
    return [-_jpeg_bytes(image) / 1000 for image in images]


def jpeg_incompressibility(images: list[Image.Image], prompts: list[str]) -> list[float]:
    """
    Score an image by how large it gets as a JPEG file: minus [`jpeg_compressibility`].

    Source: the incompressibility reward of DDPO (Black et al., 2023, arXiv 2305.13301).

    Args:
        images (`list[PIL.Image.Image]`):
            Images of any mode, converted to RGB first; transparency is dropped.
        prompts (`list[str]`):
            Not used.

    Returns:
        `list[float]`: kilobytes (1000 bytes) at quality 95; higher means a larger file.
    """
    return [_jpeg_bytes(image) / 1000 for image in images]


def _jpeg_bytes(image: Image.Image) -> int:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=95)
    return buffer.tell()


_SCALE = "kilobytes (1000 bytes) as a JPEG file of quality 95"
jpeg_compressibility.facts = RewardFacts("jpeg_compressibility", scale=f"minus {_SCALE}")  # type: ignore[attr-defined]
jpeg_incompressibility.facts = RewardFacts("jpeg_incompressibility", scale=_SCALE)  # type: ignore[attr-defined]
