"""FLUX.2 dev and klein."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import to_device

from .base import ModelFamily
from .conditioning import Conditioning, Rows
from .flow import PackedFlowFamily
from .prompts import template_room, words_of

_TOKENS = 512
"""Default of the pipelines' `max_sequence_length`, the chat template included."""

_STEPS = 50
"""Default of the pipelines' `num_inference_steps`."""


class NormedLatents(ModelFamily):
    """A family with the autoencoder of FLUX.2, whose latents are joined 2×2 and then normed by its batch norm."""

    @property
    def norm_epsilon(self) -> float:
        """What is added to the variance."""
        return self.pipeline.vae.config.batch_norm_eps

    def _statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of each channel of joined latents, as the pipeline takes them from the batch norm."""
        norm, epsilon = self.pipeline.vae.bn, self.norm_epsilon
        moved = [to_device(each, latents.device).view(1, -1, 1, 1) for each in (norm.running_mean, norm.running_var)]
        mean, std = moved[0], (moved[1] + epsilon).sqrt()
        return mean.to(latents.dtype), std.to(latents.dtype)

    def join_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Join latents (B, C, h, w) to (B, 4·C, h/2, w/2) in the pipeline's order."""
        return self.pipeline._patchify_latents(latents)

    def split_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo [`~NormedLatents.join_latents`]."""
        return self.pipeline._unpatchify_latents(latents)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Join latents (B, C, h, w) to (B, 4·C, h/2, w/2) and bring them to the unit of the transformer."""
        latents = self.join_latents(latents)
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def unscale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo [`~NormedLatents.scale_latents`]."""
        mean, std = self._statistics(latents)
        return self.split_latents(latents * std + mean)


class Flux2Family(NormedLatents, PackedFlowFamily):
    """
    `Flux2Pipeline`: a Mistral language model as text encoder, a transformer over tokens of 2×2 latents.

    Four neighbouring latents become channels of one, and a batch norm in the autoencoder gives each channel its mean
    and deviation. FLUX.2 dev is distilled with guidance and is given `settings.guidance`. The padding of prompts is
    seen by the transformer, as in the pipeline, so all have one length.
    """

    # As diffusers' example (train_dreambooth_lora_flux2.py), with the outputs of the single-stream blocks, see
    # `prepare_pipeline`. It also draws times uniformly.
    default_target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0", "to_qkv_mlp_proj")
    required_components = ("transformer", "vae", "text_encoder", "tokenizer")
    time_divisor = 1000
    rows_per_image = 1  # guidance is an input, or a second pass
    patch = 1  # the autoencoder's latents are joined 2×2 already

    def prepare_pipeline(self) -> None:
        """Freeze every component, and name the outputs of the single-stream blocks among the default targets."""
        super().prepare_pipeline()
        blocks = range(len(self.denoiser.single_transformer_blocks))
        outputs = tuple(f"single_transformer_blocks.{index}.attn.to_out" for index in blocks)
        self.default_target_modules = type(self).default_target_modules + outputs

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """512 tokens, less those of the chat template with the pipeline's system message."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        processor = self.pipeline.tokenizer
        empty = format_input([""], self.pipeline.system_message)[0]
        return [(words_of(processor), template_room(processor, _TOKENS, messages=empty))]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 512, D), three layers of the language model side by side."""
        embeddings, _ = self.pipeline.encode_prompt(list(prompts), device=self.device, max_sequence_length=_TOKENS)
        return {"encoder_hidden_states": embeddings}

    def resolution_shift(self, num_tokens: int) -> float:
        """Return the pipelines' shift at their default number of steps, on which it depends here."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(num_tokens, _STEPS)

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return positions of image and text, and guidance."""
        text = torch.empty(1, len(conditioning["encoder_hidden_states"][0]), 1)
        return {
            "img_ids": to_device(self.pipeline._prepare_latent_ids(latents[:1])[0], latents.device),
            "txt_ids": to_device(self.pipeline._prepare_text_ids(text)[0], latents.device),
            "guidance": self.guidance(latents),
        }


class Flux2KleinFamily(Flux2Family):
    """
    `Flux2KleinPipeline`: as FLUX.2 dev, with Qwen3 as text encoder and no guidance input.

    Train a base model (FLUX.2-klein-base-4B or -9B): the others are distilled to four steps.
    """

    rows_per_image = 2

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """512 tokens, less those of the chat template."""
        tokenizer = self.pipeline.tokenizer
        return [(tokenizer, template_room(tokenizer, _TOKENS, add_generation_prompt=True, enable_thinking=False))]
