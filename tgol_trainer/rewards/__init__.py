"""Score images and videos: the form of a reward, the known rewards by name, and functions that call them."""

from .base import (
    Clip,
    Medium,
    RewardFacts,
    RewardFunction,
    reward_facts,
    reward_name,
    reward_takes,
    score_columns,
    score_images,
)
from .frames import MeanOverFrames
from .jpeg import jpeg_compressibility, jpeg_incompressibility
from .loading import REWARDS, RewardLoader, find_reward, load_reward
from .weighted import WeightedReward

__all__ = [
    "REWARDS",
    "Clip",
    "MeanOverFrames",
    "Medium",
    "RewardFacts",
    "RewardFunction",
    "RewardLoader",
    "WeightedReward",
    "find_reward",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "load_reward",
    "reward_facts",
    "reward_name",
    "reward_takes",
    "score_columns",
    "score_images",
]
