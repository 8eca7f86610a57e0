"""CogView4."""

from __future__ import annotations

import logging

import torch

from tgol_trainer.likelihoods import FlowLikelihood, Levels, to_device

from .conditioning import Rows
from .flow import RowByRowFamily

logger = logging.getLogger(__name__)

_TOKENS = 1024
"""Default of the pipeline's `max_sequence_length`."""


class CogView4Family(RowByRowFamily):
    """
    `CogView4Pipeline`: GLM as text encoder, a transformer that also takes sizes and crops, as SDXL does.

    The transformer's time is the place on a schedule that is not shifted, while the noise level at that time is
    shifted by the size of the image. Prompts are padded to multiples of 16 tokens, and the padding is seen; the mask
    that the transformer of diffusers 0.42 takes is added to its scores, so it does not hide more. Times are uniform,
    as in diffusers' example for control images (train_control_cogview4.py).
    """

    # No example with LoRA: the projections that diffusers' examples for similar transformers train.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("tokenizer", "text_encoder", "vae", "transformer")
    token_limits = {"tokenizer": _TOKENS}
    rows_per_image = 1  # the pass with the empty prompt comes after the other

    def prepare_pipeline(self) -> None:
        """Freeze every component, and warn of a scheduler that drops the times which the pipeline gives it."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        super().prepare_pipeline()
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(sigmas=[1.0], timesteps=[500.0])
        drops = scheduler.timesteps.tolist() != [500.0]  # diffusers 0.40 and 0.41, huggingface/diffusers#14461
        if drops and isinstance(self.pipeline.scheduler, FlowMatchEulerDiscreteScheduler):
            logger.warning(
                "This version of diffusers samples CogView4 at shifted times, which the model was not trained at: "
                "images that are drawn with it are not what the model can do. Training uses the right times. Draw "
                "with diffusers 0.42, which needs Python 3.11."
            )

    def make_likelihood(self) -> FlowLikelihood:
        """Return the likelihood on the noise levels of each size, whatever the density of times."""
        likelihood = super().make_likelihood()
        likelihood.sampled_levels = self.sampled_levels
        return likelihood

    def resolution_shift(self, num_tokens: int) -> float:
        """Return the pipeline's own shift, which grows with the side of the image."""
        from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

        config = self.pipeline.scheduler.config
        known = {"base_seq_len": "base_image_seq_len", "base_shift": "base_shift", "max_shift": "max_shift"}
        return calculate_shift(num_tokens, **{name: config[key] for name, key in known.items()})

    def sampled_levels(self, latents: torch.Tensor) -> Levels:
        """Return the noise levels at the size of latents, and the times before the shift."""
        return super().sampled_levels(latents)[0], self.network_times(self.schedule()[1])

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D), the language model's last layer but one."""
        encode = self.pipeline.encode_prompt
        options = {"do_classifier_free_guidance": False, "device": self.device, "max_sequence_length": _TOKENS}
        return {"encoder_hidden_states": [encode(prompt, **options)[0][0] for prompt in prompts]}

    def condition_on_size(self, geometry: torch.Tensor, resolution: tuple[int, int]) -> dict[str, torch.Tensor]:
        """Return size and crop of each image, and the size that is trained on; (B, 2) each, float32."""
        sizes = {"original_size": geometry[:, :2], "crop_coords": geometry[:, 2:]}
        sizes["target_size"] = geometry.new_tensor(resolution).expand(len(geometry), 2)
        return {name: to_device(size.float(), self.device) for name, size in sizes.items()}
