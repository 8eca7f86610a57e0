"""Several rewards as one."""

from __future__ import annotations

import math
from collections.abc import Mapping

from PIL import Image

from .base import RewardFacts, RewardFunction, reward_facts, reward_takes, score_images


class WeightedReward:
    """
    A weighted sum of rewards. Their scales differ widely, so choose weights by the spread of each.

    Its facts name the models, revisions and scales of the parts, and it takes what they take.

    Args:
        parts (`Mapping[str, tuple[RewardFunction, float]]`):
            Name of a part, for the table of facts, to the reward and its weight; a negative weight counts against.

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
            told = ", ".join(f"{name} scores {medium}" for name, medium in takes.items())
            raise ValueError(f"`parts`: {told}. Wrap those of images in MeanOverFrames, or leave them out.")
        self.parts = dict(parts)
        self.takes = next(iter(takes.values()))
        known = {name: reward_facts(reward) for name, (reward, _) in parts.items()}
        self.facts = RewardFacts(
            " + ".join(f"{weight:g}*{name}" for name, (_, weight) in parts.items()),
            _each({name: facts.model_id for name, facts in known.items()}),
            _each({name: facts.revision for name, facts in known.items()}),
            f"weighted sum ({_each({name: facts.scale for name, facts in known.items()}) or 'of scales not told'})",
        )

    def __call__(self, images: list[Image.Image], prompts: list[str], /) -> list[float | None]:
        """Return one score an image; `None` where any of the parts gave none."""
        totals: list[float | None] = [0.0] * len(images)
        for reward, weight in self.parts.values():
            scores = score_images(reward, images, prompts, batch_size=max(1, len(images)))
            totals = [
                None if total is None or score is None else total + weight * score
                for total, score in zip(totals, scores, strict=True)
            ]
        return totals


def _each(values: Mapping[str, str | None]) -> str | None:
    """Return `name: value, ...` of the parts that have one."""
    return "; ".join(f"{name}: {value}" for name, value in values.items() if value) or None
