"""A random Kolors pipeline, as in `tests/tiny.py`; needs sentencepiece, without which diffusers has no such class."""

import string
import tempfile
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler

from tests.tiny import SDXL_UNET, STABLE_DIFFUSION_NOISE, assembled, kl_autoencoder, seeded, unet


def chatglm_tokenizer() -> Any:
    """A tokenizer of single ASCII characters, two tokens before each prompt and padding on the left (107 ids)."""
    from diffusers.pipelines.kolors import ChatGLMTokenizer
    from sentencepiece import SentencePieceTrainer

    model, sizes = BytesIO(), {"vocab_size": 100, "model_type": "char", "character_coverage": 1.0}
    text = iter(["a " + string.printable.strip()] * 10)
    SentencePieceTrainer.train(sentence_iterator=text, model_writer=model, minloglevel=2, **sizes)
    file = Path(tempfile.mkdtemp()) / "tokenizer.model"
    file.write_bytes(model.getvalue())
    return ChatGLMTokenizer(str(file))


def kolors(seed: int = 0) -> Any:
    """A random Kolors pipeline that draws 16×16 images."""
    from diffusers import KolorsPipeline
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    tokenizer = chatglm_tokenizer()
    sizes = {"hidden_size": 32, "ffn_hidden_size": 64, "kv_channels": 8, "num_attention_heads": 4, "seq_length": 256}
    with seeded(seed):
        encoder = ChatGLMModel(
            ChatGLMConfig(
                num_layers=2,
                padded_vocab_size=tokenizer.vocab_size,
                add_qkv_bias=True,
                multi_query_attention=True,
                multi_query_group_num=2,
                original_rope=True,
                **sizes,
            ),
            empty_init=False,
        )
        for name, weight in encoder.named_parameters():
            if "norm" in name:  # left empty by the class
                torch.nn.init.ones_(weight)
        denoiser = unet(**SDXL_UNET, encoder_hid_dim_type="text_proj", encoder_hid_dim=32)
        networks = {"text_encoder": encoder, "unet": denoiser, "vae": kl_autoencoder(0.13025)}
    noise = {**STABLE_DIFFUSION_NOISE, "beta_end": 0.014, "num_train_timesteps": 1100}
    scheduler = EulerDiscreteScheduler(timestep_spacing="leading", **noise)
    return assembled(KolorsPipeline, **networks, tokenizer=tokenizer, scheduler=scheduler)
