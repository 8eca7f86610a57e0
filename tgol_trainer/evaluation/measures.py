"""Measure saturation, contrast, detail, motion and diversity of images, to show damage and collapse beside scores."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image

MEASURES = {
    "saturation": "mean over pixels of the largest minus the smallest of R, G and B, 0 to 1",
    "contrast": "standard deviation of the luma, 0 to 0.5",
    "high_frequency": "root mean square of the luma minus its mean over 3×3 pixels, 0 to 1",
    "motion": "videos: root mean square difference of the luma between neighbouring measured frames, 0 to 1",
}
"""Names and descriptions of the measures of one image. The value of a video is the mean over the measured frames."""

SPREAD = "seed_spread"
SPREADS = {
    SPREAD: "mean distance between two seeds of one prompt: root mean square difference of RGB at 16×16, 0 to 1",
    "feature_spread": "mean of 1 − cosine of the features of two seeds of one prompt, 0 to 2",
}
"""Names and descriptions of the measures of several images of one prompt, made with different seeds."""

MEASURED_FRAMES = 8
"""Frames of a video that are measured, spread evenly."""
_SIDE = 16
_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


def measure_image(frames: Sequence[Image.Image]) -> dict[str, float]:
    """
    Return the values of [`MEASURES`] for a single image, or for the frames of a video, in order and of one size;
    `motion` only for two frames or more.

    Raises:
        ValueError: if there is no frame.
    """
    if not frames:
        raise ValueError("There is no frame to measure.")
    pixels = [np.asarray(frame.convert("RGB"), dtype=np.float64) / 255 for frame in frames]
    lumas = [frame @ _LUMA for frame in pixels]
    values = {
        "saturation": float(np.mean([np.ptp(frame, axis=2).mean() for frame in pixels])),
        "contrast": float(np.mean([luma.std() for luma in lumas])),
        "high_frequency": float(np.mean([_high_frequency(luma) for luma in lumas])),
    }
    if len(lumas) > 1:
        steps = [np.sqrt(np.mean((new - old) ** 2)) for old, new in itertools.pairwise(lumas)]
        values["motion"] = float(np.mean(steps))
    return values


def _high_frequency(luma: np.ndarray) -> float:
    """Return the root mean square of the luma (H, W) minus its mean over 3×3 pixels; 0 below 3 pixels a side."""
    if min(luma.shape) < 3:
        return 0.0
    rows = luma[:-2] + luma[1:-1] + luma[2:]
    smooth = (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9
    return float(np.sqrt(np.mean((luma[1:-1, 1:-1] - smooth) ** 2)))


def pixel_descriptor(frames: Sequence[Image.Image]) -> np.ndarray:
    """
    Return the RGB values of an image at 16×16 pixels, (768,) uint8, or of the first, middle and last frame, (2304,).
    """
    shown = [frames[0]] if len(frames) == 1 else [frames[0], frames[len(frames) // 2], frames[-1]]
    small = [frame.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX) for frame in shown]
    return np.concatenate([np.asarray(image).ravel() for image in small])


def seed_spread(
    descriptors: Sequence[np.ndarray | None], prompts: Sequence[str], *, cosine: bool = False
) -> dict[str, float]:
    """
    Return how different the images of each prompt are.

    Args:
        descriptors (`Sequence[numpy.ndarray | None]`):
            One per image, (D,): uint8 pixels ([`pixel_descriptor`]) or floating-point features; `None` leaves the
            image out.
        prompts (`Sequence[str]`): The prompt of each image.
        cosine (`bool`, *optional*, defaults to `False`):
            Take 1 − cosine of features as the distance, not the root mean square difference of pixels in 0..1.

    Returns:
        `dict[str, float]`: prompt to the mean distance over all pairs of its images; prompts with fewer than two
            are left out.
    """
    groups: dict[str, list[np.ndarray]] = {}
    for descriptor, prompt in zip(descriptors, prompts, strict=True):
        if descriptor is not None:
            groups.setdefault(prompt, []).append(np.asarray(descriptor))
    return {prompt: _mean_distance(np.stack(group), cosine) for prompt, group in groups.items() if len(group) > 1}


def _mean_distance(group: np.ndarray, cosine: bool) -> float:
    if cosine:
        values = group.astype(np.float64)
        values /= np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
        # The mean over pairs i ≠ j follows from the square of the sum and the sum of the squares.
        count = len(values)
        return float(1 - ((values.sum(axis=0) ** 2).sum() - (values**2).sum()) / (count * (count - 1)))
    values = group.astype(np.float64) / 255
    first, second = np.triu_indices(len(values), k=1)
    return float(np.sqrt(((values[first] - values[second]) ** 2).mean(axis=1)).mean())
