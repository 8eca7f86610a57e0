"""Score images by the cosine of CLIP features of an image and its prompt: CLIP score and PickScore."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import find_file, load_model, load_part, load_tokenizer
from .model import ModelReward
from .pixels import rgb

_CACHED_PROMPTS = 1024


class ClipReward(ModelReward):
    """
    Cosine of the CLIP features of an image and its prompt, times a factor: the base of the rewards of this kind.

    Features are normalised and multiplied in fp32 whatever the dtype of the model: in half precision the steps between
    scores would be as large as differences between images. A prompt is encoded once, however many images it has,
    and the features of the last 1024 prompts are kept.

    Args:
        model (`CLIPModel`): Both towers, on the device and in the dtype to compute with. It is put in evaluation mode.
        tokenizer (`CLIPTokenizer`): Its tokenizer. Prompts are cut to the model's length, and the end token is kept.
        image_processor (`CLIPImageProcessor`, *optional*): Its image processor. [`HPSv2`] needs none.
        facts ([`RewardFacts`], *optional*): What the scores are; the class's, without a revision, by default.
    """

    factor: float = 1.0
    """Factor of the cosine."""

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any = None, *, facts: RewardFacts | None = None
    ) -> None:
        super().__init__(facts)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self._cache: OrderedDict[str, torch.Tensor] = OrderedDict()

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> ClipReward:
        """
        Load the model, its tokenizer and its image processor.

        Args:
            source, revision, device, dtype:
                As in [`ModelReward.from_pretrained`]; `source` has the format of transformers and is not a file.

        Returns:
            The reward.

        Raises:
            ValueError, OSError: as [`ModelReward.from_pretrained`].
        """
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        source = str(source or cls.default_source)
        _, commit = find_file(source, "config.json", revision=revision)
        revision = commit or revision  # the same for all files
        model = load_model(CLIPModel, source, revision=revision, dtype=torch.float32)
        sizes = [model.config.text_config.vocab_size]
        tokenizer = load_tokenizer(CLIPTokenizer, source, sizes, argument="source", revision=revision)
        # The one on PIL: its pixels are those of the reference code.
        processor = load_part(CLIPImageProcessorPil, source, revision=revision)
        reward = cls(model, tokenizer, processor, facts=RewardFacts(cls.name, source, commit, cls.scale))
        reward.model.to(device, dtype or torch.float32)  # after the factor was read
        return reward

    def _scores(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        cosines = (self.image_features(images) * self._texts(prompts)).sum(dim=-1)
        return (cosines.double() * self.factor).tolist()

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        """Return features of length 1, (n, D) float32, of n images."""
        like = self.model.visual_projection.weight
        pixels = self._pixels(rgb(images)).to(like.device, like.dtype)
        return _unit(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    def _clean(self, prompt: str) -> str:
        """Return the prompt as the tokenizer gets it."""
        return prompt

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """Return normalised pixels of RGB images."""
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def _texts(self, prompts: list[str]) -> torch.Tensor:
        """Return one feature of length 1 per prompt, from the cache where it holds the prompt."""
        unique = list(dict.fromkeys(prompts))
        new = [prompt for prompt in unique if prompt not in self._cache]
        if new:
            self._cache.update(zip(new, self._encode([self._clean(prompt) for prompt in new]), strict=True))
        features = torch.stack([self._cache[prompt] for prompt in prompts])
        for prompt in unique:
            self._cache.move_to_end(prompt)
        while len(self._cache) > _CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return features

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        # No mask: attention is causal and the feature is read at the end token, so padding cannot reach it.
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        ids = tokens["input_ids"].to(self.model.text_projection.weight.device)
        return _unit(self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output))


class ClipScore(ClipReward):
    """
    CLIP score: 100 times the cosine between an image and its prompt, not clamped at 0.

    Source: Hessel et al., 2021, "CLIPScore" (arXiv 2104.08718), without its factor 2.5 and its prefix. The backbone is
    that of the evaluations of Diffusion-DPO and its successors (OpenCLIP ViT-H/14 trained on LAION-2B). The code of
    Diffusion-DPO returns the cosine without the factor 100. Scores of different backbones are not comparable.
    """

    default_source = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    name = "clip"
    scale = "100 * cosine, higher is better"
    factor = 100.0


class PickScore(ClipReward):
    """
    PickScore: the cosine between an image and its prompt times the model's learned factor, near 100.

    Source: Kirstain et al., 2023, "Pick-a-Pic" (arXiv 2305.01569). Some codes divide it by 26 or leave the factor out;
    here it is as in the authors' example.
    """

    default_source = "yuvalkirstain/PickScore_v1"
    name = "pickscore"
    scale = "exp(logit_scale) * cosine, higher is better"

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any = None, *, facts: RewardFacts | None = None
    ) -> None:
        super().__init__(model, tokenizer, image_processor, facts=facts)
        # Read now, in fp32: rounded to bfloat16 it would lower every score by 1 %.
        self.factor = float(model.logit_scale.double().exp())


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
