"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

import torch

from tgol_trainer.likelihoods import DiffusionLikelihood, Draw

from .base import ModelFamily
from .conditioning import Conditioning, Rows


class StableDiffusionFamily(ModelFamily):
    """
    `StableDiffusionPipeline`: CLIP text encoder, KL autoencoder, UNet that predicts ε, v or x0.

    The training scheduler is made from the pipeline's config: generation overwrites the live one's timesteps, and a
    DDPMScheduler made so has the same noise levels whichever sampler the pipeline carries.

    Raises:
        ValueError: also for a scheduler without the noise levels of DDPM (EDM, flow matching).
    """

    denoiser_name = "unet"
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components: tuple[str, ...] = ("unet", "vae", "text_encoder", "tokenizer")

    def make_likelihood(self) -> DiffusionLikelihood:
        """Return the likelihood on the noise levels of the pipeline's scheduler."""
        from diffusers import DDPMScheduler

        scheduler = self.pipeline.scheduler
        if "beta_schedule" not in scheduler.config:
            raise ValueError(
                f"{type(scheduler).__name__} has no `beta_schedule`, so the noise levels that this "
                f"{type(self.pipeline).__name__} was trained on are not known; only models of the DDPM type are "
                "supported."
            )
        return DiffusionLikelihood(DDPMScheduler.from_config(scheduler.config))

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, tokens, D), padded and cut as the pipeline does for generation."""
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": embeddings}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Output of the UNet (B, 4, h, w)."""
        return model(draw.inputs, draw.timesteps, return_dict=False, **conditioning)[0]
