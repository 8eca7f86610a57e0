"""Frames of a video as Qwen2-VL takes them, without the processor of transformers, which needs torchvision."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from PIL import Image

from .clip import colour_values, normalised
from .frames import spread

_MIN_PIXELS = 100_352
_MIN_FRAMES, _MAX_FRAMES = 4, 768


def chosen_frames(total: int, fps: float, sampling_fps: float = 2.0) -> list[int]:
    """
    Choose frames as the authors' code does: about two a second, an even number, at least four, spread evenly.

    Args:
        total (`int`):
            Frames of the clip.
        fps (`float`):
            Frames a second of the clip.
        sampling_fps (`float`, *optional*, defaults to 2.0):
            Frames a second to choose.

    Returns:
        `list[int]`: rising numbers in 0 .. total - 1; none for a clip of fewer than two frames.
    """
    most = min(_MAX_FRAMES, total) // 2 * 2
    wanted = min(max(total / fps * sampling_fps, _MIN_FRAMES), most)
    return spread(total, round(wanted / 2) * 2)


def frame_size(height: int, width: int, max_pixels: int, side: int = 28) -> tuple[int, int]:
    """
    Return the size to which frames are resized: multiples of `side`, about the same shape, 100,352 pixels to a limit.

    Args:
        height (`int`):
            Of the clip, in pixels.
        width (`int`):
            Of the clip, in pixels.
        max_pixels (`int`):
            Largest area.
        side (`int`, *optional*, defaults to 28):
            Pixels of a patch times patches that are merged.

    Returns:
        `tuple[int, int]`: (height, width).
    """
    new = [max(side, round(length / side) * side) for length in (height, width)]
    if new[0] * new[1] > max_pixels:
        factor = math.sqrt(max_pixels / (height * width))
        new = [math.floor(length * factor / side) * side for length in (height, width)]
    elif new[0] * new[1] < _MIN_PIXELS:
        factor = math.sqrt(_MIN_PIXELS / (height * width))
        new = [math.ceil(length * factor / side) * side for length in (height, width)]
    return new[0], new[1]


def patches_of(
    frames: Sequence[Image.Image], size: tuple[int, int], *, patch: int = 14, merge: int = 2, temporal: int = 2
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return frames as Qwen2-VL takes a video: resized, normalised, cut in patches of two frames, neighbours together.

    Args:
        frames (`Sequence[PIL.Image.Image]`):
            RGB frames, a multiple of `temporal`.
        size (`tuple[int, int]`):
            (height, width) to resize to, multiples of `patch * merge`.
        patch (`int`, *optional*, defaults to 14):
            Pixels a side of a patch.
        merge (`int`, *optional*, defaults to 2):
            Patches a side that the model merges to one.
        temporal (`int`, *optional*, defaults to 2):
            Frames a patch.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: (patches, 3 * temporal * patch * patch) fp32; and (1, 3), the numbers of
        patches in time, height and width.
    """
    pixels = normalised(torch.stack([_resized(frame, size) for frame in frames]) / 255)
    time, rows, columns = len(frames) // temporal, size[0] // patch, size[1] // patch
    cut = pixels.reshape(time, temporal, 3, rows // merge, merge, patch, columns // merge, merge, patch)
    # To time, place of the merged patch, place in it; then colour, frame, row and column.
    ordered = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(time * rows * columns, 3 * temporal * patch * patch)
    return ordered, torch.tensor([[time, rows, columns]])


def _resized(frame: Image.Image, size: tuple[int, int]) -> torch.Tensor:
    """Return (3, height, width), whole numbers in 0..255: bicubic with antialiasing, rounded as torchvision does."""
    pixels = colour_values(frame)[None]
    if (frame.height, frame.width) != size:
        pixels = torch.nn.functional.interpolate(
            pixels, size=size, mode="bicubic", antialias=True, align_corners=False
        )
    return pixels[0].clamp(0, 255).round()
