"""Ideogram 4."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn.functional import pad

from tgol_trainer.likelihoods import Draw, Levels

from .conditioning import Conditioning, Rows, tensor_of
from .flow import PackedFlowFamily, grid_positions
from .flux2 import NormedLatents
from .prompts import template_room

_TOKENS = 2048
"""Default of the pipeline's `max_sequence_length`, the chat template included; longer prompts are an error there."""


class Ideogram4Family(NormedLatents, PackedFlowFamily):
    """
    `Ideogram4Pipeline`: several layers of Qwen3-VL as prompt, the autoencoder of FLUX.2, a transformer over one row.

    The pipeline guides with a second transformer that sees no prompt; that one stays as it is. The transformer's time
    runs from 0 (noise) to 1, and it predicts latents − noise. Its authors sample logit-normal noise levels, whose mean
    depends on the size, and so times are drawn by default.

    Raises:
        ValueError: for a prompt of more than 2048 tokens, from the pipeline.
    """

    # As diffusers' example (train_dreambooth_lora_ideogram4.py), which draws logit-normal times of the same mean, with
    # a deviation of 1 where the pipeline has 1.5.
    default_target_modules = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    required_components = ("transformer", "unconditional_transformer", "vae", "text_encoder", "tokenizer")
    default_density = "shifted"
    mask_argument = "attention_mask"
    velocity_sign = -1
    rows_per_image = 1  # the pass without a prompt is that of the other transformer
    patch = 1

    @property
    def native_size(self) -> tuple[int, int]:
        """2048×2048, the pipeline's default."""
        return 2048, 2048

    def network_times(self, times: torch.Tensor) -> torch.Tensor:
        """Return 1 − σ."""
        return 1 - times / 1000

    def sampled_levels(self, latents: torch.Tensor) -> Levels:
        """Return the pipeline's own noise levels for an image of the size of latents, and their times."""
        from diffusers.pipelines.ideogram4.pipeline_ideogram4 import _logit_normal_sigmas

        pixels = math.prod(latents.shape[-2:]) * self.resolution_multiple**2
        sigmas = _logit_normal_sigmas(len(self.schedule()[0]), 0.5 * math.log(pixels / 512**2), std=1.5)
        return sigmas, self.network_times(1000 * sigmas)

    def join_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Join latents (B, C, h, w) to (B, 4·C, h/2, w/2), the place in the square before the channel."""
        parts = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # (B, C, h/2, 2, w/2, 2)
        return parts.permute(0, 3, 5, 1, 2, 4).flatten(1, 3)

    def split_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo [`~Ideogram4Family.join_latents`]."""
        return latents.unflatten(1, (2, 2, -1)).permute(0, 3, 4, 1, 5, 2).flatten(4, 5).flatten(2, 3)

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """2048 tokens, less those of the chat template."""
        messages = [{"role": "user", "content": [{"type": "text", "text": ""}]}]
        tokenizer = self.pipeline.tokenizer
        return [(tokenizer, template_room(tokenizer, _TOKENS, messages=messages, add_generation_prompt=True))]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D)."""
        rows = []
        for prompt in prompts:
            embeddings, _, _, roles = self.pipeline.encode_prompt(prompt, 0, 0, _TOKENS, self.device)
            rows.append(embeddings[0][roles[0] > 0])
        return {"encoder_hidden_states": rows}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, h, w); the row of the transformer is text, its padding, and the image."""
        from diffusers.models.transformers.transformer_ideogram4 import (
            IMAGE_POSITION_OFFSET,
            LLM_TOKEN_INDICATOR,
            OUTPUT_IMAGE_INDICATOR,
            SEQUENCE_PADDING_INDICATOR,
        )

        inputs, text = draw.inputs, tensor_of(conditioning, "encoder_hidden_states")
        rows, length, image = len(inputs), text.shape[1], self.num_tokens(inputs)
        mask = conditioning.get(self.mask_argument)
        real = mask if isinstance(mask, torch.Tensor) else text.new_ones(rows, length, dtype=torch.bool)
        grid = grid_positions(*inputs.shape[-2:]).long().to(inputs.device, non_blocking=True)
        places = torch.arange(length, device=inputs.device)[:, None].expand(-1, 3)
        segments = torch.where(real, 1, SEQUENCE_PADDING_INDICATOR)
        roles = torch.where(real, LLM_TOKEN_INDICATOR, 0)
        tokens = inputs.flatten(2).transpose(1, 2)
        output = model(
            hidden_states=pad(tokens, (0, 0, length, 0)),
            timestep=draw.timesteps.to(inputs.dtype),
            encoder_hidden_states=pad(text, (0, 0, 0, image)),
            position_ids=torch.cat([places, grid + IMAGE_POSITION_OFFSET]).expand(rows, -1, -1),
            segment_ids=pad(segments, (0, image), value=1),
            indicator=pad(roles, (0, image), value=OUTPUT_IMAGE_INDICATOR),
            return_dict=False,
        )[0][:, length:]
        return self.velocity_sign * output.transpose(1, 2).unflatten(2, inputs.shape[-2:])
