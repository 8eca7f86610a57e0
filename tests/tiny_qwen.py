"""Random pipelines, as in `tests/tiny.py`, of Qwen-Image, whose text encoders are language models that see images."""

from typing import Any

from diffusers import (
    AutoencoderKLQwenImage,
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from transformers import (
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from tests.tiny import assembled, seeded
from tests.tiny_language import SIZES, chat_tokenizer

WIDTH = SIZES["hidden_size"]
"""Of the text encoders."""

SHIFT = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 0.9, "max_image_seq_len": 8192}
"""How the scheduler of Qwen-Image shifts noise levels with the resolution."""


class TextProcessor(ProcessorMixin):
    """A processor of text alone: that of Qwen3-VL needs torchvision for its videos."""

    tokenizer_class = "AutoTokenizer"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        super().__init__(tokenizer, chat_template=chat_template)

    def __call__(self, text: str | list[str], **options: Any) -> BatchFeature:
        """Tokens of a batch, also of one text alone."""
        return super().__call__(text=[text] if isinstance(text, str) else text, **options)


def vision_language(tokenizer: PreTrainedTokenizerBase, model: type, config: type, **vision: Any) -> Any:
    """A random Qwen-VL; its part for images is as small as it may be."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    ids = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "rope_parameters": rope, **SIZES, **ids}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        **vision,
    }
    return model(config(text_config=text, vision_config=vision))


def qwen_image(seed: int = 0) -> QwenImagePipeline:
    """A random Qwen-Image pipeline that draws 16×16 images."""
    tokenizer = chat_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": vision_language(tokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
            "transformer": QwenImageTransformer2DModel(
                in_channels=64,  # 16 channels of a 2×2 patch
                out_channels=16,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=WIDTH,
                axes_dims_rope=(4, 6, 6),
            ),
            "vae": AutoencoderKLQwenImage(
                base_dim=3, z_dim=16, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False]
            ),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(**SHIFT)
    pipeline = assembled(QwenImagePipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)
    pipeline.default_sample_size = 8  # 128, and so a megapixel, by default
    return pipeline


def qwen_image_21(seed: int = 0) -> QwenImage21Pipeline:
    """A random Qwen-Image 2.1 pipeline whose sizes are multiples of 32 pixels."""
    tokenizer = chat_tokenizer()
    with seeded(seed):
        networks = {
            "text_encoder": vision_language(tokenizer, Qwen3VLForConditionalGeneration, Qwen3VLConfig),
            "transformer": QwenImage21Transformer2DModel(
                in_channels=8,
                out_channels=8,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                context_in_dim=WIDTH,
                mlp_ratio=1,
                axes_dims_rope=(4, 6, 6),
            ),
            "vae": AutoencoderKLQwenImage21(
                base_dim=4,
                decoder_base_dim=4,
                z_dim=8,
                dim_mult=[1, 1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[0.5, -0.5, 0.1, 0.2, 0.3, -0.1, -0.2, -0.3],
                latents_std=[1.5, 0.5, 2.0, 1.0, 0.8, 1.2, 1.1, 0.9],
            ),
        }
    scheduler = FlowMatchEulerDiscreteScheduler(**SHIFT)
    processor = TextProcessor(tokenizer, tokenizer.chat_template)
    return assembled(QwenImage21Pipeline, **networks, processor=processor, scheduler=scheduler)
