"""Notice images that drift from the base model's: burnt colours, lost detail, collapse, a score that falls."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from PIL import Image

from tgol_trainer.evaluation.measures import measure_image, pixel_descriptor

DRIFT_METRICS: dict[str, str] = {
    "drift/saturation": "mean saturation of the sampled images, divided by that of the base model's",
    "drift/contrast": "the same of the contrast",
    "drift/high_frequency": "the same of the energy in the finest detail",
    "drift/diversity": "the same of the spread between the images, over all prompts and seeds",
    "drift/<reward>": "mean change of a score, in standard deviations of the base model's scores",
}
"""What is logged at each sampling beside scores."""

_MEASURES = ("saturation", "contrast", "high_frequency")


@dataclasses.dataclass(frozen=True)
class DriftAlarm:
    """
    What to do when sampled images drift from the base model's.

    Args:
        action (`str`, *optional*, defaults to `"warn"`):
            `"warn"` logs a warning, `"stop"` ends training and puts the weights of the last sampling before it back,
            `"ignore"` does nothing.
        max_ratio (`float`, *optional*, defaults to 1.5):
            Factor by which saturation, contrast and finest detail may rise or fall, and diversity may fall.
        max_drop (`float`, *optional*, defaults to 1.0):
            Standard deviations of the base model's scores by which the mean of a score may fall.

    Raises:
        ValueError: for another action or a limit out of range.
    """

    action: Literal["warn", "stop", "ignore"] = "warn"
    max_ratio: float = 1.5
    max_drop: float = 1.0

    def __post_init__(self) -> None:
        if self.action not in ("warn", "stop", "ignore"):
            raise ValueError(f"`action` must be warn, stop or ignore, got {self.action!r}.")
        if not (self.max_ratio > 1 and self.max_drop > 0):
            raise ValueError(
                f"`max_ratio` must be above 1 and `max_drop` above 0, got {self.max_ratio} and {self.max_drop}."
            )

    def findings(self, drift: Mapping[str, float]) -> list[str]:
        """Return what went past a limit, in words; `drift` has keys as in `DRIFT_METRICS`."""
        found = []
        for key, value in drift.items():
            name = key.removeprefix("drift/")
            if name in _MEASURES and not 1 / self.max_ratio <= value <= self.max_ratio:
                found.append(f"{name.replace('_', ' ')} × {value:.2f}")
            elif name == "diversity" and not value >= 1 / self.max_ratio:
                found.append(f"diversity × {value:.2f}")
            elif name not in (*_MEASURES, "diversity") and not value >= -self.max_drop:
                found.append(f"{name} {value:+.1f} standard deviations")
        return found


def measure(images: Sequence[Image.Image]) -> dict[str, float]:
    """
    Return what is compared of the images of one moment.

    Args:
        images (`Sequence[PIL.Image.Image]`): At least one.

    Returns:
        `dict[str, float]`: means of saturation, contrast and high_frequency ([`evaluation.measures.MEASURES`]), and
            for two images or more `diversity`: standard deviation between images of RGB at 16×16, root mean square
            over pixels, 0 to 0.5.
    """
    single = [measure_image([image]) for image in images]
    values = {name: float(np.mean([each[name] for each in single])) for name in _MEASURES}
    if len(images) > 1:
        pixels = np.stack([pixel_descriptor([image]) for image in images]).astype(np.float64) / 255
        values["diversity"] = float(np.sqrt(pixels.var(axis=0).mean()))
    return values


def compare(
    base: Mapping[str, float],
    now: Mapping[str, float],
    base_scores: Mapping[str, Sequence[float | None]],
    scores: Mapping[str, Sequence[float | None]],
) -> dict[str, float]:
    """
    Return how far images are from the base model's.

    Args:
        base, now (`Mapping[str, float]`): What [`measure`] returns.
        base_scores, scores (`Mapping[str, Sequence[float | None]]`): One score per image, by reward.

    Returns:
        `dict[str, float]`: keys as in `DRIFT_METRICS`; without those whose base value is 0.
    """
    drift = {f"drift/{name}": now[name] / value for name, value in base.items() if value > 0}
    for name, values in scores.items():
        pairs = [(old, new) for old, new in zip(base_scores[name], values, strict=True) if None not in (old, new)]
        before, after = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
        if len(before) > 1 and before.std() > 0:
            drift[f"drift/{name}"] = float((after - before).mean() / before.std())
    return drift
