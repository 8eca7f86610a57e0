"""Mochi 1."""

from __future__ import annotations

import torch

from .conditioning import Rows
from .video import VideoFlowFamily

_TOKENS = 256
"""Default of the pipeline's `max_sequence_length`."""


class MochiFamily(VideoFlowFamily):
    """
    `MochiPipeline`: T5 as text encoder, an autoencoder that joins six frames, a transformer of videos.

    Time runs from 0 (noise) to 1000, and the transformer predicts latents − noise, in the direction of its scheduler.
    The transformer reads the lengths of prompts back from the device. Neither its authors nor diffusers say how to
    train it with PEFT, so uniform times and the targets are untested defaults.
    """

    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("tokenizer", "text_encoder", "vae", "transformer")
    token_limits = {"tokenizer": _TOKENS}
    default_size, default_frames, frames_per_second = (480, 848), 19, 30
    velocity_sign = -1

    @property
    def frames_joined(self) -> int:
        """Frames of the video for each latent frame after the first."""
        return self.pipeline.vae_temporal_scale_factor

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_spatial_scale_factor * self.denoiser.config.patch_size

    def network_times(self, times: torch.Tensor) -> torch.Tensor:
        """Return 1000·(1 − σ)."""
        return 1000 - times

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 256, D) and `encoder_attention_mask` (N, 256), false everywhere for ""."""
        embeddings, mask, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=_TOKENS, device=self.device
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}
