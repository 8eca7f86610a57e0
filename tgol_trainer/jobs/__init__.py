"""Long work over many rows, in shards that survive a kill: making pictures, scoring them, comparing models."""

from .evaluate import EvaluationJob, run_evaluation
from .generate import generate_dataset, image_seed
from .score import score_dataset
from .shards import Shards, process_share

__all__ = [
    "EvaluationJob",
    "Shards",
    "generate_dataset",
    "image_seed",
    "process_share",
    "run_evaluation",
    "score_dataset",
]
