"""Score images by LAION's aesthetic predictor: a linear head on the CLIP feature of the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import build, find_file, linear_head, load_model, load_part, read_weights
from .model import ModelReward


class AestheticScore(ModelReward):
    """
    LAION aesthetic score, version 2: nominally 1 to 10, mostly between 4 and 7.5. The prompt is not used.

    Source: Schuhmann, "improved-aesthetic-predictor" (2022), weights `sac+logos+ava1-l14-linearMSE`; the aesthetic
    reward of DDPO (arXiv 2305.13301). Versions 1 and 2.5 have other scales.

    Args:
        vision (`CLIPVisionModelWithProjection`):
            CLIP's vision tower, on the device and in the dtype to compute with. It is put in evaluation mode.
        head (`torch.nn.Module`): Maps the feature of length 1 to the score, in fp32.
        image_processor (`CLIPImageProcessor`): The tower's image processor.
        facts ([`RewardFacts`], *optional*): What the scores are.
    """

    default_source = "ttj/sac-logos-ava1-l14-linearMSE"
    name = "aesthetic"
    scale = "version 2, 1 to 10, higher is better"

    def __init__(
        self, vision: Any, head: torch.nn.Module, image_processor: Any, *, facts: RewardFacts | None = None
    ) -> None:
        super().__init__(facts)
        self.vision = vision.eval().requires_grad_(False)
        self.head = head.eval().requires_grad_(False)
        self.image_processor = image_processor

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
        Load the head and the vision tower that it was trained on.

        Args:
            source, revision, device, dtype:
                As in [`ModelReward.from_pretrained`]; `source` and `revision` are those of the head, and `source` is
                `ttj/sac-logos-ava1-l14-linearMSE` by default. The author's own `sac+logos+ava1-l14-linearMSE.pth` is
                read too.
            filename (`str`, *optional*, defaults to `"model.safetensors"`):
                Name of the head's weights in the repository or the folder.
            backbone (`str` or `Path`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
                Repository or folder of the vision tower and its image processor.
            backbone_revision (`str`, *optional*): Branch, tag or commit of the repository of the vision tower.

        Returns:
            [`AestheticScore`]

        Raises:
            ValueError, OSError: as [`ModelReward.from_pretrained`].
        """
        from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

        source, backbone = str(source or cls.default_source), str(backbone)
        path, commit = find_file(source, filename, revision=revision)
        # Copies of the head are published with and without the prefix.
        weights = {name.removeprefix("layers."): tensor for name, tensor in read_weights(path).items()}
        _, backbone_commit = find_file(backbone, "config.json", revision=backbone_revision, argument="backbone")
        options: dict[str, Any] = {"argument": "backbone", "revision": backbone_commit or backbone_revision}
        vision = load_model(
            CLIPVisionModelWithProjection,
            backbone,
            unused=r"text_model\.|text_projection\.|logit_scale$",
            dtype=dtype or torch.float32,
            **options,
        )
        head = build(lambda: linear_head(vision.config.projection_dim), weights, path).to(device, torch.float32)
        processor = load_part(CLIPImageProcessorPil, backbone, **options)
        commits = f"{commit or 'unknown'} on {backbone_commit or 'unknown'}" if commit or backbone_commit else None
        facts = RewardFacts(cls.name, f"{source} on {backbone}", commits, cls.scale)
        return cls(vision.to(device), head, processor, facts=facts)

    def _scores(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        like = next(self.vision.parameters())
        pixels = self.image_processor(images, return_tensors="pt")["pixel_values"].to(like.device, like.dtype)
        features = self.vision(pixel_values=pixels).image_embeds.float()
        return self.head(torch.nn.functional.normalize(features, dim=-1))[:, 0].tolist()
