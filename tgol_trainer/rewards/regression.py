"""Score images by a checkpoint of transformers that classifies images, or puts one number on each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import load_model, load_part
from .model import ModelReward


class Regression(ModelReward):
    """
    The one output of an image classifier, or the probability of one of its labels. Prompts are not used.

    Args:
        model (`PreTrainedModel`): An image classifier of transformers. It is put in evaluation mode.
        image_processor (`BaseImageProcessor`): Its image processor.
        label (`str`, *optional*): The label whose probability is the score, for a model with several.
        facts ([`RewardFacts`], *optional*): What the scores are.

    Raises:
        ValueError: for no label of a model that has several, and for one that it does not have.
    """

    name = "regression"
    scale = "output of a regression head; the prompt is not used"

    def __init__(
        self, model: Any, image_processor: Any, label: str | None = None, facts: RewardFacts | None = None
    ) -> None:
        super().__init__(facts)
        labels = [model.config.id2label[index] for index in range(model.config.num_labels)]
        if len(labels) == 1 and label is not None:
            raise ValueError(f"`label`: the model has one output, which is the score. Leave {label!r} out.")
        if len(labels) > 1 and label not in labels:
            raise ValueError(
                f"`label` is {label!r}. The model has no regression head but tells {len(labels)} labels apart "
                f"({', '.join(labels[:10])}{', ...' if len(labels) > 10 else ''}): name the one whose probability is "
                "the score."
            )
        self.model = model.eval().requires_grad_(False)
        self.image_processor, self.index = image_processor, None if label is None else labels.index(label)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        label: str | None = None,
    ) -> Regression:
        """
        Load the model and its image processor. Code of a repository is not run.

        Args:
            source, revision, device, dtype:
                As in [`ModelReward.from_pretrained`]; there is no default source.
            label (`str`, *optional*): The label whose probability is the score, for a model with several.

        Returns:
            [`Regression`]

        Raises:
            ValueError, OSError: as [`ModelReward.from_pretrained`]; for a model that is no image classifier.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        if source is None:
            raise ValueError("`source` is needed: the Hub repository or folder of an image classifier.")
        source = str(source)
        model = load_model(AutoModelForImageClassification, source, revision=revision)
        processor = load_part(AutoImageProcessor, source, revision=revision)
        scale = cls.scale if label is None else f"probability of the label {label!r}; the prompt is not used"
        commit = getattr(model.config, "_commit_hash", None) or revision
        model.to(device, dtype or torch.float32)
        return cls(model, processor, label, RewardFacts(cls.name, source, commit, scale))

    def _scores(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        like = next(self.model.parameters())
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"].to(like.device, like.dtype)
        outputs = self.model(pixel_values=pixels).logits.float()
        scores = outputs[:, 0] if self.index is None else outputs.softmax(dim=-1)[:, self.index]
        return scores.double().tolist()
