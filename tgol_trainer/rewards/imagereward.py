"""ImageReward: human preference from BLIP, a text encoder that looks at the image, and a linear head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import build, find_file, linear_head, load_tokenizer, read_weights
from .clip import colour_values, normalised, rgb, same_number

# Mean and standard deviation of the head's output on the authors' calibration data.
_MEAN = 0.16717362830052426
_STD = 1.0333394966054072
_MAX_TOKENS = 35

_VISION = (
    (re.compile(r"cls_token"), "embeddings.class_embedding"),
    (re.compile(r"pos_embed"), "embeddings.position_embedding"),
    (re.compile(r"patch_embed\.proj\.(weight|bias)"), r"embeddings.patch_embedding.\1"),
    (re.compile(r"norm\.(weight|bias)"), r"post_layernorm.\1"),
    (re.compile(r"blocks\.(\d+)\.norm([12])\.(weight|bias)"), r"encoder.layers.\1.layer_norm\2.\3"),
    (re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)"), r"encoder.layers.\1.self_attn.qkv.\2"),
    (re.compile(r"blocks\.(\d+)\.attn\.proj\.(weight|bias)"), r"encoder.layers.\1.self_attn.projection.\2"),
    (re.compile(r"blocks\.(\d+)\.mlp\.(fc[12])\.(weight|bias)"), r"encoder.layers.\1.mlp.\2.\3"),
)
_UNUSED = re.compile(r"blip\.(text_encoder\.embeddings\.position_ids|(vision|text)_proj\.(weight|bias))")


def image_reward_to_transformers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename the published weights to those of [`ImageRewardModel`], and drop the ones that play no part in the score.

    Args:
        weights (`Mapping[str, torch.Tensor]`):
            By the names of `ImageReward.pt`, of any size and number of layers.

    Returns:
        `dict[str, torch.Tensor]`: a name that is not known stays as it is.
    """
    renamed = {}
    for name, tensor in weights.items():
        if _UNUSED.fullmatch(name):
            continue
        new = name
        if name.startswith("blip.text_encoder."):
            new = "text." + name.removeprefix("blip.text_encoder.")
        elif name.startswith("mlp.layers."):
            new = "mlp." + name.removeprefix("mlp.layers.")
        elif name.startswith("blip.visual_encoder."):
            rest = name.removeprefix("blip.visual_encoder.")
            for pattern, replacement in _VISION:
                if match := pattern.fullmatch(rest):
                    new = "vision." + match.expand(replacement)
        renamed[new] = tensor
    return renamed


def blip_configs() -> tuple[Any, Any]:
    """Return the `BlipVisionConfig` (ViT-L/16) and the `BlipTextConfig` (BERT base) of the published weights."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        patch_size=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        vocab_size=30524,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
    )
    return vision, text


class ImageRewardModel(torch.nn.Module):
    """
    BLIP's vision tower, its text encoder with cross-attention, and the head.

    Args:
        vision_config (`BlipVisionConfig`):
            Sizes of the vision tower.
        text_config (`BlipTextConfig`):
            Sizes of the text encoder.
    """

    def __init__(self, vision_config: Any, text_config: Any) -> None:
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        self.mlp = linear_head(text_config.hidden_size)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Return the head's output.

        Args:
            pixels (`torch.Tensor`):
                (n, 3, side, side), normalised.
            ids (`torch.Tensor`):
                (n, length) token ids.
            mask (`torch.Tensor`):
                (n, length), 1 for a token and 0 for padding.

        Returns:
            `torch.Tensor`: (n,), fp32.
        """
        image = self.vision(pixel_values=pixels).last_hidden_state
        # The call's own default `is_decoder=False` keeps attention in both directions; the configuration's `True` is
        # what gives the model its cross-attention.
        hidden = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        return self.mlp(hidden[:, 0].float())[:, 0]


class ImageReward:
    """
    ImageReward: a learned human preference, about 0 ± 1 over its calibration data. Prompts are cut at 35 tokens.

    Source: Xu et al., 2023, "ImageReward" (arXiv 2304.05977).

    Args:
        model ([`ImageRewardModel`]):
            On the device and in the dtype to compute with; its head in fp32. It is put in evaluation mode.
        tokenizer (`BertTokenizer`):
            Of the prompts.
        facts ([`RewardFacts`], *optional*):
            What the scores are.
    """

    default_source: ClassVar[str] = "zai-org/ImageReward"
    name: ClassVar[str] = "imagereward"
    scale: ClassVar[str] = "standardised, about -2.3 to 2, higher is better"

    def __init__(self, model: ImageRewardModel, tokenizer: Any, *, facts: RewardFacts | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.facts = facts or RewardFacts(self.name, scale=self.scale)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        filename: str = "ImageReward.pt",
        tokenizer: str | Path = "google-bert/bert-base-uncased",
        configs: tuple[Any, Any] | None = None,
    ) -> ImageReward:
        """
        Load the published weights.

        Args:
            source (`str` or `Path`, *optional*):
                Hub repository, folder or file; `zai-org/ImageReward` by default.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository of the weights.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where to compute.
            dtype (`torch.dtype`, *optional*):
                Of the two towers; `torch.float32` by default. The head stays in fp32.
            filename (`str`, *optional*, defaults to `"ImageReward.pt"`):
                Name of the weights in the repository or the folder.
            tokenizer (`str` or `Path`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
                Repository or folder of the tokenizer.
            configs (`tuple`, *optional*):
                `BlipVisionConfig` and `BlipTextConfig`; those of the published weights by default.

        Returns:
            [`ImageReward`]

        Raises:
            ValueError: if the file does not hold exactly the weights of this model, or the tokenizer does not fit.
            OSError: if a file cannot be had.
        """
        from transformers import BertTokenizer

        source = str(source or cls.default_source)
        path, commit = find_file(source, filename, revision=revision)
        sizes = configs or blip_configs()
        # The authors add two tokens to BERT's that no prompt uses.
        words = load_tokenizer(BertTokenizer, tokenizer, [sizes[1].vocab_size - 2, sizes[1].vocab_size])
        weights = image_reward_to_transformers(read_weights(path))
        model = build(lambda: ImageRewardModel(*sizes), weights, path).to(device)
        model.vision.to(dtype or torch.float32)
        model.text.to(dtype or torch.float32)
        model.mlp.float()
        facts = RewardFacts(cls.name, source, commit, cls.scale)
        return cls(model, words, facts=facts)

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str], /) -> list[float | None]:
        """Return one score an image, as [`RewardFunction`] says."""
        same_number(images, prompts)
        if not images:
            return []
        like, side = next(self.model.vision.parameters()), self.model.vision.config.image_size
        squares = torch.stack([colour_values(_centre(image, side)) for image in rgb(images)])
        pixels = normalised(squares / 255).to(like.device, like.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        raw = self.model(pixels, tokens["input_ids"].to(like.device), tokens["attention_mask"].to(like.device))
        return ((raw.double() - _MEAN) / _STD).tolist()


def _centre(image: Image.Image, side: int) -> Image.Image:
    """
    Resize the shortest side and crop the centre as the authors' code does by torchvision, which rounds the margin half
    to even where transformers rounds it down.
    """
    short = min(image.size)
    width, height = (side if length == short else int(side * length / short) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))
