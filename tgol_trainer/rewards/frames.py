"""Score videos with a reward of images: the mean over frames."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from PIL import Image

from .base import Medium, RewardFunction, reward_facts, reward_takes, score_images

_BATCH = 32


class MeanOverFrames:
    """
    A reward of images, averaged over frames that are spread evenly over a clip. It takes no notice of motion.

    Args:
        reward (`RewardFunction`): A reward of images.
        num_frames (`int`):
            Frames of each clip, the first and the last among them (a single one is the first). A shorter clip is
            scored by all its frames.

    Raises:
        ValueError: if the reward takes videos itself, or `num_frames` is below 1.
    """

    takes: ClassVar[Medium] = "videos"

    def __init__(self, reward: RewardFunction, num_frames: int) -> None:
        facts = reward_facts(reward)
        if reward_takes(reward) == "videos":
            raise ValueError(f"The reward {facts.name!r} scores videos as they are: leave the mean over frames out.")
        if num_frames < 1:
            raise ValueError(f"`num_frames` is {num_frames}; it must be at least 1.")
        self.reward, self.num_frames = reward, num_frames
        scale = f"mean over {num_frames} frames" + (f", {facts.scale}" if facts.scale else "")
        self.facts = dataclasses.replace(facts, scale=scale)

    def __call__(self, videos: list[list[Image.Image]], prompts: list[str], /) -> list[float | None]:
        """Return one score per clip; `None` where a frame has no score, or the clip has no frames."""
        scores: list[float | None] = []
        for video, prompt in zip(videos, prompts, strict=True):
            chosen = [video[index] for index in spread_frames(len(video), min(self.num_frames, len(video)))]
            found = score_images(self.reward, chosen, [prompt] * len(chosen), batch_size=_BATCH)
            known = [score for score in found if score is not None]
            scores.append(sum(known) / len(known) if known and len(known) == len(found) else None)
        return scores


def spread_frames(total: int, count: int) -> list[int]:
    """
    Return the numbers of `count` of `total` frames, spread as in VideoReward's reference code.

    Where a position lies halfway between two frames, `torch.linspace` can choose another one than `evenly_spaced`.
    """
    import torch

    return torch.linspace(0, total - 1, count).round().long().tolist()
