"""The data contract: prompt, image and score rows, checked before training and collated to tensors."""

from tgol_trainer.data.checks import check_columns
from tgol_trainer.data.collator import Collator, decode_prompts
from tgol_trainer.data.datasets import DataReport, ScoredDataset, ScoredStream, prepare_dataset, stream_scores
from tgol_trainer.data.images import DataError, ImageError, cropped_share, open_image, to_pixels
from tgol_trainer.data.labels import Labelling, fit_labelling
from tgol_trainer.data.loading import load_scored_dataset
from tgol_trainer.data.rows import Columns

__all__ = [
    "Collator",
    "Columns",
    "DataError",
    "DataReport",
    "ImageError",
    "Labelling",
    "ScoredDataset",
    "ScoredStream",
    "check_columns",
    "cropped_share",
    "decode_prompts",
    "fit_labelling",
    "load_scored_dataset",
    "open_image",
    "prepare_dataset",
    "stream_scores",
    "to_pixels",
]
