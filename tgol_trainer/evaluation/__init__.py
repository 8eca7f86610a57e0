"""Fixed-seed generation, paired comparison of scores, and the plots and tables that show both."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .comparison import Comparison, compare_scores, format_table, write_metrics
from .contact_sheet import save_contact_sheet
from .plots import save_before_after_grid, save_score_distributions, save_score_histogram
from .strip import frame_row, save_sample_strip

if TYPE_CHECKING:
    from .generation import generate_images, generate_videos, makes_videos

__all__ = [
    "Comparison",
    "compare_scores",
    "format_table",
    "frame_row",
    "generate_images",
    "generate_videos",
    "makes_videos",
    "save_before_after_grid",
    "save_contact_sheet",
    "save_sample_strip",
    "save_score_distributions",
    "save_score_histogram",
    "write_metrics",
]

_OF_GENERATION = ("generate_images", "generate_videos", "makes_videos")  # needs torch, see `tgol_trainer.data`


def __getattr__(name: str) -> Any:
    if name not in _OF_GENERATION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".generation", __name__), name)
