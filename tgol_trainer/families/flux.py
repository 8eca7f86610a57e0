"""FLUX.1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from tgol_trainer.likelihoods import Draw, FlowLikelihood

from .base import FamilySettings, ModelFamily, ModelOrigin, count_cut_prompts, flow_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_T5_TOKENS = 512
"""Default of the pipeline's `max_sequence_length`."""

_PATCH = 2
"""Side in latents of what the transformer takes as one token."""


class FluxFamily(ModelFamily):
    """
    `FluxPipeline`: T5 for the tokens, CLIP for one pooled vector, a transformer over 2×2 patches of latents.

    Latents, noise and velocity are images (B, C, h, w) outside the transformer; cutting them into patches only moves
    numbers, so the error is the same. FLUX.1-dev is distilled with guidance and is given `settings.guidance`, the same
    for policy and reference; FLUX.1-schnell takes none.
    """

    denoiser_name = "transformer"
    # As diffusers' example. The `attn.to_*` also match the single-stream blocks.
    default_target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(
        self, pipeline: DiffusionPipeline, origin: ModelOrigin, settings: FamilySettings | None = None
    ) -> None:
        super().__init__(pipeline, origin, settings)
        sigmas, timesteps = flow_schedule(pipeline)
        self.likelihood = FlowLikelihood(sigmas, timesteps / 1000, self.settings.timestep_sampling or "uniform")

    @property
    def native_resolution(self) -> int:
        """Side in pixels: the pipeline's default; the transformer itself has no size."""
        return self.pipeline.default_sample_size * self.pipeline.vae_scale_factor

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the side of a patch."""
        return self.pipeline.vae_scale_factor * _PATCH

    def count_long_prompts(self, prompts: Sequence[str]) -> tuple[int, int]:
        """Return how many prompts T5 cuts, and its limit; CLIP, cut at 77 tokens, only adds one pooled vector."""
        return count_cut_prompts(prompts, [(self.pipeline.tokenizer_2, _T5_TOKENS)])

    def encode_unique_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` (N, 512, D) and `pooled_projections` (N, P), as the pipeline makes them."""
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=_T5_TOKENS
        )
        dtype = self.denoiser.dtype
        return {"encoder_hidden_states": embeddings.to(dtype), "pooled_projections": pooled.to(dtype)}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """Velocity (B, C, h, w)."""
        inputs = draw.inputs
        batch, (height, width) = len(inputs), (side // _PATCH for side in inputs.shape[-2:])
        guidance = None
        if self.denoiser.config.guidance_embeds:
            guidance = torch.full((batch,), self.settings.guidance, device=inputs.device)
        tokens = model(
            hidden_states=pixel_unshuffle(inputs, _PATCH).flatten(2).transpose(1, 2),
            timestep=draw.timesteps,
            guidance=guidance,
            img_ids=_positions(height, width, inputs),
            txt_ids=inputs.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            return_dict=False,
            **conditioning,
        )[0]
        return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), _PATCH)


def _positions(height: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(height·width, 3): zero, row and column of each patch, which the rotary embedding turns into angles."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(like)
