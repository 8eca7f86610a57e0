"""Do long work over many rows in shards that survive a kill: generate images, score them, compare models."""

from tgol_trainer.sources.shards import read_rewards

from .evaluate import EvaluationJob, run_evaluation
from .evaluate_adapters import (
    BASE,
    check_adapters,
    compare_adapters,
    named_adapters,
    spread_prompts,
    trained_by_adapter,
    update_cards,
)
from .generate import GenerationSettings, generate_dataset, image_seed
from .loading import load_adapted_pipeline, load_image_features, process_device
from .publish import carry_rewards, check_complete, check_source_complete, note_source, push_dataset, wait_for_shards
from .score import ScoringSettings, score_dataset
from .score_stream import score_stream
from .shards import Shards, process_share

__all__ = [
    "BASE",
    "EvaluationJob",
    "GenerationSettings",
    "ScoringSettings",
    "Shards",
    "carry_rewards",
    "check_adapters",
    "check_complete",
    "check_source_complete",
    "compare_adapters",
    "generate_dataset",
    "image_seed",
    "load_adapted_pipeline",
    "load_image_features",
    "named_adapters",
    "note_source",
    "process_device",
    "process_share",
    "push_dataset",
    "read_rewards",
    "run_evaluation",
    "score_dataset",
    "score_stream",
    "spread_prompts",
    "trained_by_adapter",
    "update_cards",
    "wait_for_shards",
]
