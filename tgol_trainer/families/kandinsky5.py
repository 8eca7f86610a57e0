"""Kandinsky 5, text to image and text to video."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows
from .flow import RowByRowFamily
from .prompts import words_of
from .video import VideoFlowFamily

_TOKENS = 512
"""Default of the pipelines' `max_sequence_length`, after the part of the template that they take away."""


class Kandinsky5Family(RowByRowFamily):
    """
    What the two have in common: Qwen2.5-VL for the tokens, CLIP for one pooled vector.

    The transformer takes channels last, and each prompt at its own length. Where it can be given a first frame
    (`visual_cond`), the pipeline gives zeros. Neither its authors nor diffusers say how to train an adapter with PEFT,
    so uniform times on the shifted noise levels and the targets are untested defaults.

    Raises:
        ValueError: for the models with sparse attention.
    """

    default_target_modules = (
        *("to_query", "to_key", "to_value", "self_attention.out_layer", "cross_attention.out_layer"),
    )
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    rows_per_image = 1  # the pass with the negative prompt comes after the other

    def check_pipeline(self) -> None:
        """Refuse sparse attention, which runs on a GPU alone and was never tried."""
        transformer = self.pipeline.transformer
        if transformer is not None and transformer.config.attention_type == "nabla":
            raise ValueError(
                f"This {type(self.pipeline).__name__} has sparse attention (`attention_type` is 'nabla', as in the "
                "models of ten seconds), which is not supported. Train a model of five seconds instead."
            )
        super().check_pipeline()

    def prepare_pipeline(self) -> None:
        """Freeze every component; bring to float32 what `from_pretrained` keeps there and `.to(dtype)` does not."""
        super().prepare_pipeline()
        kept = set(self.denoiser._keep_in_fp32_modules)
        for name, module in self.denoiser.named_modules():
            if kept & set(name.split(".")):
                module.float()

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor_spatial * self.denoiser.config.patch_size[-1]

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """512 tokens of the language model, less the template's; CLIP, cut at 77, only adds one pooled vector."""
        pipeline = self.pipeline
        template = len(pipeline.tokenizer(text=[pipeline.prompt_template.format("")]).input_ids[0])
        return [(words_of(pipeline.tokenizer), _TOKENS + pipeline.prompt_template_encode_start_idx - template)]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D); and `pooled_projections` (N, P)."""
        encoded = [
            self.pipeline.encode_prompt(prompt, device=self.device, max_sequence_length=_TOKENS) for prompt in prompts
        ]
        embeddings, pooled, _ = zip(*encoded, strict=True)
        return {
            "encoder_hidden_states": [tokens[0] for tokens in embeddings],
            "pooled_projections": torch.cat(pooled),
        }

    def scale_factor(self, height: int, width: int) -> tuple[float, float, float]:
        """Return what positions are divided by for a size in pixels."""
        return 1.0, 1.0, 1.0

    def predict_row(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (1, C, f, h, w)."""
        inputs, factor = draw.inputs.movedim(1, -1), self.pipeline.vae_scale_factor_spatial
        frames, height, width = inputs.shape[1:-1]
        if self.denoiser.config.visual_cond:
            channels = inputs.shape[-1] + 1
            inputs = torch.cat([inputs, inputs.new_zeros(*inputs.shape[:-1], channels)], -1)
        grid = (frames, height // 2, width // 2)
        output = model(
            hidden_states=inputs,
            timestep=draw.timesteps,
            visual_rope_pos=[torch.arange(side, device=inputs.device) for side in grid],
            text_rope_pos=torch.arange(len(conditioning["encoder_hidden_states"][0]), device=inputs.device),
            scale_factor=self.scale_factor(height * factor, width * factor),
            return_dict=False,
            **conditioning,
        )
        return output.movedim(-1, 1)


class Kandinsky5ImageFamily(Kandinsky5Family):
    """
    `Kandinsky5T2IPipeline`: as the videos, with the autoencoder of FLUX.1, whose shift the pipeline leaves out.

    The pipeline draws images of seven sizes of about a megapixel alone, and takes the nearest for any other.
    """

    output_name = "image"

    @property
    def native_size(self) -> tuple[int, int]:
        """1024×1024, the pipeline's default."""
        return 1024, 1024

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Multiply by the autoencoder's scale."""
        return latents * self.pipeline.vae.config.scaling_factor

    def unscale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Divide by it."""
        return latents / self.pipeline.vae.config.scaling_factor

    def predict_row(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (1, C, h, w), as of a video of one frame."""
        video = Draw(draw.inputs.unsqueeze(2), draw.timesteps, draw.target)
        return super().predict_row(model, video, conditioning).squeeze(2)


class Kandinsky5VideoFamily(VideoFlowFamily, Kandinsky5Family):
    """`Kandinsky5T2VPipeline`: with the autoencoder of HunyuanVideo."""

    default_size, default_frames, frames_per_second = (512, 768), 121, 24

    def scale_factor(self, height: int, width: int) -> tuple[float, float, float]:
        """Return the pipeline's own."""
        return self.pipeline._get_scale_factor(height, width)
