"""Reward functions: what they look like, how pictures are scored, and the usual ones by name. Light to import."""

from .base import RewardFacts, RewardFunction, reward_facts, reward_name, score_images
from .jpeg import jpeg_compressibility, jpeg_incompressibility
from .loading import REWARDS, load_reward
from .weighted import WeightedReward

__all__ = [
    "REWARDS",
    "RewardFacts",
    "RewardFunction",
    "WeightedReward",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "load_reward",
    "reward_facts",
    "reward_name",
    "score_images",
]
