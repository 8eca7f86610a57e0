"""Do long work over many rows in shards that survive a kill: generate images, score them, compare models."""

from tgol_trainer.sources.shards import read_rewards

from .evaluate import EvaluationJob, run_evaluation
from .generate import GenerationSettings, generate_dataset, image_seed
from .loading import load_adapted_pipeline, process_device
from .publish import carry_rewards, check_complete, check_source_complete, note_source, push_dataset, wait_for_shards
from .score import ScoringSettings, check_medium, score_dataset
from .score_stream import score_stream
from .shards import Shards, process_share

__all__ = [
    "EvaluationJob",
    "GenerationSettings",
    "ScoringSettings",
    "Shards",
    "carry_rewards",
    "check_complete",
    "check_medium",
    "check_source_complete",
    "generate_dataset",
    "image_seed",
    "load_adapted_pipeline",
    "note_source",
    "process_device",
    "process_share",
    "push_dataset",
    "read_rewards",
    "run_evaluation",
    "score_dataset",
    "score_stream",
    "wait_for_shards",
]
