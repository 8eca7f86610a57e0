"""Generate images with fixed seeds, compare scores in pairs, and write the plots, tables and reports of both."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .before_after import save_before_after_grid
from .comparison import Comparison, compare_scores, format_table, write_metrics
from .contact_sheet import save_contact_sheet
from .images import make_gallery, score_model
from .measures import MEASURES, SPREADS, measure_image, pixel_descriptor, seed_spread
from .output import write_grids, write_results
from .plots import save_score_distributions, save_score_histogram
from .previews import encode_preview, encode_thumbnail
from .provenance import trained_scores
from .report import Gallery, ReportOptions, write_report
from .results import AdapterResult, Evaluation, MeasureChange, ModelRows, compare_models, verdict
from .strip import frame_row, save_sample_strip
from .tables import format_markdown, format_measures

if TYPE_CHECKING:
    from .generation import generate_images, generate_videos, makes_videos, takes_negative_prompts

__all__ = [
    "MEASURES",
    "SPREADS",
    "AdapterResult",
    "Comparison",
    "Evaluation",
    "Gallery",
    "MeasureChange",
    "ModelRows",
    "ReportOptions",
    "compare_models",
    "compare_scores",
    "encode_preview",
    "encode_thumbnail",
    "format_markdown",
    "format_measures",
    "format_table",
    "frame_row",
    "generate_images",
    "generate_videos",
    "make_gallery",
    "makes_videos",
    "measure_image",
    "pixel_descriptor",
    "save_before_after_grid",
    "save_contact_sheet",
    "save_sample_strip",
    "save_score_distributions",
    "save_score_histogram",
    "score_model",
    "seed_spread",
    "takes_negative_prompts",
    "trained_scores",
    "verdict",
    "write_grids",
    "write_metrics",
    "write_report",
    "write_results",
]

# They need torch, see `tgol_trainer.data`.
_OF_GENERATION = ("generate_images", "generate_videos", "makes_videos", "takes_negative_prompts")


def __getattr__(name: str) -> Any:
    if name not in _OF_GENERATION:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(".generation", __name__), name)
