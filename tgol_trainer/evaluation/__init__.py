"""Fixed-seed generation, paired comparison of scores, and the plots and tables that show both."""

from .comparison import Comparison, compare_scores, format_table, write_metrics
from .contact_sheet import save_contact_sheet
from .generation import generate_images, generate_videos, makes_videos
from .plots import save_before_after_grid, save_score_distributions, save_score_histogram

__all__ = [
    "Comparison",
    "compare_scores",
    "format_table",
    "generate_images",
    "generate_videos",
    "makes_videos",
    "save_before_after_grid",
    "save_contact_sheet",
    "save_score_distributions",
    "save_score_histogram",
    "write_metrics",
]
