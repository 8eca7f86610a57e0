"""Prepare frames of a video for Qwen2-VL, without the processor of transformers, which needs torchvision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image

from .frames import spread_frames
from .pixels import colour_values, normalised, resized

_MIN_FRAMES, _MAX_FRAMES = 4, 768


def chosen_frames(total: int, fps: float, sampling_fps: float = 2.0) -> list[int]:
    """
    Return the numbers, in 0 .. total - 1, of the frames that the authors' code chooses.

    It takes about `sampling_fps` frames per second, an even number and at least four, spread evenly over the clip of
    `total` frames. A clip of two or three frames gives two, and a shorter one none.
    """
    most = min(_MAX_FRAMES, total) // 2 * 2
    wanted = min(max(total / fps * sampling_fps, _MIN_FRAMES), most)
    return spread_frames(total, round(wanted / 2) * 2)


def frame_size(height: int, width: int, limits: tuple[int, int], side: int = 28) -> tuple[int, int]:
    """
    Return the (height, width) to which frames are resized: about their shape, with the least and the most pixels of
    `limits`.

    Both are multiples of `side`, the pixels per side of a patch times the patches per side that are merged.
    """
    min_pixels, max_pixels = limits
    new = [max(side, round(length / side) * side) for length in (height, width)]
    if new[0] * new[1] > max_pixels:
        # Divided as in Qwen2-VL's `smart_resize`: times the inverse, 768 x 768 would round to 448 instead of 420.
        factor = math.sqrt(height * width / max_pixels)
        new = [math.floor(length / factor / side) * side for length in (height, width)]
    elif new[0] * new[1] < min_pixels:
        factor = math.sqrt(min_pixels / (height * width))
        new = [math.ceil(length * factor / side) * side for length in (height, width)]
    return new[0], new[1]


def patches_of(
    frames: Sequence[Image.Image], size: tuple[int, int], *, patch: int = 14, merge: int = 2, temporal: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Resize and normalise frames, and cut them into patches of `temporal` frames in the order of Qwen2-VL.

    Args:
        frames (`Sequence[PIL.Image.Image]`): RGB frames, a multiple of `temporal`.
        size (`tuple[int, int]`): (height, width) to resize to, multiples of `patch * merge`.
        patch, merge, temporal (`int`, *optional*, defaults to 14, 2 and 2):
            Pixels per side of a patch; patches per side that the model merges into one, which follow each other in
            the result; frames per patch.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (patches, 3 * temporal * patch * patch) fp32; and (1, 3), the numbers of
        patches in time, height and width.
    """
    # Whole values, as torchvision rounds them.
    values = [resized(colour_values(frame), size).clamp(0, 255).round() for frame in frames]
    pixels = normalised(torch.stack(values) / 255)
    time, rows, columns = len(frames) // temporal, size[0] // patch, size[1] // patch
    cut = pixels.reshape(time, temporal, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    # Now in the order time, merged patch, patch in it; then colour, frame, row and column.
    ordered = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * rows * columns, 3 * temporal * patch * patch)
    return ordered, torch.tensor([[time, rows, columns]])
