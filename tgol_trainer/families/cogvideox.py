"""CogVideoX 2B, 5B and 1.5."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tgol_trainer.likelihoods import DiffusionLikelihood, Draw, RowGenerators

from .conditioning import Conditioning, Rows
from .video import VideoFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_TOKENS = 226
"""Default of the pipeline's `max_sequence_length`."""


class CogVideoXFamily(VideoFamily):
    """
    `CogVideoXPipeline`: T5 as text encoder, a transformer of the DDPM type that takes frames before channels.

    It predicts v on its scheduler's noise levels, which are shifted by `snr_shift_scale` and end in pure noise. The
    padding of prompts is seen, as in the pipeline. CogVideoX 1.5 (`patch_size_t`) joins two latent frames to one, so
    the first comes twice; its pipeline takes one away again.

    Raises:
        ValueError: for a number of frames that the autoencoder would cut, and for a scheduler without noise levels.
    """

    denoiser_name = "transformer"
    # As diffusers' example (train_cogvideox_lora.py), which also draws timesteps uniformly.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("tokenizer", "text_encoder", "vae", "transformer")
    token_limits = {"tokenizer": _TOKENS}
    frames_per_second = 8

    def check_pipeline(self) -> None:
        """Take size and frames from the transformer, and refuse what cannot be trained."""
        if (transformer := self.pipeline.transformer) is not None:
            config, factor = transformer.config, self.pipeline.vae_scale_factor_spatial
            self.default_size = (config.sample_height * factor, config.sample_width * factor)
            self.default_frames = config.sample_frames
        super().check_pipeline()

    @classmethod
    def frame_rate(cls, pipeline: DiffusionPipeline) -> int:
        """Return 16 for CogVideoX 1.5."""
        return 16 if pipeline.transformer.config.patch_size_t else cls.frames_per_second

    @property
    def frames_joined(self) -> int:
        """Frames after the first that the autoencoder decodes together: two latent frames."""
        return 2 * self.pipeline.vae_scale_factor_temporal

    def make_likelihood(self) -> DiffusionLikelihood:
        """Return the likelihood on the noise levels of the pipeline's scheduler, whichever of its two it is."""
        from diffusers import CogVideoXDDIMScheduler

        scheduler = self.pipeline.scheduler
        if "snr_shift_scale" not in scheduler.config:
            raise ValueError(
                f"{type(scheduler).__name__} has no `snr_shift_scale`, so the noise levels of this CogVideoXPipeline "
                "are not known. Set `pipe.scheduler` back to the one the model came with."
            )
        return DiffusionLikelihood(CogVideoXDDIMScheduler.from_config(scheduler.config))

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor_spatial * self.denoiser.config.patch_size

    def latents(self, encoded: dict[str, torch.Tensor], rows: RowGenerators, *, sample: bool) -> torch.Tensor:
        """Return latents (B, C, f, h, w), with the first frame again where the transformer wants another one."""
        latents = super().latents(encoded, rows, sample=sample)
        missing = -latents.shape[2] % (self.denoiser.config.patch_size_t or 1)
        return torch.cat([latents[:, :, :1]] * missing + [latents], 2)

    def decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        """Call the autoencoder's decoder without the frame that was added: it decodes pairs after the first."""
        return super().decode_batch(latents[:, :, 1 - latents.shape[2] % 2 :])

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 226, D)."""
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=_TOKENS, device=self.device
        )
        return {"encoder_hidden_states": embeddings}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Output of the transformer (B, C, f, h, w)."""
        positions = None
        if self.denoiser.config.use_rotary_positional_embeddings:
            factor = self.pipeline.vae_scale_factor_spatial
            frames, height, width = draw.inputs.shape[2:]
            positions = self.pipeline._prepare_rotary_positional_embeddings(
                height * factor, width * factor, frames, draw.inputs.device
            )
        output = model(
            hidden_states=draw.inputs.transpose(1, 2),
            timestep=draw.timesteps,
            image_rotary_emb=positions,
            return_dict=False,
            **conditioning,
        )[0]
        return output.transpose(1, 2)
