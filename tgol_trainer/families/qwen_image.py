"""Qwen-Image and Qwen-Image 2.1."""

from __future__ import annotations

from typing import Any

import torch

from .conditioning import Conditioning, Rows, real_tokens
from .flow import PackedFlowFamily, RowByRowFamily
from .prompts import words_of

_TOKENS = 512
"""Default of the pipeline's `max_sequence_length`, after the part of the template that it takes away."""


class QwenImageFamily(PackedFlowFamily):
    """
    `QwenImagePipeline`: Qwen2.5-VL as text encoder, a transformer over tokens of 2×2 latents.

    The autoencoder is one of videos, and an image is a clip of one frame. Each prompt has its own length.
    """

    # As diffusers' example (train_dreambooth_lora_qwen_image.py), which also draws times uniformly.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("transformer", "vae", "text_encoder", "tokenizer")
    mask_argument: str | None = "encoder_hidden_states_mask"
    one_frame = True
    time_divisor = 1000
    rows_per_image = 1  # the pass with the negative prompt, if there is one, comes after the other

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """512 tokens, less what the pipeline leaves of the template before the prompt: nothing of the real one."""
        pipeline = self.pipeline
        before = len(pipeline.tokenizer(pipeline.prompt_template_encode.split("{}")[0]).input_ids)
        return [(pipeline.tokenizer, _TOKENS - before + pipeline.prompt_template_encode_start_idx)]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D), the language model's last layer."""
        embeddings, mask = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=_TOKENS)
        return {"encoder_hidden_states": list(embeddings) if mask is None else real_tokens(embeddings, mask)}

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return the grid of each image, and guidance."""
        height, width = (side // self.patch for side in latents.shape[-2:])
        return {"img_shapes": [[(1, height, width)]] * len(latents), "guidance": self.guidance(latents)}


class QwenImage21Family(RowByRowFamily, QwenImageFamily):
    """
    `QwenImage21Pipeline`: Qwen3-VL as text encoder, a transformer over one row of text and latents.

    The position of the image is that of the last token of the text, so prompts of different lengths go through the
    transformer one by one. The autoencoder has a fourth channel for transparency; training images are opaque.
    """

    # As diffusers' example (train_dreambooth_lora_qwenimage21.py), which also draws times uniformly.
    required_components = ("transformer", "vae", "text_encoder", "processor")
    mask_argument = None
    patch = 1

    @property
    def native_size(self) -> tuple[int, int]:
        """1024×1024, the pipeline's default; the transformer itself has no size."""
        return 1024, 1024

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """The tokenizer's own limit: the pipeline cuts nothing."""
        tokenizer = words_of(self.pipeline.processor)
        return [(tokenizer, tokenizer.model_max_length)]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D), the language model's last layer before its norm."""
        rows = [self.pipeline.encode_prompt(prompt, device=self.device)[0][0] for prompt in prompts]
        return {"encoder_hidden_states": rows}

    def encode_one(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean and deviation for an opaque image."""
        return super().encode_one(torch.cat([pixels, torch.ones_like(pixels[:, :1])], 1))

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return the grid of the image, and the places of text and image: one for each 2×2 tokens of the image."""
        text, (height, width) = len(conditioning["encoder_hidden_states"][0]), latents.shape[-2:]
        places = torch.arange(text + height * width // 4, device=latents.device)
        return {"img_shapes": [[(1, height, width)]], "img_mask": places[None] >= text}
