"""Long work over many rows, in shards that survive a kill: making pictures, scoring pictures."""

from .generate import generate_dataset, image_seed
from .score import score_dataset
from .shards import Shards, process_share

__all__ = ["Shards", "generate_dataset", "image_seed", "process_share", "score_dataset"]
