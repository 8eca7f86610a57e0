"""The data contract: prompt, image or video, and score rows, checked before training and collated to tensors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tgol_trainer.data.checks import check_columns
from tgol_trainer.data.images import DataError, ImageError, cropped_share, open_image, to_pixels
from tgol_trainer.data.labels import Labelling, LabelSettings, fit_labelling
from tgol_trainer.data.loading import load_scored_dataset
from tgol_trainer.data.pairs import pairs_to_scores
from tgol_trainer.data.prompts import PROMPT_SETS, Prompts, load_prompts, prompt_set
from tgol_trainer.data.ratings import ratings_to_scores, thumbs_to_scores
from tgol_trainer.data.rows import Columns
from tgol_trainer.data.videos import (
    Video,
    VideoError,
    encode_video,
    frame_rate,
    open_video,
    read_video,
    sample_frames,
    video_pixels,
)

if TYPE_CHECKING:
    from tgol_trainer.data.collator import Collator, decode_prompts
    from tgol_trainer.data.datasets import DataReport, ScoredDataset, prepare_dataset
    from tgol_trainer.data.grouping import GroupSampler, innermost_sampler
    from tgol_trainer.data.streams import ScoredStream, stream_scores

__all__ = [
    "PROMPT_SETS",
    "Collator",
    "Columns",
    "DataError",
    "DataReport",
    "GroupSampler",
    "ImageError",
    "LabelSettings",
    "Labelling",
    "Prompts",
    "ScoredDataset",
    "ScoredStream",
    "Video",
    "VideoError",
    "check_columns",
    "cropped_share",
    "decode_prompts",
    "encode_video",
    "fit_labelling",
    "frame_rate",
    "innermost_sampler",
    "load_prompts",
    "load_scored_dataset",
    "open_image",
    "open_video",
    "pairs_to_scores",
    "prepare_dataset",
    "prompt_set",
    "ratings_to_scores",
    "read_video",
    "sample_frames",
    "stream_scores",
    "thumbs_to_scores",
    "to_pixels",
    "video_pixels",
]

# What needs torch, which takes seconds to import, is imported when it is asked for: commands that only look at data
# start without it.
_WITH_TORCH = {
    **dict.fromkeys(("Collator", "decode_prompts"), "collator"),
    **dict.fromkeys(("DataReport", "ScoredDataset", "prepare_dataset"), "datasets"),
    **dict.fromkeys(("GroupSampler", "innermost_sampler"), "grouping"),
    **dict.fromkeys(("ScoredStream", "stream_scores"), "streams"),
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
