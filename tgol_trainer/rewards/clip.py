"""Scores from the angle between an image and its prompt in CLIP's feature space: CLIP score and PickScore."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import find_file, from_pretrained, load_strictly, load_tokenizer

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of the colours, in 0..1, by which CLIP normalises images."""
_CACHED_PROMPTS = 1024


def rgb(images: Sequence[Image.Image]) -> list[Image.Image]:
    """Return the images in RGB; transparency is dropped."""
    return [image if image.mode == "RGB" else image.convert("RGB") for image in images]


def colour_values(image: Image.Image) -> torch.Tensor:
    """Return the pixels of an RGB image: (3, height, width), fp32, whole numbers in 0..255."""
    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return values.reshape(image.height, image.width, 3).permute(2, 0, 1).float()


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """Return pixels (..., 3, height, width) in 0..1 by CLIP's mean and standard deviation."""
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def same_number(images: Sequence[Any], prompts: Sequence[str]) -> None:
    """Raise a `ValueError` unless there is one prompt an image."""
    if len(images) != len(prompts):
        raise ValueError(f"There are {len(images)} images and {len(prompts)} prompts: pass one prompt an image.")


class ClipReward:
    """
    Cosine of the CLIP features of an image and its prompt, times a factor. Base of the rewards that compare so.

    Features are normalised and multiplied in fp32 whatever the dtype of the model: in half precision the steps between
    scores would be as large as differences between images. A prompt is encoded once, however many images it has,
    and the features of the last 1024 prompts are kept.

    Args:
        model (`CLIPModel`):
            Both towers, on the device and in the dtype to compute with. It is put in evaluation mode.
        tokenizer (`CLIPTokenizer`):
            Its tokenizer; prompts are cut to the model's length, the end token is kept.
        image_processor (`CLIPImageProcessor`, *optional*):
            Its image processor. [`HPSv2`] needs none.
        facts ([`RewardFacts`], *optional*):
            What the scores are. By default the class's, without a revision.
    """

    default_source: ClassVar[str] = ""
    name: ClassVar[str] = ""
    scale: ClassVar[str] = ""
    factor: float = 1.0
    """What the cosine is multiplied by."""

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any = None, *, facts: RewardFacts | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.facts = facts or RewardFacts(self.name, scale=self.scale)
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
            source (`str` or `Path`, *optional*):
                Hub repository or folder in the format of transformers. The class's `default_source` otherwise.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where to compute.
            dtype (`torch.dtype`, *optional*):
                Of the model; `torch.float32` by default.

        Returns:
            The reward.

        Raises:
            ValueError: if the file does not hold exactly the weights of a CLIP, or the tokenizer does not fit them.
            OSError: if a file cannot be had.
        """
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

        source = str(source or cls.default_source)
        _, commit = find_file(source, "config.json", revision=revision)
        revision = commit or revision  # of all files alike
        model = load_strictly(CLIPModel, source, revision=revision, dtype=torch.float32)
        words = [model.config.text_config.vocab_size]
        tokenizer = load_tokenizer(CLIPTokenizer, source, words, argument="source", revision=revision)
        # The one on PIL: its pixels are those of the reference code.
        processor = from_pretrained(CLIPImageProcessorPil, source, revision=revision)
        facts = RewardFacts(cls.name, source, commit, cls.scale)
        reward = cls(model, tokenizer, processor, facts=facts)
        reward.model.to(device, dtype or torch.float32)  # after the factor was read
        return reward

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str], /) -> list[float | None]:
        """Return one score an image, as [`RewardFunction`] says."""
        same_number(images, prompts)
        if not images:
            return []
        cosines = (self.image_features(images) * self._texts(prompts)).sum(dim=-1)
        return (cosines.double() * self.factor).tolist()

    @torch.no_grad()
    def image_features(self, images: list[Image.Image]) -> torch.Tensor:
        """Return features of length 1, (n, D) float32, of n images."""
        like = self.model.visual_projection.weight
        pixels = self._pixels(rgb(images)).to(like.device, like.dtype)
        return _unit(self.model.visual_projection(self.model.vision_model(pixel_values=pixels).pooler_output))

    def _clean(self, prompt: str) -> str:
        """Return the prompt as it goes to the tokenizer."""
        return prompt

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        """Return normalised pixels of RGB images."""
        return self.image_processor(images, return_tensors="pt")["pixel_values"]

    def _texts(self, prompts: list[str]) -> torch.Tensor:
        """Return one feature of length 1 a prompt, from the cache where it is there."""
        unique = dict.fromkeys(prompts)
        new = [prompt for prompt in unique if prompt not in self._cache]
        features = {prompt: self._cache[prompt] for prompt in unique if prompt in self._cache}
        if new:
            features.update(zip(new, self._encode([self._clean(prompt) for prompt in new]), strict=True))
        for prompt in unique:
            self._cache[prompt] = features[prompt]
            self._cache.move_to_end(prompt)
        while len(self._cache) > _CACHED_PROMPTS:
            self._cache.popitem(last=False)
        return torch.stack([features[prompt] for prompt in prompts])

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        # No mask: attention is causal and the feature is read at the end token, so padding cannot reach it.
        ids = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )["input_ids"]
        ids = ids.to(self.model.text_projection.weight.device)
        return _unit(self.model.text_projection(self.model.text_model(input_ids=ids).pooler_output))


class ClipScore(ClipReward):
    """
    CLIP score: 100 times the cosine between an image and its prompt, not clamped at 0.

    Source: Hessel et al., 2021, "CLIPScore" (arXiv 2104.08718), without its factor 2.5 and its prefix; backbone and
    factor as in the evaluations of Diffusion-DPO and its successors (OpenCLIP ViT-H/14 trained on LAION-2B). Scores of
    different backbones are not comparable.
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
        # Now, in fp32: rounded to bfloat16 it would lower every score by 1 %.
        self.factor = float(model.logit_scale.double().exp())


def _unit(features: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(features.float(), dim=-1)
