"""FLUX.1."""

from __future__ import annotations

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from tgol_trainer.likelihoods import Draw, to_device

from .flow import FlowFamily

_T5_TOKENS = 512
"""Default of the pipeline's `max_sequence_length`."""

_PATCH = 2
"""Side in latents of what the transformer takes as one token."""


class FluxFamily(FlowFamily):
    """
    `FluxPipeline`: T5 for the tokens, CLIP for one pooled vector, a transformer over 2×2 patches of latents.

    Latents, noise and velocity are images (B, C, h, w) outside the transformer; cutting them into patches only moves
    numbers, so the error is the same. FLUX.1-dev is distilled with guidance and is given `settings.guidance`, the same
    for policy and reference; FLUX.1-schnell takes none.
    """

    # As diffusers' example. The `attn.to_*` also match the single-stream blocks.
    default_target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    token_limits = {"tokenizer_2": _T5_TOKENS}  # CLIP, cut at 77 tokens, only adds one pooled vector
    time_divisor = 1000
    rows_per_image = 1  # guidance is an input

    @property
    def native_size(self) -> tuple[int, int]:
        """The pipeline's default; the transformer itself has no size."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the side of a patch."""
        return self.pipeline.vae_scale_factor * _PATCH

    def encode_unique_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` (N, 512, D) and `pooled_projections` (N, P), as the pipeline makes them."""
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=_T5_TOKENS
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

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
            img_ids=to_device(grid_positions(height, width), inputs.device).to(inputs.dtype),
            txt_ids=inputs.new_zeros(conditioning["encoder_hidden_states"].shape[1], 3),
            return_dict=False,
            **conditioning,
        )[0]
        return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, (height, width)), _PATCH)


def grid_positions(height: int, width: int) -> torch.Tensor:
    """Zero, row and column (height·width, 3) of each token of an image, for rotary embeddings; float32."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
