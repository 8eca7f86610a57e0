"""Add several rewards with weights."""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image

from .base import RewardFacts, RewardFunction, reward_facts, reward_takes, score_images


class WeightedReward:
    """
    A weighted sum of rewards. Their scales differ widely: choose each weight by the standard deviation of its reward.

    Its facts name the models, revisions and scales of the parts. It takes images or videos, as its parts do.

    Args:
        parts (`Mapping[str, tuple[RewardFunction, float]]`):
            Name of each part, for the table of facts, to the reward and its weight. A negative weight subtracts.

    Raises:
        ValueError: if there is no part, if a weight is not finite, or if one part scores images and another videos.
    """

    def __init__(self, parts: Mapping[str, tuple[RewardFunction, float]]) -> None:
        if not parts:
            raise ValueError("`parts` is empty: name at least one reward with its weight.")
        wrong = [name for name, (_, weight) in parts.items() if not math.isfinite(weight)]
        if wrong:
            raise ValueError(f"`parts`: the weight of {', '.join(wrong)} is not finite.")
        takes = {name: reward_takes(reward) for name, (reward, _) in parts.items()}
        if len(set(takes.values())) > 1:
            listed = ", ".join(f"{name} scores {medium}" for name, medium in takes.items())
            raise ValueError(f"`parts`: {listed}. Wrap those of images in MeanOverFrames, or leave them out.")
        self.parts = dict(parts)
        self.takes = next(iter(takes.values()))
        facts = {name: reward_facts(reward) for name, (reward, _) in parts.items()}
        models, revisions, scales = (
            "; ".join(f"{name}: {getattr(known, field)}" for name, known in facts.items() if getattr(known, field))
            for field in ("model_id", "revision", "scale")
        )
        name = " + ".join(f"{weight:g}*{name}" for name, (_, weight) in parts.items())
        self.facts = RewardFacts(
            name, models or None, revisions or None, f"weighted sum ({scales or 'of scales not told'})"
        )

    def __call__(self, images: list[Image.Image], prompts: list[str], /) -> list[float | None]:
        """Return one score per image; `None` where any part gave none."""
        totals: list[float | None] = [0.0] * len(images)
        for reward, weight in self.parts.values():
            scores = score_images(reward, images, prompts, batch_size=max(1, len(images)))
            totals = [
                None if total is None or score is None else total + weight * score
                for total, score in zip(totals, scores, strict=True)
            ]
        return totals
