"""Random pipelines small enough to build inside a test: no download, nothing on disk, a twentieth of a second each.

They are built anew each time: a deep copy of one that is kept takes as long.
"""

import string
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
    AutoencoderKL,
    AutoencoderKLWan,
    DiffusionPipeline,
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
    UVit2DModel,
    VQModel,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.meissonic_standin import Pipeline, Scheduler, Transformer2DModel

AnyPipeline = TypeVar("AnyPipeline", bound=DiffusionPipeline)

# ---- Shared parts; weights come from the global generator ----


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw weights from a seed, whatever was drawn before, and leave the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def assembled(pipeline: type[AnyPipeline], **components: Any) -> AnyPipeline:
    """A pipeline of components, its networks in evaluation mode."""
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipeline(**components)


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: any UTF-8 text encodes, one token a byte (514 ids)."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Configuration of a CLIP text encoder of two layers and width 32, pooled output included."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        projection_dim=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        # With the default ids, outside this vocabulary, the pooled output is the same for every prompt.
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def t5_tokenizer(length: int = 512) -> T5Tokenizer:
    """A T5 (and UMT5) tokenizer of single ASCII characters: one token a character, a space and the end (97 ids)."""
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in characters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def t5_encoder(
    tokenizer: T5Tokenizer, width: int, model: type = T5EncoderModel, config: type = T5Config, **options: Any
) -> T5EncoderModel | UMT5EncoderModel:
    """A random T5 or UMT5 encoder of two layers."""
    sizes = {"d_model": width, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}
    return model(config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", **sizes, **options))


def kl_autoencoder(scaling_factor: float, halvings: int = 1, **options: Any) -> AutoencoderKL:
    """A random KL autoencoder with four channels that halves each side, once by default."""
    return AutoencoderKL(
        block_out_channels=(8, *[16] * halvings),
        down_block_types=("DownEncoderBlock2D",) * (halvings + 1),
        up_block_types=("UpDecoderBlock2D",) * (halvings + 1),
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=scaling_factor,
        **options,
    )


def vq_model() -> VQModel:
    """A random VQ autoencoder of 32 codes that halves each side."""
    return VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=8,
        norm_num_groups=4,
        num_vq_embeddings=32,
        sample_size=16,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )


def unet(**options: Any) -> UNet2DConditionModel:
    """A random UNet of two blocks, the inner one with attention to the prompt."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        **options,
    )


STABLE_DIFFUSION_NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STABLE_DIFFUSION_NOISE |= {"steps_offset": 1}
WITHOUT_QUANT_CONV = {"use_quant_conv": False, "use_post_quant_conv": False}

SDXL_UNET = {
    "cross_attention_dim": 64,  # both encoders side by side
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}

# ---- Pipelines ----


def stable_diffusion(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionPipeline:
    """A random Stable Diffusion 1.x pipeline of 333k weights that draws 16×16 images.

    Equal arguments give equal weights, whatever was drawn before, and the global random state is left alone.

    Args:
        prediction_type (`str`, *optional*, defaults to `"epsilon"`): what the UNet predicts, in the scheduler's words.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `StableDiffusionPipeline`: on the CPU, float32, without a safety checker.
    """
    tokenizer = clip_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": CLIPTextModel(clip_config(tokenizer)),
            "unet": unet(cross_attention_dim=32, attention_head_dim=4),
            "vae": kl_autoencoder(0.18215),
        }
    scheduler = PNDMScheduler(skip_prk_steps=True, prediction_type=prediction_type, **STABLE_DIFFUSION_NOISE)
    return assembled(
        StableDiffusionPipeline,
        **networks,
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionXLPipeline:
    """A random Stable Diffusion XL pipeline of 480k weights that draws 16×16 images; as [`stable_diffusion`]."""
    tokenizer = clip_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": CLIPTextModel(clip_config(tokenizer)),
            "text_encoder_2": CLIPTextModelWithProjection(clip_config(tokenizer)),
            "unet": unet(**SDXL_UNET),
            "vae": kl_autoencoder(0.13025),
        }
    scheduler = EulerDiscreteScheduler(
        timestep_spacing="leading", prediction_type=prediction_type, **STABLE_DIFFUSION_NOISE
    )
    return assembled(
        StableDiffusionXLPipeline,
        **networks,
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        scheduler=scheduler,
        add_watermarker=False,
    )


def stable_diffusion_3(variant: str = "3", t5: bool = True, seed: int = 0) -> StableDiffusion3Pipeline:
    """A random Stable Diffusion 3 pipeline of 234k weights that draws 16×16 images; as [`stable_diffusion`].

    Args:
        variant (`str`, *optional*, defaults to `"3"`): or `"3.5"`, with normalised queries and keys and, as the medium
            size has it, a second attention in some blocks.
        t5 (`bool`, *optional*, defaults to `True`): whether there is a third text encoder.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `StableDiffusion3Pipeline`: on the CPU, float32.
    """
    tokenizer, tokenizer_3 = clip_tokenizer(), t5_tokenizer()
    newer = {"qk_norm": "rms_norm", "dual_attention_layers": (0,)} if variant == "3.5" else {}
    with seeded(seed):
        networks = {
            "text_encoder": CLIPTextModelWithProjection(clip_config(tokenizer)),
            "text_encoder_2": CLIPTextModelWithProjection(clip_config(tokenizer)),
            "transformer": SD3Transformer2DModel(
                sample_size=8,
                patch_size=1,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                caption_projection_dim=32,
                joint_attention_dim=64,  # both CLIP encoders side by side, and T5
                pooled_projection_dim=64,
                pos_embed_max_size=16,
                **newer,
            ),
            "vae": kl_autoencoder(1.5305, shift_factor=0.0609, **WITHOUT_QUANT_CONV),
            "text_encoder_3": t5_encoder(tokenizer_3, 64, tie_word_embeddings=False) if t5 else None,
        }
    return assembled(
        StableDiffusion3Pipeline,
        **networks,
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=tokenizer_3 if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(guidance_embeds: bool = True, seed: int = 0) -> FluxPipeline:
    """A random FLUX.1 pipeline of 177k weights that draws 16×16 images; as [`stable_diffusion`].

    Args:
        guidance_embeds (`bool`, *optional*, defaults to `True`): as FLUX.1-dev; without, as FLUX.1-schnell.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `FluxPipeline`: on the CPU, float32.
    """
    tokenizer, tokenizer_2 = clip_tokenizer(), t5_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": CLIPTextModel(clip_config(tokenizer)),
            "text_encoder_2": t5_encoder(tokenizer_2, 32, tie_word_embeddings=False),
            "transformer": FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,  # four channels of a 2×2 patch
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                axes_dims_rope=(4, 4, 8),
                guidance_embeds=guidance_embeds,
            ),
            "vae": kl_autoencoder(0.3611, shift_factor=0.1159, **WITHOUT_QUANT_CONV),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = assembled(FluxPipeline, **networks, tokenizer=tokenizer, tokenizer_2=tokenizer_2, scheduler=scheduler)
    pipeline.default_sample_size = 8  # 128, and so a megapixel, by default
    return pipeline


def wan(seed: int = 0, flow_shift: float = 3.0) -> WanPipeline:
    """A random Wan 2.1 pipeline of 57k weights whose sizes are multiples of 16 pixels and whose frames are 4·k + 1.

    Args:
        seed (`int`, *optional*, defaults to 0): seed of all weights.
        flow_shift (`float`, *optional*, defaults to 3.0): shift of the noise levels; 3 for 480p, 5 for 720p.

    Returns:
        `WanPipeline`: on the CPU, float32.
    """
    tokenizer = t5_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with seeded(seed):
        networks = {
            "text_encoder": t5_encoder(tokenizer, 32, UMT5EncoderModel, UMT5Config, **ids),
            "transformer": WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=16,
                out_channels=16,
                text_dim=32,
                freq_dim=32,
                ffn_dim=32,
                num_layers=2,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
            ),
            "vae": AutoencoderKLWan(
                base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
            ),
        }
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )
    return assembled(WanPipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)


def amused(downsample: bool = False, seed: int = 0) -> AmusedPipeline:
    """A random aMUSEd pipeline of 88k weights that draws 16×16 images from 8×8 tokens.

    Args:
        downsample (`bool`, *optional*, defaults to `False`): whether the transformer halves the grid inside.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `AmusedPipeline`: on the CPU, float32.
    """
    sizes = {"hidden_size": 32, "cond_embed_dim": 32, "micro_cond_encode_dim": 2, "micro_cond_embed_dim": 10}
    sizes |= {"encoder_hidden_size": 32, "vocab_size": 34, "codebook_size": 32, "in_channels": 16}
    sizes |= {"block_out_channels": 16, "num_res_blocks": 1, "block_num_heads": 1, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "intermediate_size": 32, "sample_size": 8}
    sizes |= {"downsample": downsample, "upsample": downsample}
    return _masked(AmusedPipeline, AmusedScheduler, UVit2DModel, sizes, seed)


def meissonic(downsample: bool = False, seed: int = 0) -> Pipeline:
    """The stand-in for Meissonic (`tests/meissonic_standin.py`), random, for 16×16 images of 8×8 tokens.

    Args:
        downsample (`bool`, *optional*, defaults to `False`): whether the transformer halves the grid inside.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `tests.meissonic_standin.Pipeline`: on the CPU, float32.
    """
    sizes = {"downsample": downsample, "upsample": downsample}
    return _masked(Pipeline, Scheduler, Transformer2DModel, sizes, seed)


def _masked(
    pipeline: type[AnyPipeline], scheduler: type, transformer: type, sizes: dict[str, Any], seed: int
) -> AnyPipeline:
    tokenizer = clip_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": CLIPTextModelWithProjection(clip_config(tokenizer)),
            "transformer": transformer(**sizes),
            "vqvae": vq_model(),
        }
    return assembled(pipeline, **networks, tokenizer=tokenizer, scheduler=scheduler(mask_token_id=33))
