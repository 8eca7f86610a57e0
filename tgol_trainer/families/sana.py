"""Sana and Sana-Video."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .conditioning import Rows, real_tokens
from .flow import FlowFamily
from .video import VideoFlowFamily

_TOKENS = 300
"""Default of the pipeline's `max_sequence_length`, which counts the instruction before the prompt as two tokens."""


class _SanaPrompts(FlowFamily):
    """
    What the two have in common: Gemma as text encoder.

    The pipeline writes an instruction before each prompt, but not before the empty one of guidance. Padding is hidden
    from the transformer.
    """

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


class SanaFamily(_SanaPrompts):
    """`SanaPipeline`: a deterministic autoencoder of 32 pixels a side, and a transformer."""

    # As diffusers' example (train_dreambooth_lora_sana.py), which also draws times uniformly.
    default_target_modules = ("to_k", "to_q", "to_v")

    def encode_one(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the latents of one image; there is nothing to sample."""
        return {"mean": self.pipeline.vae.encode(pixels.to(self.pipeline.vae.dtype)).latent}

    def network_times(self, times: torch.Tensor) -> torch.Tensor:
        """Return the scheduler's times in the transformer's own unit."""
        return times * self.denoiser.config.timestep_scale


class SanaVideoFamily(VideoFlowFamily, _SanaPrompts):
    """
    `SanaVideoPipeline`: an autoencoder of Wan or LTX-2, and a transformer of videos with linear attention.

    Neither its authors nor diffusers say how to train an adapter, so uniform times are an untested default.
    """

    default_target_modules = ("to_k", "to_q", "to_v")  # as Sana
    default_size, default_frames, frames_per_second = (480, 832), 81, 16
    frames_argument = "frames"

    @property
    def resolution_multiple(self) -> int:
        """32 pixels, which the pipeline asks for, or the autoencoder's factor times the transformer's patch."""
        return max(32, self.pipeline.vae_scale_factor_spatial * self.denoiser.config.patch_size[-1])
