"""LTX-Video and LTX-2."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import Draw, to_device

from .conditioning import Conditioning, Rows, real_tokens
from .flow import PackedFlowFamily
from .video import VideoFlowFamily


class LTXFamily(VideoFlowFamily, PackedFlowFamily):
    """
    `LTXPipeline` (LTX-Video): T5 as text encoder, a transformer over tokens of one latent of a video each.

    Clips count as 25 frames a second, the pipeline's default. The padding of prompts is hidden from the transformer.
    """

    # As the authors' trainer (github.com/Lightricks/LTX-Video-Trainer, configs/ltxv_2b_lora_template.yaml), which
    # also draws logit-normal times, and shifts them by the number of tokens.
    default_target_modules: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")
    default_density = "logit_normal"
    required_components: tuple[str, ...] = ("tokenizer", "text_encoder", "vae", "transformer")
    token_limits: dict[str, int | None] = {"tokenizer": 128}  # default of the pipeline's `max_sequence_length`
    mask_argument = "encoder_attention_mask"
    default_size, default_frames = (512, 704), 161
    frames_per_second = 25
    patch = 1

    @property
    def frames_joined(self) -> int:
        """Frames of the video for each latent frame after the first."""
        return self.pipeline.vae_temporal_compression_ratio

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor."""
        return self.pipeline.vae_spatial_compression_ratio

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D) of the 128 tokens that T5 was given."""
        embeddings, mask, *_ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device
        )
        return {"encoder_hidden_states": real_tokens(embeddings, mask)}

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return the grid of latents and its scale in seconds and pixels; no mask where no prompt is padded."""
        frames, height, width = latents.shape[2:]
        scale = (self.frames_joined / self.frames_per_second, self.resolution_multiple, self.resolution_multiple)
        arguments = {"num_frames": frames, "height": height, "width": width, "rope_interpolation_scale": scale}
        return arguments if self.mask_argument in conditioning else {**arguments, self.mask_argument: None}

    def decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        """Call the autoencoder's decoder, some of which take a time: 0, the pipeline's `decode_timestep`."""
        vae = self.pipeline.vae
        time = latents.new_zeros(len(latents)) if vae.config.timestep_conditioning else None
        return vae.decode(latents, time, return_dict=False)[0]


class LTXConditionFamily(LTXFamily):
    """
    `LTXConditionPipeline` (LTX-Video from 0.9.5 on), without images or videos to begin from.

    Its latents have places in seconds and pixels, the first alone at its own, and prompts have up to 256 tokens.
    """

    token_limits = {"tokenizer": 256}  # default of the pipeline's `max_sequence_length`

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return the places of latents; no mask where no prompt is padded."""
        grid = self.pipeline._prepare_video_ids(len(latents), *latents.shape[2:])
        places = self.pipeline._scale_video_ids(grid, self.resolution_multiple, self.frames_joined).float()
        places[:, 0] *= 1 / self.frames_per_second
        arguments = {"video_coords": to_device(places, latents.device)}
        return arguments if self.mask_argument in conditioning else {**arguments, self.mask_argument: None}


class LTX2Family(LTXFamily):
    """
    `LTX2Pipeline` (LTX-2): Gemma as text encoder, `connectors` after it, a transformer over tokens of video and audio.

    Only the video is trained: the transformer runs with its two modalities isolated, as the authors' trainer does for
    videos without sound, and the weights of audio stay as they are. Clips count as 24 frames a second.
    """

    # As the documentation of the authors' trainer for video alone (github.com/Lightricks/LTX-2, packages/ltx-trainer,
    # docs/configuration-reference.md).
    default_target_modules = (
        *("attn1.to_k", "attn1.to_q", "attn1.to_v", "attn1.to_out.0"),
        *("attn2.to_k", "attn2.to_q", "attn2.to_v", "attn2.to_out.0"),
    )
    required_components = ("tokenizer", "text_encoder", "connectors", "vae", "transformer")
    token_limits = {"tokenizer": 1024}  # default of the pipeline's `max_sequence_length`
    default_size, default_frames = (512, 768), 121
    frames_per_second = 24

    @property
    def text_encoder_names(self) -> list[str]:
        """The text encoder, and the connectors that make what the transformer takes of its layers."""
        return ["text_encoder", "connectors"]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, D); 1024 tokens where registers take padding's place."""
        layers, mask, *_ = self.pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, device=self.device)
        side = self.pipeline.tokenizer.padding_side
        embeddings, _, mask = self.pipeline.connectors(layers, mask, padding_side=side)
        return {"encoder_hidden_states": real_tokens(embeddings, mask)}

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return the grid of latents and the frame rate, and one token of silence, which the video does not see."""
        config, (frames, height, width) = self.denoiser.config, latents.shape[2:]
        audio_width = config.audio_num_attention_heads * config.audio_attention_head_dim
        prompt_width = config.caption_channels if config.use_prompt_embeddings else audio_width
        return {
            **{"num_frames": frames, "height": height, "width": width, "fps": float(self.frames_per_second)},
            **{"isolate_modalities": True, "audio_num_frames": 1},
            "audio_hidden_states": latents.new_zeros(len(latents), 1, config.audio_in_channels),
            "audio_encoder_hidden_states": latents.new_zeros(len(latents), 1, prompt_width),
        }

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity of the video (B, C, f, h, w)."""
        return super().predict(model, draw, {**conditioning, "sigma": draw.timesteps})  # what LTX-2.3 takes too
