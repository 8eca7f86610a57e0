"""Random pipelines, as in `tests/tiny.py`, whose text encoders are language models with a chat template."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerBase,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.tiny import WITHOUT_QUANT_CONV, assembled, kl_autoencoder, seeded

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{{ message['content'][0]['text'] }}{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""That of Qwen3 in short, and the content of messages also in parts, as Mistral's processor has it."""

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
"""Those of a random language model."""


def chat_tokenizer() -> Qwen2Tokenizer:
    """A byte-level tokenizer without merges, one token a byte, with the signs of a chat (261 ids)."""
    tokens = [*sorted(ByteLevel.alphabet()), "<|endoftext|>"]
    signs = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(tokens)}, merges=[], model_max_length=1024, **signs
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<think>", "</think>"]})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def qwen3(tokenizer: PreTrainedTokenizerBase, num_layers: int, model: type = Qwen3Model) -> Qwen3Model:
    """A random Qwen3 of width 8."""
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    return model(Qwen3Config(vocab_size=len(tokenizer), num_hidden_layers=num_layers, **SIZES, **ids))


def z_image(seed: int = 0) -> ZImagePipeline:
    """A random Z-Image pipeline of 350k weights that draws images of sides that are multiples of 4."""
    tokenizer = chat_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": qwen3(tokenizer, 3),
            "transformer": ZImageTransformer2DModel(
                in_channels=4,
                dim=32,
                n_layers=1,
                n_refiner_layers=1,
                n_heads=2,
                n_kv_heads=2,
                cap_feat_dim=8,
                axes_dims=[4, 6, 6],
                axes_lens=[1024, 32, 32],
            ),
            "vae": kl_autoencoder(0.3611, shift_factor=0.1159, **WITHOUT_QUANT_CONV),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    return assembled(ZImagePipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)


def flux2(seed: int = 0) -> Flux2Pipeline:
    """A random FLUX.2 dev pipeline of 130k weights that draws 16×16 images; layers 10, 20 and 30 are the prompt."""
    tokenizer = chat_tokenizer()
    vision = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with seeded(seed):
        encoder = Mistral3ForConditionalGeneration(
            Mistral3Config(
                vision_config=PixtralVisionConfig(head_dim=8, image_size=32, patch_size=16, **vision).to_dict(),
                text_config=MistralConfig(vocab_size=len(tokenizer), num_hidden_layers=31, **SIZES).to_dict(),
            )
        )
        pipeline = _flux2(Flux2Pipeline, encoder, guidance_embeds=True)
    pipeline.register_modules(tokenizer=tokenizer)  # Pixtral's processor, which wraps such a one, needs torchvision
    return pipeline


def flux2_klein(seed: int = 0) -> Flux2KleinPipeline:
    """A random FLUX.2 klein base pipeline of 120k weights, as [`flux2`]; layers 9, 18 and 27 are the prompt."""
    tokenizer = chat_tokenizer()
    with seeded(seed):
        pipeline = _flux2(Flux2KleinPipeline, qwen3(tokenizer, 28, Qwen3ForCausalLM), guidance_embeds=False)
    pipeline.register_modules(tokenizer=tokenizer)
    return pipeline


def flux2_autoencoder() -> AutoencoderKLFlux2:
    """A random autoencoder of FLUX.2 with four channels and half the image's side, whose norm does something."""
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        layers_per_block=1,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def _flux2(
    kind: type[Flux2Pipeline | Flux2KleinPipeline], encoder: torch.nn.Module, guidance_embeds: bool
) -> Flux2Pipeline | Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        in_channels=16,  # four channels of a 2×2 patch
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,  # three layers of the language model
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipeline = assembled(
        kind,
        text_encoder=encoder,
        transformer=transformer,
        vae=flux2_autoencoder(),
        tokenizer=None,
        scheduler=scheduler,
    )
    pipeline.default_sample_size = 8  # 128, and so a megapixel, by default
    return pipeline
