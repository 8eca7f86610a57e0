"""LAION's aesthetic predictor: how an image is rated on its own, from its CLIP feature and a linear head."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import build, find_file, from_pretrained, linear_head, load_strictly, read_weights
from .clip import rgb, same_number


def without_prefix(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename `layers.0.weight` and so on to `0.weight`.

    Args:
        weights (`Mapping[str, torch.Tensor]`):
            Weights of the head; copies of it are published with and without the prefix.

    Returns:
        `dict[str, torch.Tensor]`
    """
    return {name.removeprefix("layers."): tensor for name, tensor in weights.items()}


class AestheticScore:
    """
    LAION aesthetic score, version 2: nominally 1 to 10, mostly between 4 and 7.5. The prompt plays no part.

    Source: Schuhmann, "improved-aesthetic-predictor" (2022), weights `sac+logos+ava1-l14-linearMSE`; the aesthetic
    reward of DDPO (arXiv 2305.13301). Versions 1 and 2.5 have other scales.

    Args:
        vision (`CLIPVisionModelWithProjection`):
            CLIP's vision tower, on the device and in the dtype to compute with. It is put in evaluation mode.
        head (`torch.nn.Module`):
            From the feature of length 1 to the score; in fp32.
        image_processor (`CLIPImageProcessor`):
            Of the tower.
        facts ([`RewardFacts`], *optional*):
            What the scores are.
    """

    default_source: ClassVar[str] = "ttj/sac-logos-ava1-l14-linearMSE"
    name: ClassVar[str] = "aesthetic"
    scale: ClassVar[str] = "version 2, 1 to 10, higher is better"

    def __init__(
        self, vision: Any, head: torch.nn.Module, image_processor: Any, *, facts: RewardFacts | None = None
    ) -> None:
        self.vision = vision.eval().requires_grad_(False)
        self.head = head.eval().requires_grad_(False)
        self.image_processor = image_processor
        self.facts = facts or RewardFacts(self.name, scale=self.scale)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        filename: str = "model.safetensors",
        backbone: str | Path = "openai/clip-vit-large-patch14",
        backbone_revision: str | None = None,
    ) -> AestheticScore:
        """
        Load the head and the vision tower it was trained on.

        Args:
            source (`str` or `Path`, *optional*):
                Hub repository, folder or file of the head; `ttj/sac-logos-ava1-l14-linearMSE` by default. The author's
                own `sac+logos+ava1-l14-linearMSE.pth` is read too.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository of the head.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where to compute.
            dtype (`torch.dtype`, *optional*):
                Of the vision tower; `torch.float32` by default. The head stays in fp32.
            filename (`str`, *optional*, defaults to `"model.safetensors"`):
                Name of the head's weights in the repository or the folder.
            backbone (`str` or `Path`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
                Repository or folder of the vision tower and its image processor.
            backbone_revision (`str`, *optional*):
                Branch, tag or commit of it.

        Returns:
            [`AestheticScore`]

        Raises:
            ValueError: if a file does not hold exactly the weights of the head, or of the tower.
            OSError: if a file cannot be had.
        """
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        source, backbone = str(source or cls.default_source), str(backbone)
        path, commit = find_file(source, filename, revision=revision)
        weights = without_prefix(read_weights(path))
        _, of_backbone = find_file(backbone, "config.json", revision=backbone_revision, argument="backbone")
        backbone_revision = of_backbone or backbone_revision
        vision = load_strictly(
            CLIPVisionModelWithProjection,
            backbone,
            argument="backbone",
            unused=r"text_model\.|text_projection\.|logit_scale$",
            revision=backbone_revision,
            dtype=dtype or torch.float32,
        )
        head = build(lambda: linear_head(vision.config.projection_dim), weights, path).to(device, torch.float32)
        processor = from_pretrained(CLIPImageProcessorPil, backbone, argument="backbone", revision=backbone_revision)
        facts = RewardFacts(
            cls.name,
            f"{source} on {backbone}",
            f"{commit or 'unknown'} on {of_backbone or 'unknown'}" if commit or of_backbone else None,
            cls.scale,
        )
        return cls(vision.to(device), head, processor, facts=facts)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str], /) -> list[float | None]:
        """Return one score an image, as [`RewardFunction`] says."""
        same_number(images, prompts)
        if not images:
            return []
        like = next(self.vision.parameters())
        pixels = self.image_processor(rgb(images), return_tensors="pt")["pixel_values"].to(like.device, like.dtype)
        features = self.vision(pixel_values=pixels).image_embeds.float()
        return self.head(torch.nn.functional.normalize(features, dim=-1))[:, 0].tolist()
