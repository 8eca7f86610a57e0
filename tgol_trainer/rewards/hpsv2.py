"""Score images by HPSv2.1, a CLIP trained on human preferences whose published weights have OpenCLIP's names."""

from __future__ import annotations

import hashlib
import html
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import build, find_file, load_tokenizer, read_weights
from .clip import ClipReward
from .pixels import colour_values, normalised, resized

logger = logging.getLogger(__name__)

# Bytes and first digits of the SHA-256 of HPS_v2_compressed.pt, and of HPS_v2_1.pt in the authors' Space.
_VERSION_2_0 = (1_972_484_501, "07cb0d20")

_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_NAMES = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",  # so spelt in transformers
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_TRANSPOSED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def open_clip_to_transformers(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the weights of an OpenCLIP model of any size to those of `CLIPModel`; unknown names stay as they are."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        block = _BLOCK.fullmatch(name)
        if name in _TRANSPOSED:
            renamed[_TRANSPOSED[name]] = tensor.T.contiguous()
        elif block is None:
            renamed[_NAMES.get(name, name)] = tensor
        else:
            tower = "vision_model" if block[1] else "text_model"
            prefix, rest = f"{tower}.encoder.layers.{block[2]}", block[3]
            module, _, kind = rest.rpartition(".")
            if rest in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = rest.removeprefix("attn.in_proj_")
                for part, values in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{prefix}.self_attn.{part}_proj.{kind}"] = values
            else:
                renamed[f"{prefix}.{_IN_BLOCK[module]}.{kind}" if module in _IN_BLOCK else name] = tensor
    return renamed


def vit_h_14() -> Any:
    """Return the `CLIPConfig` of OpenCLIP's ViT-H/14."""
    from transformers import CLIPConfig

    both = {"num_attention_heads": 16, "hidden_act": "gelu", "projection_dim": 1024}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
    tokens = {"max_position_embeddings": 77, "vocab_size": 49408, "bos_token_id": 49406, "eos_token_id": 49407}
    return CLIPConfig(
        text_config={**both, **text, **tokens},
        vision_config={**both, **vision, "patch_size": 14, "image_size": 224},
        projection_dim=1024,
    )


class HPSv2(ClipReward):
    """
    HPSv2.1: the cosine between an image and its prompt in a CLIP ViT-H/14 trained on human preferences.

    The longest side of an image is resized to the model's size (bicubic with antialiasing) and the rest is padded with
    black, so nothing is cropped. The authors' code leaves antialiasing to torchvision, where it has been the default
    since version 0.17; scores made with older versions differ a little. Prompts are cleaned with `ftfy` where it is
    installed. Scores can be compared within one prompt; those of v2.0 are on another scale.

    Source: Wu et al., 2023, "Human Preference Score v2" (arXiv 2306.09341), without the factor 100 of its tables.
    """

    default_source = "xswu/HPSv2"
    name = "hpsv2.1"
    scale = "version 2.1, cosine, higher is better"

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any = None, *, facts: RewardFacts | None = None
    ) -> None:
        super().__init__(model, tokenizer, image_processor, facts=facts)
        self._fix_text: Callable[[str], str] = str
        try:
            from ftfy import fix_text

            self._fix_text = fix_text
        except ImportError:
            logger.warning(
                "ftfy is not installed: prompts with broken or unusual characters can get other tokens than in the "
                "reference code of HPSv2 (`pip install ftfy`)."
            )

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        filename: str = "HPS_v2.1_compressed.pt",
        tokenizer: str | Path = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        config: Any = None,
    ) -> HPSv2:
        """
        Load the published weights.

        Args:
            source, revision, device, dtype:
                As in [`ModelReward.from_pretrained`]; `source` is `xswu/HPSv2` by default.
            filename (`str`, *optional*, defaults to `"HPS_v2.1_compressed.pt"`):
                Name of the weights in the repository or the folder.
            tokenizer (`str` or `Path`, *optional*):
                Repository or folder of the tokenizer, which does not come with the weights. Any CLIP tokenizer with
                the usual 49408 tokens fits; `laion/CLIP-ViT-H-14-laion2B-s32B-b79K` by default.
            config (`CLIPConfig`, *optional*): Sizes of the model; ViT-H/14 by default.

        Returns:
            [`HPSv2`]

        Raises:
            ValueError, OSError: as [`ModelReward.from_pretrained`]; and `ValueError` for the weights of version 2.0.
        """
        from transformers import CLIPModel, CLIPTokenizer

        source = str(source or cls.default_source)
        path, commit = find_file(source, filename, revision=revision)
        _refuse_version_2_0(path)
        sizes = config or vit_h_14()
        words = load_tokenizer(CLIPTokenizer, tokenizer, [sizes.text_config.vocab_size])
        model = build(lambda: CLIPModel(sizes), open_clip_to_transformers(read_weights(path)), path)
        facts = RewardFacts(cls.name, source, commit, cls.scale)
        return cls(model.to(device, dtype or torch.float32), words, facts=facts)

    def _clean(self, prompt: str) -> str:
        # Twice, as in the reference; the tokenizer turns capitals into lower case.
        return " ".join(html.unescape(html.unescape(self._fix_text(prompt))).split())

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return padded_pixels(images, self.model.config.vision_config.image_size)


def _refuse_version_2_0(path: Path) -> None:
    """Raise a `ValueError` for the weights of HPSv2.0, which would load; the authors' Space calls them v2_1."""
    size, digest = _VERSION_2_0
    if path.stat().st_size != size:
        return
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    if found.hexdigest().startswith(digest):
        raise ValueError(
            f"{path} holds HPSv2.0, as its checksum shows, and its scores are on another scale. Use "
            "HPS_v2.1_compressed.pt of xswu/HPSv2."
        )


def padded_pixels(images: list[Image.Image], size: int) -> torch.Tensor:
    """
    Return RGB images as the reference code of HPSv2 prepares them: (len(images), 3, size, size), fp32, normalised.

    The longest side fills the square, and the rest is black.
    """
    squares = torch.zeros(len(images), 3, size, size)
    for square, image in zip(squares, images, strict=True):
        scale = size / max(image.size)  # computed first, as in the reference: it decides how halves are rounded
        height, width = (max(1, round(side * scale)) for side in (image.height, image.width))
        top, left = (size - height) // 2, (size - width) // 2
        pixels = resized(colour_values(image) / 255, (height, width))
        square[:, top : top + height, left : left + width] = pixels
    return normalised(squares)
