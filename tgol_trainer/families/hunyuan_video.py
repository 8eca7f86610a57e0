"""HunyuanVideo."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows
from .video import VideoFlowFamily

_TOKENS = 256
"""Default of the pipeline's `max_sequence_length`, after the part of the template that it takes away."""


class HunyuanVideoFamily(VideoFlowFamily):
    """
    `HunyuanVideoPipeline`: a Llama language model for the tokens, CLIP for one pooled vector, a transformer of videos.

    It is distilled with guidance and is given `settings.guidance`, the same for policy and reference. Times are
    uniform on the shifted noise levels by default, and the targets are those of the attention: both untested defaults,
    since diffusers has no example that trains this model.
    """

    # As the pipeline generates. Trainers on real videos give 1 (github.com/a-r-r-o-w/finetrainers and
    # github.com/tdrussell/diffusion-pipe, models/hunyuan_video).
    default_guidance = 6.0
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    default_size, default_frames, frames_per_second = (720, 1280), 129, 24
    rows_per_image = 1  # guidance is an input

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor_spatial * self.denoiser.config.patch_size

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """256 tokens of the language model; CLIP, cut at 77 tokens, only adds one pooled vector."""
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

        tokenizer = self.pipeline.tokenizer
        before = len(tokenizer(TEMPLATE["template"].split("{}")[0]).input_ids)
        return [(tokenizer, _TOKENS + TEMPLATE["crop_start"] - before)]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 256, D), their `encoder_attention_mask`, and `pooled_projections` (N, P)."""
        embeddings, pooled, mask = self.pipeline.encode_prompt(
            prompts, device=self.device, max_sequence_length=_TOKENS
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask, "pooled_projections": pooled}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, f, h, w)."""
        if (guidance := self.guidance(draw.inputs)) is not None:
            conditioning = {**conditioning, "guidance": (1000 * guidance).to(draw.inputs.dtype)}
        return super().predict(model, draw, conditioning)
