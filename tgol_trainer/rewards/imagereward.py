"""Score images by ImageReward: BLIP, whose text encoder attends to the image, and a linear head."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import build, find_file, linear_head, load_tokenizer, read_weights
from .model import ModelReward
from .pixels import colour_values, normalised

# Mean and standard deviation of the head's output on the authors' calibration data.
_MEAN = 0.16717362830052426
_STD = 1.0333394966054072
_MAX_TOKENS = 35

_UNUSED = re.compile(r"blip\.(text_encoder\.embeddings\.position_ids|(vision|text)_proj\.(weight|bias))")
_NAMES = {
    r"blip\.text_encoder\.(.+)": r"text.\1",
    r"mlp\.layers\.(.+)": r"mlp.\1",
    r"blip\.visual_encoder\.cls_token": "vision.embeddings.class_embedding",
    r"blip\.visual_encoder\.pos_embed": "vision.embeddings.position_embedding",
    r"blip\.visual_encoder\.patch_embed\.proj\.(\w+)": r"vision.embeddings.patch_embedding.\1",
    r"blip\.visual_encoder\.norm\.(\w+)": r"vision.post_layernorm.\1",
    r"blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.(\w+)": r"vision.encoder.layers.\1.layer_norm\2.\3",
    r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.(\w+)": r"vision.encoder.layers.\1.self_attn.qkv.\2",
    r"blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.(\w+)": r"vision.encoder.layers.\1.self_attn.projection.\2",
    r"blip\.visual_encoder\.blocks\.(\d+)\.mlp\.(fc[12])\.(\w+)": r"vision.encoder.layers.\1.mlp.\2.\3",
}


def image_reward_to_transformers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """
    Rename the weights of `ImageReward.pt`, of any size, to those of [`ImageRewardModel`]; unknown names stay.

    Weights that the score does not use are dropped.
    """
    renamed = {}
    for name, tensor in weights.items():
        if _UNUSED.fullmatch(name):
            continue
        for pattern, new in _NAMES.items():
            if match := re.fullmatch(pattern, name):
                name = match.expand(new)
                break
        renamed[name] = tensor
    return renamed


def blip_configs() -> tuple[Any, Any]:
    """Return the `BlipVisionConfig` (ViT-L/16) and the `BlipTextConfig` (BERT base) of the published weights."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    text = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    text |= {"encoder_hidden_size": 1024, "max_position_embeddings": 512, "vocab_size": 30524}
    return (
        BlipVisionConfig(**vision, image_size=224, patch_size=16, hidden_act="gelu", layer_norm_eps=1e-6),
        BlipTextConfig(**text, hidden_act="gelu", layer_norm_eps=1e-12),
    )


class ImageRewardModel(torch.nn.Module):
    """
    BLIP's vision tower, its text encoder with cross-attention, and the head.

    Sizes are those of a `BlipVisionConfig` and a `BlipTextConfig`.
    """

    def __init__(self, vision_config: Any, text_config: Any) -> None:
        super().__init__()
        from transformers import BlipTextModel, BlipVisionModel

        self.vision = BlipVisionModel(vision_config)
        self.text = BlipTextModel(text_config, add_pooling_layer=False)
        self.mlp = linear_head(text_config.hidden_size)

    def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """
        Return the head's output, (n,) in fp32.

        `pixels` are normalised, (n, 3, side, side); `ids` are (n, length) token ids, and `mask` is 0 for padding.
        """
        image = self.vision(pixel_values=pixels).last_hidden_state
        # The call's default `is_decoder=False` keeps attention in both directions, while the configuration's `True`
        # gives the model its cross-attention.
        hidden = self.text(input_ids=ids, attention_mask=mask, encoder_hidden_states=image).last_hidden_state
        return self.mlp(hidden[:, 0].float())[:, 0]


class ImageReward(ModelReward):
    """
    ImageReward: a learned human preference, about 0 ± 1 over its calibration data. Prompts are cut at 35 tokens.

    Source: Xu et al., 2023, "ImageReward" (arXiv 2304.05977).

    Args:
        model ([`ImageRewardModel`]):
            On the device and in the dtype to compute with; its head in fp32. It is put in evaluation mode.
        tokenizer (`BertTokenizer`): Of the prompts.
        facts ([`RewardFacts`], *optional*): What the scores are.
    """

    default_source = "zai-org/ImageReward"
    name = "imagereward"
    scale = "standardised, about -2.3 to 2, higher is better"

    def __init__(self, model: ImageRewardModel, tokenizer: Any, *, facts: RewardFacts | None = None) -> None:
        super().__init__(facts)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

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
            source, revision, device, dtype:
                As in [`ModelReward.from_pretrained`]; `source` is `zai-org/ImageReward` by default.
            filename (`str`, *optional*, defaults to `"ImageReward.pt"`):
                Name of the weights in the repository or the folder.
            tokenizer (`str` or `Path`, *optional*, defaults to `"google-bert/bert-base-uncased"`):
                Repository or folder of the tokenizer.
            configs (`tuple`, *optional*):
                `BlipVisionConfig` and `BlipTextConfig`; those of the published weights by default.

        Returns:
            [`ImageReward`]

        Raises:
            ValueError, OSError: as [`ModelReward.from_pretrained`].
        """
        from transformers import BertTokenizer

        source = str(source or cls.default_source)
        path, commit = find_file(source, filename, revision=revision)
        sizes = configs or blip_configs()
        # The authors add two tokens to BERT's, which no prompt uses.
        words = load_tokenizer(BertTokenizer, tokenizer, [sizes[1].vocab_size - 2, sizes[1].vocab_size])
        weights = image_reward_to_transformers(read_weights(path))
        model = build(lambda: ImageRewardModel(*sizes), weights, path).to(device)
        model.vision.to(dtype or torch.float32)
        model.text.to(dtype or torch.float32)
        model.mlp.float()
        return cls(model, words, facts=RewardFacts(cls.name, source, commit, cls.scale))

    def _scores(self, images: list[Image.Image], prompts: list[str]) -> list[float | None]:
        like, side = next(self.model.vision.parameters()), self.model.vision.config.image_size
        squares = torch.stack([colour_values(_centre(image, side)) for image in images])
        pixels = normalised(squares / 255).to(like.device, like.dtype)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=_MAX_TOKENS, return_tensors="pt"
        )
        raw = self.model(pixels, tokens["input_ids"].to(like.device), tokens["attention_mask"].to(like.device))
        return ((raw.double() - _MEAN) / _STD).tolist()


def _centre(image: Image.Image, side: int) -> Image.Image:
    """Resize the shortest side and crop the centre as torchvision does: it rounds half a margin to even, not down."""
    short = min(image.size)
    width, height = (side if length == short else int(side * length / short) for length in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))
