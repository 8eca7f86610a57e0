"""HunyuanVideo 1.5."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows
from .prompts import template_room
from .video import VideoFlowFamily


class HunyuanVideo15Family(VideoFlowFamily):
    """
    `HunyuanVideo15Pipeline`: Qwen2.5-VL for the prompt, ByT5 for what it quotes, a transformer of videos and images.

    The transformer gets an empty first frame and no image, as the pipeline gives them for text to video. It reads from
    the device which tokens are padding. Neither its authors nor diffusers say how to train an adapter with PEFT, so
    uniform times on the scheduler's noise levels and the targets are untested defaults.
    """

    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    default_frames, frames_per_second = 121, 24
    rows_per_image = 1  # the pass with the negative prompt comes after the other

    @property
    def native_size(self) -> tuple[int, int]:
        """The pipeline's default, 16:9 of about the area of its target size."""
        pipeline = self.pipeline
        width, height = pipeline.default_aspect_ratio
        return pipeline.video_processor.calculate_default_height_width(height, width, pipeline.target_size)

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor_spatial * self.denoiser.config.patch_size

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """1000 tokens of the language model, less what its template has more than the pipeline takes away."""
        pipeline = self.pipeline
        limit = pipeline.tokenizer_max_length + pipeline.prompt_template_encode_start_idx
        messages = [{"role": "system", "content": pipeline.system_message}, {"role": "user", "content": ""}]
        return [(pipeline.tokenizer, template_room(pipeline.tokenizer, limit, messages, add_generation_prompt=True))]

    def decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        """Call the decoder on one clip at a time: its attention in diffusers 0.42 takes no more."""
        return torch.cat([super(HunyuanVideo15Family, self).decode_batch(clip[None]) for clip in latents])

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 1000, D) and `encoder_hidden_states_2` (N, 256, E), each with its mask."""
        text, mask, quoted, quoted_mask = self.pipeline.encode_prompt(
            prompts, device=self.device, batch_size=len(prompts)
        )
        return {
            **{"encoder_hidden_states": text, "encoder_attention_mask": mask.bool()},
            **{"encoder_hidden_states_2": quoted, "encoder_attention_mask_2": quoted_mask.bool()},
        }

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, f, h, w)."""
        inputs, pipeline = draw.inputs, self.pipeline
        rows, channels, *sides = inputs.shape
        nothing = inputs.new_zeros(rows, channels + 1, *sides)  # the first frame, and where there is one
        image = inputs.new_zeros(rows, pipeline.vision_num_semantic_tokens, pipeline.vision_states_dim)
        return model(
            hidden_states=torch.cat([inputs, nothing], 1),
            timestep=draw.timesteps.to(inputs.dtype),
            image_embeds=image,
            return_dict=False,
            **conditioning,
        )[0]
