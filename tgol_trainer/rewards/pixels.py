"""Turn PIL images into pixel values as CLIP, BLIP and Qwen2-VL take them; torchvision is not needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

# Of the colours in 0..1; CLIP's, which BLIP and Qwen2-VL share.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def rgb(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the images in RGB; transparency is dropped."""
    return [image if image.mode == "RGB" else image.convert("RGB") for image in images]


def colour_values(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an RGB image: (3, height, width), fp32, whole numbers in 0..255."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def resized(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return pixels (3, height, width) at another (height, width): bicubic with antialiasing, values not clamped."""
    if pixels.shape[1:] == size:
        return pixels
    return torch.nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True, align_corners=False)[0]


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels (..., 3, height, width) in 0..1 by CLIP's mean and standard deviation."""
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
