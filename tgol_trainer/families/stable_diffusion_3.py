"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tgol_trainer.likelihoods import Draw, FlowLikelihood

from .base import FamilySettings, ModelFamily, ModelOrigin, count_cut_prompts, flow_schedule

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_T5_TOKENS = 256
"""Default of the pipeline's `max_sequence_length`; diffusers' training example uses 77, but generation uses this."""


class StableDiffusion3Family(ModelFamily):
    """
    `StableDiffusion3Pipeline`: two CLIP text encoders and T5, which may be absent, and a transformer with two streams.

    Times are logit-normal on the shifted schedule by default, as the model was trained (arXiv 2403.03206, Sec. 3.1).
    """

    denoiser_name = "transformer"
    # As diffusers' example: the joint attention, not the second, image-only one of SD3.5 medium ("attn2").
    default_target_modules = tuple(
        f"attn.{name}"
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
    )
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")

    def __init__(
        self, pipeline: DiffusionPipeline, origin: ModelOrigin, settings: FamilySettings | None = None
    ) -> None:
        super().__init__(pipeline, origin, settings)
        self.likelihood = FlowLikelihood(*flow_schedule(pipeline), self.settings.timestep_sampling or "logit_normal")

    @property
    def native_resolution(self) -> int:
        """Side in pixels: the transformer's sample size times the autoencoder's factor."""
        return self.denoiser.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the patch size."""
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    def count_long_prompts(self, prompts: Sequence[str]) -> tuple[int, int]:
        """
        Return how many prompts T5 cuts, and its limit.

        The CLIP encoders cut at 77 tokens, but T5 reads on, so nothing is lost; they count where T5 is absent.
        """
        pipeline = self.pipeline
        if pipeline.text_encoder_3 is not None:
            return count_cut_prompts(prompts, [(pipeline.tokenizer_3, _T5_TOKENS)])
        # The pipeline cuts for both encoders at the first tokenizer's limit.
        limit = pipeline.tokenizer_max_length
        return count_cut_prompts(prompts, [(pipeline.tokenizer, limit), (pipeline.tokenizer_2, limit)])

    def encode_unique_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` (N, 77 + 256, D), zeros for an absent T5, and `pooled_projections` (N, P1 + P2)."""
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_T5_TOKENS,
        )
        dtype = self.denoiser.dtype
        return {"encoder_hidden_states": embeddings.to(dtype), "pooled_projections": pooled.to(dtype)}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """Velocity (B, C, h, w)."""
        return model(hidden_states=draw.inputs, timestep=draw.timesteps, return_dict=False, **conditioning)[0]
