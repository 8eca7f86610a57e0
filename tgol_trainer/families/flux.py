"""FLUX.1."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import to_device

from .conditioning import Conditioning, Rows
from .flow import PackedFlowFamily, grid_positions

_T5_TOKENS = 512
"""Default of the pipeline's `max_sequence_length`."""


class FluxFamily(PackedFlowFamily):
    """
    `FluxPipeline`: T5 for the tokens, CLIP for one pooled vector, a transformer over 2×2 patches of latents.

    FLUX.1-dev is distilled with guidance and is given `settings.guidance`, the same for policy and reference;
    FLUX.1-schnell takes none.
    """

    # As diffusers' example. The `attn.to_*` also match the single-stream blocks.
    default_target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    required_components: tuple[str, ...] = (
        *("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    token_limits = {"tokenizer_2": _T5_TOKENS}  # CLIP, cut at 77 tokens, only adds one pooled vector
    time_divisor = 1000
    rows_per_image = 1  # guidance is an input

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 512, D) and `pooled_projections` (N, P), as the pipeline makes them."""
        embeddings, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=_T5_TOKENS
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return positions of image and text, and guidance."""
        height, width = (side // self.patch for side in latents.shape[-2:])
        return {
            "img_ids": to_device(grid_positions(height, width), latents.device).to(latents.dtype),
            "txt_ids": latents.new_zeros(len(conditioning["encoder_hidden_states"][0]), 3),
            "guidance": self.guidance(latents),
        }
