"""HPSv2.1: agreement with human preferences, from a fine-tuned CLIP whose published weights have OpenCLIP's names."""

from __future__ import annotations

import hashlib
import html
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .base import RewardFacts
from .checkpoints import build, find_file, load_tokenizer, read_weights
from .clip import ClipReward, colour_values, normalised

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
    """
    Rename the weights of an OpenCLIP model to those of `CLIPModel`.

    Args:
        weights (`Mapping[str, torch.Tensor]`):
            By OpenCLIP's names, of any size and number of layers.

    Returns:
        `dict[str, torch.Tensor]`: by the names of transformers; a name that is not known stays as it is.
    """
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

    vision = {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    }
    text = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 77,
        "vocab_size": 49408,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


class HPSv2(ClipReward):
    """
    HPSv2.1: the cosine between an image and its prompt in a CLIP ViT-H/14 trained on human preferences.

    Images are shrunk or enlarged to the model's size at their longest side (bicubic with antialiasing) and padded
    with black, so nothing is cropped. The authors' code leaves antialiasing to torchvision, where it has been the
    default since version 0.17; numbers made with older versions differ a little. Prompts are cleaned with `ftfy` where
    it is installed. Scores of one prompt can be compared; those of v2.0 are on another scale.

    Source: Wu et al., 2023, "Human Preference Score v2" (arXiv 2306.09341), without the factor 100 of its tables.
    """

    default_source = "xswu/HPSv2"
    name = "hpsv2.1"
    scale = "version 2.1, cosine, higher is better"

    def __init__(
        self, model: Any, tokenizer: Any, image_processor: Any = None, *, facts: RewardFacts | None = None
    ) -> None:
        super().__init__(model, tokenizer, image_processor, facts=facts)
        try:
            from ftfy import fix_text
        except ImportError:
            logger.warning(
                "ftfy is not installed: prompts with broken or unusual characters can get other tokens than in the "
                "reference code of HPSv2 (`pip install ftfy`)."
            )
            self._fix_text = None
        else:
            self._fix_text = fix_text

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
            source (`str` or `Path`, *optional*):
                Hub repository, folder or file; `xswu/HPSv2` by default.
            revision (`str`, *optional*):
                Branch, tag or commit of the repository of the weights.
            device (`str` or `torch.device`, *optional*, defaults to `"cpu"`):
                Where to compute.
            dtype (`torch.dtype`, *optional*):
                Of the model; `torch.float32` by default.
            filename (`str`, *optional*, defaults to `"HPS_v2.1_compressed.pt"`):
                Name of the weights in the repository or the folder.
            tokenizer (`str` or `Path`, *optional*):
                Repository or folder of the tokenizer, which the weights come without. Any CLIP tokenizer with the
                usual 49408 tokens does.
            config (`CLIPConfig`, *optional*):
                Sizes of the model; ViT-H/14 by default.

        Returns:
            [`HPSv2`]

        Raises:
            ValueError: if the file does not hold exactly the weights of this model, or those of version 2.0, or the
                tokenizer does not fit.
            OSError: if a file cannot be had.
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
        fixed = self._fix_text(prompt) if self._fix_text is not None else prompt
        # Twice, as in the reference; lower case is made by the tokenizer.
        return " ".join(html.unescape(html.unescape(fixed)).split())

    def _pixels(self, images: list[Image.Image]) -> torch.Tensor:
        return padded_pixels(images, self.model.config.vision_config.image_size)


def _refuse_version_2_0(path: Path) -> None:
    """Raise a `ValueError` for the weights of HPSv2.0, which load as well; a page of the authors calls them v2_1."""
    size, digest = _VERSION_2_0
    if path.stat().st_size != size:
        return
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            found.update(block)
    if found.hexdigest().startswith(digest):
        raise ValueError(
            f"{path} holds HPSv2.0 by its checksum, whatever its name: its scores are on another scale. Take "
            "HPS_v2.1_compressed.pt of xswu/HPSv2."
        )


def padded_pixels(images: list[Image.Image], size: int) -> torch.Tensor:
    """
    Return images as the reference code of HPSv2 prepares them.

    Args:
        images (`list[PIL.Image.Image]`):
            RGB images of any size.
        size (`int`):
            Pixels a side of the result.

    Returns:
        `torch.Tensor`: (len(images), 3, size, size), fp32: the longest side fills the square, the rest is black, all
        is normalised with CLIP's mean and standard deviation.
    """
    squares = torch.zeros(len(images), 3, size, size)
    for square, image in zip(squares, images, strict=True):
        pixels = colour_values(image)[None] / 255
        scale = size / max(image.size)  # first, as in the reference: halves are rounded as they come out so
        height, width = (max(1, round(side * scale)) for side in (image.height, image.width))
        if scale != 1:
            pixels = torch.nn.functional.interpolate(
                pixels, size=(height, width), mode="bicubic", antialias=True, align_corners=False
            )
        top, left = (size - height) // 2, (size - width) // 2
        square[:, top : top + height, left : left + width] = pixels[0]
    return normalised(squares)
