"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image

from .base import RewardFacts, RewardFunction, score_images


class WeightedReward:
    """
    A weighted sum of rewards. Their scales differ widely, so choose weights by the spread of each.

    Args:
        parts (`Mapping[str, tuple[RewardFunction, float]]`):
            Name of a part, for the table of facts, to the reward and its weight; a negative weight counts against.

    Raises:
        ValueError: if there is no part, or a weight is not finite.
    """

    def __init__(self, parts: Mapping[str, tuple[RewardFunction, float]]) -> None:
        if not parts:
            raise ValueError("`parts` is empty: name at least one reward with its weight.")
        wrong = [name for name, (_, weight) in parts.items() if not math.isfinite(weight)]
        if wrong:
            raise ValueError(f"`parts`: the weight of {', '.join(wrong)} is not finite.")
        self.parts = dict(parts)
        self.facts = RewardFacts(
            " + ".join(f"{weight:g}*{name}" for name, (_, weight) in self.parts.items()), scale="weighted sum"
        )

    def __call__(self, images: list[Image.Image], prompts: list[str], /) -> list[float | None]:
        """Return one score a picture; `None` where any of the parts gave none."""
        totals: list[float | None] = [0.0] * len(images)
        for reward, weight in self.parts.values():
            scores = score_images(reward, images, prompts, batch_size=max(1, len(images)))
            totals = [
                None if total is None or score is None else total + weight * score
                for total, score in zip(totals, scores, strict=True)
            ]
        return totals
