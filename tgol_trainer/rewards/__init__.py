"""Reward functions: what they look like, how a list of pictures is scored, and the ones that need no model."""

from .base import RewardFunction, reward_name, score_images
from .jpeg import jpeg_compressibility

__all__ = ["RewardFunction", "jpeg_compressibility", "reward_name", "score_images"]
