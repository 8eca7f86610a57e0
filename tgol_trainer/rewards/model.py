"""Define what the rewards that load a model share: facts, arguments of `from_pretrained`, a call with RGB images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from .base import RewardFacts, check_prompts
from .pixels import rgb


class ModelReward:
    """
    Base of the rewards that load a model; a subclass computes the scores of a batch in `_scores`.

    Args:
        facts ([`RewardFacts`], *optional*): What the scores are; the class's `name` and `scale` by default.
    """

    default_source: ClassVar[str] = ""
    name: ClassVar[str] = ""
    scale: ClassVar[str] = ""

    def __init__(self, facts: RewardFacts | None = None) -> None:
        self.facts = facts or RewardFacts(self.name, scale=self.scale)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Any:
        """
        Load the published weights.

        Args:
            source (`str` or `Path`, *optional*):
                Hub repository, folder or file of the weights; the class's `default_source` by default.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where to compute.
            dtype (`torch.dtype`, *optional*): Of the model; `torch.float32` by default. Linear heads stay in fp32.

        Returns:
            The reward.

        Raises:
            ValueError: if a file does not hold exactly the weights of the model, or the tokenizer does not fit them.
            OSError: if a file cannot be found or downloaded.
        """
        raise NotImplementedError

    @torch.no_grad()
    def __call__(self, images: list[Any], prompts: list[str], /) -> list[float | None]:
        """Return one score per image, as [`RewardFunction`] says."""
        check_prompts(images, prompts)
        return self._scores(rgb(images), prompts) if images else []

    def _scores(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        """Return one score per RGB image."""
        raise NotImplementedError
