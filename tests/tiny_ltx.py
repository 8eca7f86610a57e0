"""Random pipelines of LTX-Video and LTX-2, as in `tests/tiny.py`."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

from tests.tiny import assembled, seeded, t5_encoder, t5_tokenizer


def ltx_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the shifts of LTX-Video by number of tokens."""
    shifts = {"base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024, "max_image_seq_len": 4096}
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift_terminal=0.1, **shifts)


def ltx_autoencoder(kind: type, **options: Any) -> torch.nn.Module:
    """A random autoencoder of 32 pixels a side and four frames to a latent, with a mean and deviation a channel."""
    vae = kind(
        latent_channels=8,
        block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, True),
        decoder_spatio_temporal_scaling=(True, True),
        decoder_inject_noise=(False,) * 3,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=8,
        **options,
    )
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2)
    return vae


def ltx(timestep_conditioning: bool = False, seed: int = 0) -> LTXPipeline:
    """A random LTX-Video pipeline whose sizes are multiples of 32 pixels and whose frames are 4·k + 1.

    Args:
        timestep_conditioning (`bool`, *optional*, defaults to `False`): whether the decoder takes a time (0.9.1).
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `LTXPipeline`: on the CPU, float32.
    """
    tokenizer = t5_tokenizer()
    blocks = {"down_block_types": ("LTXVideoDownBlock3D",) * 2, "downsample_type": ("conv",) * 2}
    with seeded(seed):
        networks = {
            "text_encoder": t5_encoder(tokenizer, 32, tie_word_embeddings=False),
            "transformer": LTXVideoTransformer3DModel(
                in_channels=8,
                out_channels=8,
                num_attention_heads=2,
                attention_head_dim=16,
                cross_attention_dim=32,
                num_layers=2,
                caption_channels=32,
            ),
            "vae": ltx_autoencoder(AutoencoderKLLTXVideo, timestep_conditioning=timestep_conditioning, **blocks),
        }
    return assembled(LTXPipeline, **networks, tokenizer=tokenizer, scheduler=ltx_scheduler())


def ltx_condition() -> LTXConditionPipeline:
    """The same with a scheduler without shifts, as from 0.9.5 on."""
    return LTXConditionPipeline(**ltx().components | {"scheduler": FlowMatchEulerDiscreteScheduler()})


def ltx2(version: str = "2.0", seed: int = 0) -> LTX2Pipeline:
    """A random LTX-2 pipeline with sizes and frames as [`ltx`].

    Args:
        version (`str`, *optional*, defaults to `"2.0"`): or `"2.3"`, with a projection of prompts a modality.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `LTX2Pipeline`: on the CPU, float32.
    """
    tokenizer = t5_tokenizer(1024)
    newer = version == "2.3"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = Gemma3TextConfig(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **sizes)
    vision = SiglipVisionConfig(image_size=32, patch_size=16, **sizes)
    heads = {"num_attention_heads": 2, "attention_head_dim": 16}
    connector = {"num_attention_heads": 2, "attention_head_dim": 16 if newer else 8, "num_layers": 1}
    connectors = {f"{kind}_connector_{key}": value for kind in ("video", "audio") for key, value in connector.items()}
    gated = {"gated_attn": newer, "cross_attn_mod": newer, "audio_gated_attn": newer, "audio_cross_attn_mod": newer}
    blocks = {"down_block_types": ("LTX2VideoDownBlock3D",) * 2, "downsample_type": ("spatiotemporal",) * 2}
    with seeded(seed):
        networks = {
            "text_encoder": Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision)),
            "connectors": LTX2TextConnectors(
                caption_channels=16,
                text_proj_in_factor=3,
                per_modality_projections=newer,
                video_hidden_dim=32,
                audio_hidden_dim=32,
                **connectors,
            ),
            "transformer": LTX2VideoTransformer3DModel(
                **{"in_channels": 8, "out_channels": 8, "cross_attention_dim": 32, "caption_channels": 16},
                **{"audio_in_channels": 4, "audio_out_channels": 4, "audio_cross_attention_dim": 32},
                **heads,
                **{f"audio_{key}": value for key, value in heads.items()},
                **gated,
                num_layers=2,
                vae_scale_factors=(4, 32, 32),
                use_prompt_embeddings=not newer,
            ),
            "vae": ltx_autoencoder(
                AutoencoderKLLTX2Video,
                upsample_type=("spatiotemporal",) * 2,
                decoder_spatial_padding_mode="zeros",  # reflection needs two latents a side
                **blocks,
            ),
            "audio_vae": AutoencoderKLLTX2Audio(
                base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
            ),
            "vocoder": LTX2Vocoder(
                in_channels=16,
                hidden_channels=8,
                upsample_kernel_sizes=[4, 4],
                upsample_factors=[2, 2],
                resnet_kernel_sizes=[3],
                resnet_dilations=[[1, 3, 5]],
            ),
        }
    return assembled(LTX2Pipeline, **networks, tokenizer=tokenizer, scheduler=ltx_scheduler())
