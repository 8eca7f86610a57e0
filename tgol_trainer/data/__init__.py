"""Check rows of a prompt, an image or video, and a score before training, and collate them to tensors."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .buckets import Buckets
from .checks import check_columns
from .images import DataError, ImageError, cropped_share, open_image, to_pixels
from .rows import Columns
from .videos import Video, VideoError, encode_video, frame_rate, open_video, read_video, sample_frames, video_pixels

if TYPE_CHECKING:
    from .collator import LABELS, Collator, decode_prompts
    from .datasets import DataReport, ScoredDataset, prepare_dataset
    from .passes import StreamPasses, stream_passes
    from .sampler import GroupSampler, SizeSampler, innermost_sampler
    from .streams import ScoredStream, stream_scores

__all__ = [
    "LABELS",
    "Buckets",
    "Collator",
    "Columns",
    "DataError",
    "DataReport",
    "GroupSampler",
    "ImageError",
    "ScoredDataset",
    "ScoredStream",
    "SizeSampler",
    "StreamPasses",
    "Video",
    "VideoError",
    "check_columns",
    "cropped_share",
    "decode_prompts",
    "encode_video",
    "frame_rate",
    "innermost_sampler",
    "open_image",
    "open_video",
    "prepare_dataset",
    "read_video",
    "sample_frames",
    "stream_passes",
    "stream_scores",
    "to_pixels",
    "video_pixels",
]

# These modules need torch, which takes seconds to import. They are imported when asked for, so that commands that only
# look at data start without it.
_WITH_TORCH = {
    **dict.fromkeys(("LABELS", "Collator", "decode_prompts"), "collator"),
    **dict.fromkeys(("DataReport", "ScoredDataset", "prepare_dataset"), "datasets"),
    **dict.fromkeys(("StreamPasses", "stream_passes"), "passes"),
    **dict.fromkeys(("GroupSampler", "SizeSampler", "innermost_sampler"), "sampler"),
    **dict.fromkeys(("ScoredStream", "stream_scores"), "streams"),
}


def __getattr__(name: str) -> Any:
    if name not in _WITH_TORCH:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
