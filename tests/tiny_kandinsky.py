"""Random pipelines of Kandinsky 5, as in `tests/tiny.py`."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2IPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from transformers import CLIPTextModel, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.tiny import WITHOUT_QUANT_CONV, AnyPipeline, assembled, clip_config, clip_tokenizer, kl_autoencoder, seeded
from tests.tiny_language import SIZES, chat_tokenizer
from tests.tiny_qwen import TextProcessor, vision_language


def _parts(visual_cond: bool) -> dict[str, Any]:
    tokenizer, tokenizer_2 = chat_tokenizer(), clip_tokenizer()
    parts = {
        "tokenizer": TextProcessor(tokenizer, tokenizer.chat_template),
        "tokenizer_2": tokenizer_2,
        "text_encoder": vision_language(tokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig),
        "text_encoder_2": CLIPTextModel(clip_config(tokenizer_2)),
        "transformer": Kandinsky5Transformer3DModel(
            in_text_dim=SIZES["hidden_size"],
            in_text_dim2=32,
            time_dim=16,
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            visual_cond=visual_cond,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    for name, module in parts["transformer"].named_modules():
        if name.endswith("modulation"):
            torch.nn.init.normal_(module.out_layer.weight, std=0.3)  # zeros before training
    return parts


def _matched(pipeline: AnyPipeline) -> AnyPipeline:
    """Have the pipeline take away as many tokens as its template has before the prompt in so small a vocabulary."""
    before = pipeline.prompt_template.split("{}")[0]
    pipeline.prompt_template_encode_start_idx = len(pipeline.tokenizer(text=before).input_ids[0])
    return pipeline


def kandinsky5_image(seed: int = 0) -> Kandinsky5T2IPipeline:
    """A random Kandinsky 5 pipeline of images; it takes the autoencoder's factor to be 8."""
    with seeded(seed):
        networks = _parts(False)
        networks["vae"] = kl_autoencoder(0.3611, halvings=3, shift_factor=0.1159, **WITHOUT_QUANT_CONV)
    pipeline = _matched(assembled(Kandinsky5T2IPipeline, **networks))
    pipeline.resolutions = [(32, 32)]  # seven of a megapixel by default
    return pipeline


def kandinsky5_video(seed: int = 0) -> Kandinsky5T2VPipeline:
    """A random Kandinsky 5 pipeline of videos whose sizes are multiples of 16 pixels and whose frames are 4·k + 1."""
    sizes = {"latent_channels": 4, "block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2}
    with seeded(seed):
        networks = _parts(True)
        networks["vae"] = AutoencoderKLHunyuanVideo(**sizes)
    return _matched(assembled(Kandinsky5T2VPipeline, **networks))
