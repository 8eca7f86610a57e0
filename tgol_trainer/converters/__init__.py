"""Convert comparisons, ratings and thumbs to one scored row per image."""

from .pairs import PairColumns, pairs_to_scores
from .ratings import RatingColumns, ratings_to_scores, thumbs_to_scores

__all__ = ["PairColumns", "RatingColumns", "pairs_to_scores", "ratings_to_scores", "thumbs_to_scores"]
