"""Sana."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .conditioning import Rows, real_tokens
from .flow import FlowFamily

_TOKENS = 300
"""Default of the pipeline's `max_sequence_length`, which counts the instruction before the prompt as two tokens."""


class SanaFamily(FlowFamily):
    """
    `SanaPipeline`: Gemma as text encoder, a deterministic autoencoder of 32 pixels a side, a transformer.

    The pipeline writes an instruction before each prompt, but not before the empty one of guidance. Padding is hidden
    from the transformer.
    """

    # As diffusers' example (train_dreambooth_lora_sana.py), which also draws times uniformly.
    default_target_modules = ("to_k", "to_q", "to_v")
    required_components = ("tokenizer", "text_encoder", "vae", "transformer")
    mask_argument = "encoder_attention_mask"

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """Tokens that are left to a prompt."""
        return [(self.pipeline.tokenizer, _TOKENS - 1)]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D)."""
        instruction = inspect.signature(type(self.pipeline).__call__).parameters["complex_human_instruction"].default
        unconditional = not any(prompts)
        encoded = self.pipeline.encode_prompt(
            prompts,
            do_classifier_free_guidance=unconditional,
            device=self.device,
            max_sequence_length=_TOKENS,
            complex_human_instruction=instruction,
        )
        return {"encoder_hidden_states": real_tokens(*(encoded[2:] if unconditional else encoded[:2]))}

    def encode_one(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the latents of one image; there is nothing to sample."""
        return {"mean": self.pipeline.vae.encode(pixels.to(self.pipeline.vae.dtype)).latent}

    def network_times(self, times: torch.Tensor) -> torch.Tensor:
        """Return the scheduler's times in the transformer's own unit."""
        return times * self.denoiser.config.timestep_scale
