"""Convert comparisons, ratings and thumbs to one scored row per image."""

from .pairs import pairs_to_scores
from .ratings import ratings_to_scores, thumbs_to_scores

__all__ = ["pairs_to_scores", "ratings_to_scores", "thumbs_to_scores"]
