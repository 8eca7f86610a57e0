"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from .conditioning import Rows
from .flow import FlowFamily

_T5_TOKENS = 256
"""Default of the pipeline's `max_sequence_length`; diffusers' training example uses 77, but generation uses this."""


class StableDiffusion3Family(FlowFamily):
    """
    `StableDiffusion3Pipeline`: two CLIP text encoders and T5, which may be absent, and a transformer with two streams.

    Times are logit-normal on the shifted schedule by default, as the model was trained (arXiv 2403.03206, Sec. 3.1).
    """

    # As diffusers' example: the joint attention, not the second, image-only one of SD3.5 medium ("attn2").
    default_target_modules = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    default_density = "logit_normal"

    @property
    def max_side(self) -> int:
        """As many pixels as there are learned positions (1536 for SD3, 3072 for SD3.5 medium)."""
        return self.denoiser.config.pos_embed_max_size * self.resolution_multiple

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the patch size."""
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """
        T5 at 256 tokens, or both CLIP encoders where T5 is absent.

        The CLIP encoders cut at 77 tokens, but T5 reads on, so nothing is lost.
        """
        pipeline = self.pipeline
        if pipeline.text_encoder_3 is not None:
            return [(pipeline.tokenizer_3, _T5_TOKENS)]
        # The pipeline cuts for both encoders at the first tokenizer's limit.
        limit = pipeline.tokenizer_max_length
        return [(pipeline.tokenizer, limit), (pipeline.tokenizer_2, limit)]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 77 + 256, D), zeros for an absent T5, and `pooled_projections` (N, P1 + P2)."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            *(prompts, None, None),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_T5_TOKENS,
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}
