"""Read datasets and prompts from the Hub, folders and files."""

from .loading import load_scored_dataset
from .prompts import PROMPT_SETS, Prompts, load_prompts, prompt_set

__all__ = ["PROMPT_SETS", "Prompts", "load_prompts", "load_scored_dataset", "prompt_set"]
