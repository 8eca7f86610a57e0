"""Lumina Image 2.0."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows, real_tokens, tensor_of
from .flow import FlowFamily

_TOKENS = 256
"""Default of the pipeline's `max_sequence_length`, the system prompt included."""


class Lumina2Family(FlowFamily):
    """
    `Lumina2Pipeline`: Gemma 2 as text encoder, a transformer over prompts of their own length and latents.

    The pipeline writes a system prompt before each prompt, but not before the empty one of guidance. The transformer's
    time runs from 0 (noise) to 1, and it predicts latents − noise. It reads the lengths of prompts back from the
    device.
    """

    # As diffusers' example (train_dreambooth_lora_lumina2.py), which also draws times uniformly.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("tokenizer", "text_encoder", "vae", "transformer")
    mask_argument = "encoder_attention_mask"
    velocity_sign = -1
    rows_per_image = 1  # the pass with the empty prompt comes after the other

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor, which the pipeline says is 8, times the transformer's patch."""
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """256 tokens, less those of the system prompt."""
        tokenizer = self.pipeline.tokenizer
        before = f"{self.pipeline.system_prompt} <Prompt Start> "
        return [(tokenizer, _TOKENS - len(tokenizer(before, add_special_tokens=False).input_ids))]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D), the text encoder's last layer but one."""
        unconditional = not any(prompts)
        encoded = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=unconditional, device=self.device, max_sequence_length=_TOKENS
        )
        return {"encoder_hidden_states": real_tokens(*(encoded[2:] if unconditional else encoded[:2]))}

    def network_times(self, times: torch.Tensor) -> torch.Tensor:
        """Return 1 − σ."""
        return 1 - times / 1000

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, h, w)."""
        if self.mask_argument not in conditioning:  # which the transformer wants in any case
            prompts = tensor_of(conditioning, "encoder_hidden_states")
            mask = torch.ones(prompts.shape[:2], dtype=torch.bool, device=prompts.device)
            conditioning = {**conditioning, self.mask_argument: mask}
        return super().predict(model, draw, conditioning)
