"""Random pipelines of videos, as in `tests/tiny.py`."""

import itertools

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLMochi,
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from transformers import CLIPTextModel, LlamaConfig, LlamaModel, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from tests.tiny import assembled, clip_config, clip_tokenizer, seeded, t5_encoder, t5_tokenizer, wan
from tests.tiny_images import gemma2
from tests.tiny_language import SIZES, chat_tokenizer


def wan_22_a14b(seed: int = 0) -> WanPipeline:
    """[`wan`] with a second transformer for times below 875."""
    pipeline = wan(seed)
    with seeded(seed + 1):
        pipeline.register_modules(transformer_2=WanTransformer3DModel(**pipeline.transformer.config).eval())
    pipeline.register_to_config(boundary_ratio=0.875)
    return pipeline


def wan_22_5b(seed: int = 0) -> WanPipeline:
    """[`wan`] with a time for each token, and the autoencoder of Wan 2.2 5B: a quarter of each side, then patches."""
    pipeline = wan(seed)
    sizes = {"dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True], "is_residual": True}
    with seeded(seed):
        vae = AutoencoderKLWan(
            base_dim=4,
            decoder_base_dim=4,
            z_dim=16,
            in_channels=12,
            out_channels=12,
            patch_size=2,
            scale_factor_spatial=8,
            **sizes,
        )
    pipeline.register_to_config(expand_timesteps=True)
    parts = {**pipeline.components, "vae": vae.eval()}
    return WanPipeline(**parts, expand_timesteps=True)


def skyreels_v2(seed: int = 0) -> SkyReelsV2Pipeline:
    """A random SkyReels V2 pipeline with the other parts of [`wan`]."""
    parts = wan(seed, flow_shift=8.0).components
    known = {name: parts[name] for name in ("tokenizer", "text_encoder", "vae", "scheduler")}
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": 32}
    sizes |= {"freq_dim": 32, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32}
    with seeded(seed):
        transformer = SkyReelsV2Transformer3DModel(patch_size=(1, 2, 2), **sizes)
    return assembled(SkyReelsV2Pipeline, **known, transformer=transformer)


def hunyuan_video(seed: int = 0) -> HunyuanVideoPipeline:
    """A random HunyuanVideo pipeline whose sizes are multiples of 16 pixels and whose frames are 4·k + 1."""
    tokenizer, tokenizer_2 = chat_tokenizer(), clip_tokenizer()
    before = DEFAULT_PROMPT_TEMPLATE["template"].split("{}")[0]
    ends = [len(before) * part // 95 for part in range(96)]  # as many tokens as the pipeline takes away
    tokenizer.add_tokens(sorted({before[start:end] for start, end in itertools.pairwise(ends)}))
    with seeded(seed):
        networks = {
            "text_encoder": LlamaModel(LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=3, **SIZES)),
            "text_encoder_2": CLIPTextModel(clip_config(tokenizer_2)),
            "transformer": HunyuanVideoTransformer3DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=1,
                num_single_layers=1,
                num_refiner_layers=1,
                text_embed_dim=SIZES["hidden_size"],
                pooled_projection_dim=32,
                rope_axes_dim=(4, 6, 6),
            ),
            "vae": AutoencoderKLHunyuanVideo(
                latent_channels=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2
            ),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return assembled(
        HunyuanVideoPipeline, **networks, tokenizer=tokenizer, tokenizer_2=tokenizer_2, scheduler=scheduler
    )


def cogvideox(version: str = "5b", seed: int = 0) -> CogVideoXPipeline:
    """A random CogVideoX pipeline whose sizes are multiples of 16 pixels and whose frames are 8·k + 1.

    Args:
        version (`str`, *optional*, defaults to `"5b"`):
            or `"2b"`, with sines for positions; or `"1.5"`, which joins two latent frames.
        seed (`int`, *optional*, defaults to 0): seed of all weights.

    Returns:
        `CogVideoXPipeline`: on the CPU, float32.
    """
    tokenizer = t5_tokenizer()
    newer = {"patch_size_t": 2, "patch_bias": False} if version == "1.5" else {}
    with seeded(seed):
        networks = {
            "text_encoder": t5_encoder(tokenizer, 32, tie_word_embeddings=False),
            "transformer": CogVideoXTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                time_embed_dim=16,
                text_embed_dim=32,
                num_layers=2,
                sample_width=4,
                sample_height=2,
                sample_frames=9,
                use_rotary_positional_embeddings=version != "2b",
                **newer,
            ),
            "vae": AutoencoderKLCogVideoX(
                block_out_channels=(4, 4, 4, 4), latent_channels=4, layers_per_block=1, norm_num_groups=2
            ),
        }
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0 if version == "2b" else 1.0,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
    )
    return assembled(CogVideoXPipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)


def mochi(seed: int = 0) -> MochiPipeline:
    """A random Mochi pipeline whose sizes are multiples of 16 pixels and whose frames are 6·k + 1."""
    tokenizer = t5_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": t5_encoder(tokenizer, 32, tie_word_embeddings=False),
            "transformer": MochiTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=24,  # 128 channels in the feed-forward
                num_layers=2,
                pooled_projection_dim=16,
                in_channels=12,
                text_embed_dim=32,
                time_embed_dim=16,
            ),
            "vae": AutoencoderKLMochi(
                encoder_block_out_channels=(32,) * 4,
                decoder_block_out_channels=(32,) * 4,
                layers_per_block=(1, 1, 1, 1, 1),
                add_attention_block=(False,) * 5,
            ),
        }
        torch.nn.init.normal_(networks["transformer"].pos_frequencies)  # zeros before training
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return assembled(
        MochiPipeline, **networks, tokenizer=tokenizer, scheduler=scheduler, force_zeros_for_empty_prompt=True
    )


def sana_video(seed: int = 0) -> SanaVideoPipeline:
    """A random Sana-Video pipeline with the autoencoder of [`wan`], whose sizes are multiples of 32 pixels."""
    tokenizer = t5_tokenizer(2048)
    with seeded(seed):
        networks = {
            "text_encoder": gemma2(tokenizer),
            "transformer": SanaVideoTransformer3DModel(
                in_channels=16,
                out_channels=16,
                num_attention_heads=2,
                attention_head_dim=12,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=12,
                cross_attention_dim=24,
                caption_channels=16,
                rope_max_seq_len=32,
            ),
            "vae": wan(seed).vae,
        }
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0, num_train_timesteps=1000
    )
    return assembled(SanaVideoPipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)


def hunyuan_video_15(seed: int = 0) -> HunyuanVideo15Pipeline:
    """A random HunyuanVideo 1.5 pipeline whose sizes are multiples of 4 pixels and whose frames are 4·k + 1."""
    tokenizer, tokenizer_2 = chat_tokenizer(), t5_tokenizer()
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    text = Qwen2_5_VLTextConfig(vocab_size=len(tokenizer), num_hidden_layers=3, rope_parameters=rope, **SIZES)
    with seeded(seed):
        networks = {
            "text_encoder": Qwen2_5_VLTextModel(text),
            "text_encoder_2": t5_encoder(tokenizer_2, 16, tie_word_embeddings=False),
            "transformer": HunyuanVideo15Transformer3DModel(
                in_channels=9,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=16,
                num_layers=2,
                num_refiner_layers=1,
                text_embed_dim=SIZES["hidden_size"],
                text_embed_2_dim=16,
                image_embed_dim=8,
                rope_axes_dim=(4, 6, 6),
                target_size=16,
                task_type="t2v",
            ),
            "vae": AutoencoderKLHunyuanVideo15(
                latent_channels=4,
                block_out_channels=(32, 32, 32),
                layers_per_block=1,
                spatial_compression_ratio=4,
                temporal_compression_ratio=4,
            ),
        }
    parts = {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2, "guider": ClassifierFreeGuidance(guidance_scale=6.0)}
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    pipeline = assembled(HunyuanVideo15Pipeline, **networks, **parts, scheduler=scheduler)
    before = tokenizer.apply_chat_template([{"role": "system", "content": pipeline.system_message}], tokenize=False)
    pipeline.prompt_template_encode_start_idx = len(tokenizer(before).input_ids)
    return pipeline
