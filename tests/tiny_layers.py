"""Random pipelines, as in `tests/tiny.py`, whose prompts are several layers of a language model."""

from diffusers import (
    AutoencoderKLWan,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
)
from transformers import (
    CLIPTextModelWithProjection,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3VLConfig,
    Qwen3VLModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.tiny import (
    WITHOUT_QUANT_CONV,
    assembled,
    clip_config,
    clip_tokenizer,
    kl_autoencoder,
    seeded,
    t5_encoder,
    t5_tokenizer,
)
from tests.tiny_images import flux_scheduler
from tests.tiny_language import SIZES, chat_tokenizer, flux2_autoencoder


def hidream(seed: int = 0) -> HiDreamImagePipeline:
    """A random HiDream pipeline that draws 16×16 images."""
    clip, words = clip_tokenizer(), t5_tokenizer()
    config = clip_config(clip)
    config.max_position_embeddings = 128
    llama = {"vocab_size": len(words), "num_hidden_layers": 2, "attn_implementation": "eager", **SIZES}
    ids = {"bos_token_id": None, "pad_token_id": words.pad_token_id, "eos_token_id": words.eos_token_id}
    with seeded(seed):
        networks = {
            "text_encoder": CLIPTextModelWithProjection(config),
            "text_encoder_2": CLIPTextModelWithProjection(config),
            "text_encoder_3": t5_encoder(words, 32, tie_word_embeddings=False),
            "text_encoder_4": LlamaForCausalLM(LlamaConfig(**llama, **ids)),
            "transformer": HiDreamImageTransformer2DModel(
                patch_size=2,
                in_channels=4,
                out_channels=4,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                caption_channels=[32, SIZES["hidden_size"]],
                text_emb_dim=64,
                axes_dims_rope=(8, 4, 4),
                max_resolution=(16, 16),
                llama_layers=[0, 1],
            ),
            "vae": kl_autoencoder(0.3611, shift_factor=0.1159, **WITHOUT_QUANT_CONV),
        }
    tokenizers = {"tokenizer": clip, "tokenizer_2": clip_tokenizer(), "tokenizer_3": words}
    tokenizers["tokenizer_4"] = t5_tokenizer()
    pipeline = assembled(
        HiDreamImagePipeline, **networks, **tokenizers, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
    )
    pipeline.default_sample_size = 8  # 128, and so a megapixel, by default
    return pipeline


def bria_fibo(seed: int = 0) -> BriaFiboPipeline:
    """A random FIBO pipeline; it takes the autoencoder's factor to be 16, and ours has that."""
    tokenizer = t5_tokenizer(3000)
    # The pipeline gives 128000 for an empty prompt, the beginning of a text of the real tokenizer.
    text = SmolLM3Config(vocab_size=128001, num_hidden_layers=3, pad_token_id=tokenizer.pad_token_id, **SIZES)
    with seeded(seed):
        networks = {
            "text_encoder": SmolLM3ForCausalLM(text),
            "transformer": BriaFiboTransformer2DModel(
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=2 * SIZES["hidden_size"],
                axes_dims_rope=[4, 6, 6],
                text_encoder_dim=SIZES["hidden_size"],
            ),
            "vae": AutoencoderKLWan(
                base_dim=4,
                decoder_base_dim=4,
                z_dim=16,
                in_channels=12,
                out_channels=12,
                patch_size=2,
                scale_factor_spatial=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
                is_residual=True,
            ),
        }
    pipeline = assembled(BriaFiboPipeline, **networks, tokenizer=tokenizer, scheduler=flux_scheduler())
    pipeline.default_sample_size = 2  # 64, and so a megapixel, by default
    return pipeline


def ideogram4(seed: int = 0) -> Ideogram4Pipeline:
    """A random Ideogram 4 pipeline that draws images of sides that are multiples of 4."""
    tokenizer = chat_tokenizer()
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 36, **SIZES}
    text["rope_scaling"] = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    vision = {"hidden_size": 8, "intermediate_size": 8, "depth": 1, "num_heads": 1, "out_hidden_size": 8}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    sizes = {"in_channels": 16, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 13 * 8, "mrope_section": (4, 2, 2)}
    with seeded(seed):
        networks = {
            "text_encoder": Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision)),
            "transformer": Ideogram4Transformer2DModel(**sizes),
            "unconditional_transformer": Ideogram4Transformer2DModel(**sizes),
            "vae": flux2_autoencoder(),
        }
    return assembled(Ideogram4Pipeline, **networks, tokenizer=tokenizer, scheduler=FlowMatchEulerDiscreteScheduler())
