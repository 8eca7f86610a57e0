"""Z-Image."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows
from .flow import FlowFamily
from .prompts import template_room

_TOKENS = 512
"""Default of the pipeline's `max_sequence_length`, the chat template included."""


class ZImageFamily(FlowFamily):
    """
    `ZImagePipeline`: a Qwen3 language model as text encoder, a transformer over lists of images and prompts.

    Each prompt has its own length. The transformer's time runs from 0 (noise) to 1, and it predicts latents − noise,
    which the pipeline negates.
    """

    # As diffusers' example (train_dreambooth_lora_z_image.py), which also draws times uniformly.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("transformer", "vae", "text_encoder", "tokenizer")
    list_arguments = ("cap_feats",)
    velocity_sign = -1

    @property
    def native_size(self) -> tuple[int, int]:
        """1024×1024, the pipeline's default; the transformer itself has no size."""
        return 1024, 1024

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the side of the transformer's patch."""
        return self.pipeline.vae_scale_factor * self.denoiser.config.all_patch_size[0]

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """512 tokens, less those of the chat template."""
        tokenizer = self.pipeline.tokenizer
        return [(tokenizer, template_room(tokenizer, _TOKENS, add_generation_prompt=True, enable_thinking=True))]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`cap_feats`: for each prompt (tokens, D), the language model's last layer but one."""
        embeddings, _ = self.pipeline.encode_prompt(
            list(prompts), self.device, do_classifier_free_guidance=False, max_sequence_length=_TOKENS
        )
        return {"cap_feats": embeddings}

    def network_times(self, times: torch.Tensor) -> torch.Tensor:
        """Return 1 − σ."""
        return (1000 - times) / 1000

    def num_tokens(self, latents: torch.Tensor) -> int:
        """Return the number of patches of latents (B, C, h, w)."""
        height, width = (side // self.denoiser.config.all_patch_size[0] for side in latents.shape[2:])
        return height * width

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, h, w)."""
        images = list(draw.inputs.unsqueeze(2))  # of one frame
        output = model(images, draw.timesteps, return_dict=False, **conditioning)[0]
        return self.velocity_sign * torch.stack(output).squeeze(2)
