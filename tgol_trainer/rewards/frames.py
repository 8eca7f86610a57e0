"""Rewards of images on videos: the mean over frames."""

from __future__ import annotations

from typing import ClassVar

from PIL import Image

from .base import Medium, RewardFacts, RewardFunction, reward_facts, reward_takes, score_images

_BATCH = 32


class MeanOverFrames:
    """
    A reward of images, averaged over frames that are spread evenly over a clip. What moves plays no part.

    Args:
        reward (`RewardFunction`):
            Of images.
        num_frames (`int`):
            Frames of each clip, its first and last among them (one alone is its first); all of a shorter clip.

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
        self.facts = RewardFacts(facts.name, facts.model_id, facts.revision, scale)

    def __call__(self, videos: list[list[Image.Image]], prompts: list[str], /) -> list[float | None]:
        """Return one score a clip; `None` where a frame has none, or there is no frame."""
        scores: list[float | None] = []
        for video, prompt in zip(videos, prompts, strict=True):
            chosen = [video[index] for index in spread(len(video), min(self.num_frames, len(video)))]
            found = score_images(self.reward, chosen, [prompt] * len(chosen), batch_size=_BATCH)
            known = [score for score in found if score is not None]
            scores.append(sum(known) / len(known) if known and len(known) == len(found) else None)
        return scores


def spread(total: int, count: int) -> list[int]:
    """
    Choose frames spread evenly, as `torch.linspace(0, total - 1, count).round()` does.

    Args:
        total (`int`):
            Frames there are.
        count (`int`):
            Frames to choose.

    Returns:
        `list[int]`: `count` numbers in 0 .. total - 1.
    """
    import torch

    return torch.linspace(0, total - 1, count).round().long().tolist()
