"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from tgol_trainer.likelihoods import DiffusionLikelihood, Draw

from .base import FamilySettings, ModelFamily, ModelOrigin, count_cut_prompts

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StableDiffusionFamily(ModelFamily):
    """
    `StableDiffusionPipeline`: CLIP text encoder, KL autoencoder, UNet that predicts ε or v.

    The training scheduler is made from the pipeline's config: generation overwrites the live one's timesteps, and a
    DDPMScheduler made so has the same noise levels whichever sampler the pipeline carries.

    Raises:
        ValueError: also for a scheduler without the noise levels of DDPM (EDM, flow matching).
    """

    denoiser_name = "unet"
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer")

    def __init__(
        self, pipeline: DiffusionPipeline, origin: ModelOrigin, settings: FamilySettings | None = None
    ) -> None:
        from diffusers import DDPMScheduler

        super().__init__(pipeline, origin, settings)
        if "beta_schedule" not in pipeline.scheduler.config:
            raise ValueError(
                f"{type(pipeline.scheduler).__name__} has no `beta_schedule`, so the noise levels that this "
                f"{type(pipeline).__name__} was trained on are not known; only models of the DDPM type are supported."
            )
        self.likelihood = DiffusionLikelihood(DDPMScheduler.from_config(pipeline.scheduler.config))

    @property
    def native_resolution(self) -> int:
        """Side in pixels: the UNet's sample size times the autoencoder's factor."""
        return self.pipeline.unet.config.sample_size * self.pipeline.vae_scale_factor

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor."""
        return self.pipeline.vae_scale_factor

    def count_long_prompts(self, prompts: Sequence[str]) -> tuple[int, int]:
        """Return how many prompts are longer than the tokenizer's limit, and that limit in tokens."""
        tokenizer = self.pipeline.tokenizer
        return count_cut_prompts(prompts, [(tokenizer, tokenizer.model_max_length)])

    def encode_unique_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """`encoder_hidden_states` (N, tokens, D), padded and cut as the pipeline does for generation."""
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings.to(self.denoiser.dtype)}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """Output of the UNet (B, 4, h, w)."""
        return model(draw.inputs, draw.timesteps, return_dict=False, **conditioning)[0]
