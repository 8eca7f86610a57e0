"""Random pipelines of images, as in `tests/tiny.py`: Sana, Lumina 2, AuraFlow, Chroma, Krea 2, ERNIE, CogView4."""

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLQwenImage,
    ChromaPipeline,
    ChromaTransformer2DModel,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from transformers import (
    Gemma2Config,
    Gemma2Model,
    GlmConfig,
    GlmModel,
    Mistral3Config,
    Mistral3Model,
    MistralConfig,
    PixtralVisionConfig,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny import WITHOUT_QUANT_CONV, assembled, kl_autoencoder, seeded, t5_encoder, t5_tokenizer
from tests.tiny_language import SIZES, chat_tokenizer, flux2_autoencoder


def gemma2(tokenizer: T5Tokenizer) -> Gemma2Model:
    """A random Gemma 2 of width 16."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, **sizes, **ids))


def flux_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the shifts of FLUX.1 by number of tokens."""
    shifts = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shifts)


def sana(seed: int = 0) -> SanaPipeline:
    """A random Sana pipeline that draws 32×32 images from latents of a quarter the side."""
    tokenizer = t5_tokenizer(2048)
    blocks = {
        f"{part}coder_block_types": ("ResBlock", "EfficientViTBlock", "EfficientViTBlock") for part in ("en", "de")
    }
    blocks |= {f"{part}coder_block_out_channels": (8, 8, 16) for part in ("en", "de")}
    blocks |= {f"{part}coder_layers_per_block": (1, 1, 1) for part in ("en", "de")}
    blocks |= {f"{part}coder_qkv_multiscales": ((), (), (5,)) for part in ("en", "de")}
    with seeded(seed):
        networks = {
            "text_encoder": gemma2(tokenizer),
            "transformer": SanaTransformer2DModel(
                in_channels=4,
                out_channels=4,
                num_attention_heads=2,
                attention_head_dim=8,
                num_layers=2,
                num_cross_attention_heads=2,
                cross_attention_head_dim=8,
                cross_attention_dim=16,
                caption_channels=16,
                sample_size=8,
            ),
            "vae": AutoencoderDC(latent_channels=4, attention_head_dim=2, scaling_factor=0.41407, **blocks),
        }
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    return assembled(SanaPipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)


def lumina2(seed: int = 0) -> Lumina2Pipeline:
    """A random Lumina 2 pipeline; it takes the autoencoder's factor to be 8, and ours has three halvings."""
    tokenizer = t5_tokenizer(2048)
    with seeded(seed):
        networks = {
            "text_encoder": gemma2(tokenizer),
            "transformer": Lumina2Transformer2DModel(
                sample_size=4,
                in_channels=4,
                hidden_size=24,
                num_layers=1,
                num_refiner_layers=1,
                num_attention_heads=2,
                num_kv_heads=1,
                multiple_of=16,
                axes_dim_rope=(4, 4, 4),
                axes_lens=(300, 16, 16),
                cap_feat_dim=16,
            ),
            "vae": kl_autoencoder(0.3611, halvings=3, shift_factor=0.1159, **WITHOUT_QUANT_CONV),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return assembled(Lumina2Pipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)


def aura_flow(seed: int = 0) -> AuraFlowPipeline:
    """A random AuraFlow pipeline that draws 16×16 images, and up to 64×64."""
    tokenizer = t5_tokenizer()
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    with seeded(seed):
        networks = {
            "text_encoder": t5_encoder(tokenizer, 32, UMT5EncoderModel, UMT5Config, **ids),
            "transformer": AuraFlowTransformer2DModel(
                sample_size=8,
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_mmdit_layers=1,
                num_single_dit_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                caption_projection_dim=32,
                pos_embed_max_size=256,
            ),
            "vae": kl_autoencoder(0.13025),
        }
        for blocks in (
            networks["transformer"].joint_transformer_blocks,
            networks["transformer"].single_transformer_blocks,
        ):
            torch.nn.init.normal_(blocks[0].norm1.linear.weight)  # gates that let the attention through
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.73)
    return assembled(AuraFlowPipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)


def chroma(seed: int = 0) -> ChromaPipeline:
    """A random Chroma pipeline that draws 16×16 images."""
    tokenizer = t5_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": t5_encoder(tokenizer, 32, tie_word_embeddings=False),
            "transformer": ChromaTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 4, 8),
                approximator_num_channels=8,
                approximator_hidden_dim=16,
                approximator_layers=1,
            ),
            "vae": kl_autoencoder(0.3611, shift_factor=0.1159, **WITHOUT_QUANT_CONV),
        }
    pipeline = assembled(ChromaPipeline, **networks, tokenizer=tokenizer, scheduler=flux_scheduler())
    pipeline.default_sample_size = 8  # 128, and so a megapixel, by default
    return pipeline


def krea2(seed: int = 0) -> Krea2Pipeline:
    """A random Krea 2 pipeline that draws 16×16 images; layers 1 and 3 of its language model are the prompt."""
    tokenizer = chat_tokenizer()
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 3, **SIZES}
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "depth": 1,
        "num_heads": 1,
        "out_hidden_size": SIZES["hidden_size"],
    }
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    with seeded(seed):
        networks = {
            "text_encoder": Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
            "transformer": Krea2Transformer2DModel(
                in_channels=64,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                num_key_value_heads=1,
                intermediate_size=32,
                timestep_embed_dim=16,
                text_hidden_dim=SIZES["hidden_size"],
                num_text_layers=2,
                text_num_attention_heads=2,
                text_num_key_value_heads=2,
                text_intermediate_size=16,
                num_layerwise_text_blocks=1,
                num_refiner_text_blocks=1,
                axes_dims_rope=(4, 6, 6),
            ),
            "vae": AutoencoderKLQwenImage(
                base_dim=3, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
            ),
        }
    networks |= {"tokenizer": tokenizer, "scheduler": flux_scheduler(), "text_encoder_select_layers": (1, 3)}
    return assembled(Krea2Pipeline, **networks)


def ernie_image(seed: int = 0) -> ErnieImagePipeline:
    """A random ERNIE-Image pipeline, without a prompt enhancer, that draws images of sides that are multiples of 4."""
    tokenizer = chat_tokenizer()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = MistralConfig(vocab_size=len(tokenizer), num_hidden_layers=2, **SIZES)
    vision = PixtralVisionConfig(head_dim=8, image_size=32, patch_size=16, **vision)
    with seeded(seed):
        networks = {
            "text_encoder": Mistral3Model(Mistral3Config(vision_config=vision, text_config=text)),
            "transformer": ErnieImageTransformer2DModel(
                hidden_size=32,
                num_attention_heads=2,
                num_layers=2,
                ffn_hidden_size=32,
                in_channels=16,
                out_channels=16,
                text_in_dim=SIZES["hidden_size"],
                rope_axes_dim=(4, 6, 6),
            ),
            "vae": flux2_autoencoder(),
        }
        for layer in (networks["transformer"].adaLN_modulation[-1], networks["transformer"].final_linear):
            torch.nn.init.normal_(layer.weight, std=0.1)  # zeros before training
    scheduler = FlowMatchEulerDiscreteScheduler(shift=4.0)
    return assembled(ErnieImagePipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)


def cogview4(seed: int = 0) -> CogView4Pipeline:
    """A random CogView4 pipeline that draws 16×16 images."""
    tokenizer = t5_tokenizer(1024)
    text = GlmConfig(vocab_size=len(tokenizer), num_hidden_layers=3, pad_token_id=tokenizer.pad_token_id, **SIZES)
    with seeded(seed):
        networks = {
            "text_encoder": GlmModel(text),
            "transformer": CogView4Transformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                text_embed_dim=SIZES["hidden_size"],
                time_embed_dim=16,
                condition_dim=4,
                sample_size=8,
                rope_axes_dim=(8, 8),
            ),
            "vae": kl_autoencoder(1.0, **WITHOUT_QUANT_CONV),
        }
    shifts = {"base_shift": 0.25, "max_shift": 0.75, "base_image_seq_len": 256, "time_shift_type": "linear"}
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, **shifts)
    return assembled(CogView4Pipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)
