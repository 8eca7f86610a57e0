"""AuraFlow."""

from __future__ import annotations

import math

from .conditioning import Rows
from .flow import FlowFamily

_TOKENS = 256
"""Default of the pipeline's `max_sequence_length`."""


class AuraFlowFamily(FlowFamily):
    """
    `AuraFlowPipeline`: T5 as text encoder, a transformer with joint and single blocks.

    The transformer sees 256 tokens of each prompt, those past its end as zeros. Neither its authors nor diffusers say
    how to train it, so uniform times are an untested default.
    """

    # No example: the projections that diffusers' examples for similar transformers train.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("tokenizer", "text_encoder", "vae", "transformer")
    token_limits = {"tokenizer": _TOKENS}
    time_divisor = 1000

    @property
    def native_size(self) -> tuple[int, int]:
        """1024×1024, the pipeline's default; the transformer's own sample size is smaller."""
        return 1024, 1024

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    @property
    def max_side(self) -> int:
        """The side of the square of learned positions."""
        return math.isqrt(self.denoiser.config.pos_embed_max_size) * self.resolution_multiple

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 256, D)."""
        embeddings, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=_TOKENS
        )
        return {"encoder_hidden_states": embeddings}
