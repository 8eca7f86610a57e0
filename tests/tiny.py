"""Random pipelines small enough to build inside a test: no download, nothing on disk, well under a second each."""

import string
from typing import Any

import torch
from diffusers import (
    AmusedPipeline,
    AmusedScheduler,
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
from tgol_trainer.adapters import POLICY


def clip_tokenizer(length: int = 77) -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: any UTF-8 text encodes, one token a byte (514 ids)."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=length)


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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(clip_config(tokenizer))
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        vae = kl_autoencoder(scaling_factor=0.18215)
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    return StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def clip_with_projection(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A random text encoder of two layers, 32 wide, whose pooled output has 32 numbers as well."""
    return CLIPTextModelWithProjection(clip_config(tokenizer))


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


def amused(downsample: bool = False, seed: int = 0) -> AmusedPipeline:
    """A random aMUSEd pipeline of 88k weights that draws 16×16 images from 8×8 tokens.

    Args:
        downsample (`bool`, *optional*, defaults to `False`): whether the transformer halves the grid inside.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `AmusedPipeline`: on the CPU, float32.
    """
    tokenizer = clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = clip_with_projection(tokenizer)
        transformer = UVit2DModel(
            hidden_size=32,
            cond_embed_dim=32,
            micro_cond_encode_dim=2,
            micro_cond_embed_dim=10,
            encoder_hidden_size=32,
            vocab_size=34,
            codebook_size=32,
            in_channels=16,
            block_out_channels=16,
            num_res_blocks=1,
            downsample=downsample,
            upsample=downsample,
            block_num_heads=1,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            sample_size=8,
        )
        vqvae = vq_model()
    return AmusedPipeline(
        vqvae=vqvae.eval(),
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        scheduler=AmusedScheduler(mask_token_id=33),
    )


def meissonic(downsample: bool = False, seed: int = 0) -> Pipeline:
    """The stand-in for Meissonic (`tests/meissonic_standin.py`), random, for 16×16 images of 8×8 tokens.

    Args:
        downsample (`bool`, *optional*, defaults to `False`): whether the transformer halves the grid inside.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `tests.meissonic_standin.Pipeline`: on the CPU, float32.
    """
    tokenizer = clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = clip_with_projection(tokenizer)
        transformer = Transformer2DModel(downsample=downsample, upsample=downsample)
        vqvae = vq_model()
    return Pipeline(
        vqvae=vqvae.eval(),
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        transformer=transformer.eval(),
        scheduler=Scheduler(mask_token_id=33),
    )


def t5_tokenizer(length: int = 512) -> T5Tokenizer:
    """A T5 (and UMT5) tokenizer of single ASCII characters: one token a character, a space and the end (97 ids)."""
    characters = string.ascii_letters + string.digits + string.punctuation
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -3.0) for c in characters)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    """Configuration of a CLIP text encoder of two layers and width 32 for a tokenizer of [`clip_tokenizer`]."""
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


def t5_encoder(tokenizer: T5Tokenizer, width: int) -> T5EncoderModel:
    """A random T5 encoder of two layers, with weights of the global generator."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=37,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def kl_autoencoder(**options: Any) -> AutoencoderKL:
    """A random KL autoencoder with four channels, half the image's side, with weights of the global generator."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        **options,
    ).eval()


def stable_diffusion_xl(prediction_type: str = "epsilon", seed: int = 0) -> StableDiffusionXLPipeline:
    """A random Stable Diffusion XL pipeline of 480k weights that draws 16×16 images; as [`stable_diffusion`]."""
    tokenizer = clip_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = CLIPTextModel(clip_config(tokenizer)).eval()
        text_encoder_2 = clip_with_projection(tokenizer).eval()
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            block_out_channels=(16, 32),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,  # both encoders side by side
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            norm_num_groups=4,
            transformer_layers_per_block=(1, 2),
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        )
        vae = kl_autoencoder(scaling_factor=0.13025)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet.eval(),
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder, text_encoder_2 = (clip_with_projection(tokenizer).eval() for _ in range(2))
        transformer = SD3Transformer2DModel(
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
        )
        vae = kl_autoencoder(
            scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False
        )
        text_encoder_3 = t5_encoder(tokenizer_3, 64)
    return StableDiffusion3Pipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        text_encoder_3=text_encoder_3 if t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=tokenizer_3 if t5 else None,
        transformer=transformer.eval(),
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder, text_encoder_2 = CLIPTextModel(clip_config(tokenizer)).eval(), t5_encoder(tokenizer_2, 32)
        transformer = FluxTransformer2DModel(
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
        )
        vae = kl_autoencoder(
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False
        )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    pipeline = FluxPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        transformer=transformer.eval(),
        scheduler=scheduler,
    )
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer),
                d_model=32,
                d_kv=8,
                d_ff=37,
                num_layers=2,
                num_heads=4,
                feed_forward_proj="gated-gelu",
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        transformer = WanTransformer3DModel(
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
        )
        vae = AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
        )
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=flow_shift
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=scheduler,
        transformer=transformer.eval(),
    )


def randomize_adapter(model: torch.nn.Module) -> None:
    """Add seeded noise to the policy's adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name and f".{POLICY}" in name:
            parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
