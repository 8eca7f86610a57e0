"""Pipelines of the published sizes without weights, from configs written down from memory; tokenizers are tiny ones.

The numbers of weights are those that the models' authors publish (`COUNTS`), which tells that the configs are right.
"""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import STABLE_DIFFUSION_NOISE, WITHOUT_QUANT_CONV, clip_tokenizer, t5_tokenizer
from tests.tiny_language import chat_tokenizer


def clip_l(model=CLIPTextModel, **options):
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    return model(CLIPTextConfig(vocab_size=49408, projection_dim=768, **sizes, **options))


def clip_g():
    sizes = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
    return CLIPTextModelWithProjection(
        CLIPTextConfig(vocab_size=49408, projection_dim=1280, hidden_act="gelu", **sizes)
    )


def t5_xxl(model=T5EncoderModel, config=T5Config, vocabulary=32128):
    sizes = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return model(config(vocab_size=vocabulary, feed_forward_proj="gated-gelu", tie_word_embeddings=False, **sizes))


def autoencoder(channels, **options):
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=channels,
        **options,
    )


def stable_diffusion():
    """Stable Diffusion 1.5."""
    with torch.device("meta"):
        networks = {
            "text_encoder": clip_l(),
            "unet": UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
            "vae": autoencoder(4, sample_size=512, scaling_factor=0.18215),
        }
    scheduler = PNDMScheduler(skip_prk_steps=True, **STABLE_DIFFUSION_NOISE)
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**networks, tokenizer=clip_tokenizer(), scheduler=scheduler, **extras)


def stable_diffusion_xl():
    """Stable Diffusion XL, base."""
    sizes = {"block_out_channels": (320, 640, 1280), "attention_head_dim": (5, 10, 20)}
    sizes |= {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    with torch.device("meta"):
        networks = {
            "text_encoder": clip_l(),
            "text_encoder_2": clip_g(),
            "unet": UNet2DConditionModel(
                sample_size=128,
                cross_attention_dim=2048,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                use_linear_projection=True,
                projection_class_embeddings_input_dim=2816,
                **sizes,
            ),
            "vae": autoencoder(4, sample_size=1024, scaling_factor=0.13025, force_upcast=True),
        }
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer()}
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **STABLE_DIFFUSION_NOISE)
    return StableDiffusionXLPipeline(**networks, **tokenizers, scheduler=scheduler, add_watermarker=False)


def stable_diffusion_3():
    """Stable Diffusion 3.5, medium."""
    sizes = {"num_layers": 24, "num_attention_heads": 24, "attention_head_dim": 64, "caption_projection_dim": 1536}
    sizes |= {"joint_attention_dim": 4096, "pooled_projection_dim": 2048, "pos_embed_max_size": 384}
    with torch.device("meta"):
        networks = {
            "text_encoder": clip_l(CLIPTextModelWithProjection),
            "text_encoder_2": clip_g(),
            "text_encoder_3": t5_xxl(),
            "transformer": SD3Transformer2DModel(
                sample_size=128,
                in_channels=16,
                out_channels=16,
                qk_norm="rms_norm",
                dual_attention_layers=tuple(range(13)),
                **sizes,
            ),
            "vae": autoencoder(16, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609, **WITHOUT_QUANT_CONV),
        }
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": clip_tokenizer(), "tokenizer_3": t5_tokenizer()}
    return StableDiffusion3Pipeline(**networks, **tokenizers, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))


def flux():
    """FLUX.1-dev; the transformer's sizes are diffusers' defaults."""
    with torch.device("meta"):
        networks = {
            "text_encoder": clip_l(),
            "text_encoder_2": t5_xxl(),
            "transformer": FluxTransformer2DModel(guidance_embeds=True),
            "vae": autoencoder(16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, **WITHOUT_QUANT_CONV),
        }
    tokenizers = {"tokenizer": clip_tokenizer(), "tokenizer_2": t5_tokenizer()}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(**networks, **tokenizers, scheduler=scheduler)


def z_image():
    """Z-Image; the transformer's sizes are diffusers' defaults, the text encoder is Qwen3-4B."""
    sizes = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "head_dim": 128}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": True}
    with torch.device("meta"):
        networks = {
            "text_encoder": Qwen3Model(Qwen3Config(vocab_size=151936, **sizes)),
            "transformer": ZImageTransformer2DModel(),
            "vae": autoencoder(16, sample_size=1024, scaling_factor=0.3611, shift_factor=0.1159, **WITHOUT_QUANT_CONV),
        }
    return ZImagePipeline(**networks, tokenizer=chat_tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0))


def wan():
    """Wan 2.1, 1.3B."""
    sizes = {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960, "text_dim": 4096, "freq_dim": 256}
    with torch.device("meta"):
        networks = {
            "text_encoder": t5_xxl(UMT5EncoderModel, UMT5Config, 256384),
            "transformer": WanTransformer3DModel(attention_head_dim=128, **sizes),
            "vae": AutoencoderKLWan(),
        }
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return WanPipeline(**networks, tokenizer=t5_tokenizer(), scheduler=scheduler)


SIZES = {
    "sd15": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "sd35": stable_diffusion_3,
    "flux": flux,
    "z-image": z_image,
    "wan": wan,
}

COUNTS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder_2": 694_659_840},
    "flux": {"transformer": 11_901_408_320, "vae": 83_819_683, "text_encoder_2": 4_762_310_656},
}
"""Weights of components, as published."""


def write(name: str, folder: Path) -> Path:
    """Write what a Hub repository holds of a pipeline beside its weights."""
    pipeline = SIZES[name]()
    pipeline.save_config(folder)
    for part, component in pipeline.components.items():
        if component is None:
            continue
        if hasattr(component, "save_config"):
            component.save_config(folder / part)
        elif isinstance(component, torch.nn.Module):
            component.config.save_pretrained(folder / part)
        else:
            component.save_pretrained(folder / part)
    return folder
