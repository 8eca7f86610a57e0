"""The tiny pipeline of every family, and its likelihood once more from the formula and the raw components."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from diffusers import DiffusionPipeline, FluxPipeline

from tests import (
    tiny,
    tiny_images,
    tiny_kandinsky,
    tiny_kolors,
    tiny_language,
    tiny_layers,
    tiny_ltx,
    tiny_qwen,
    tiny_video,
)
from tests.conftest import scored_dataset
from tgol_trainer.likelihoods import RowGenerators

PROMPTS = ["a cat", "two dogs"]
GEOMETRY = torch.tensor([[24, 20, 2, 0], [16, 32, 0, 8]])
KEYS = RowGenerators(0, 0, [5, 6])


def clip(tokenizer, encoder):
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    return encoder(tokens, output_hidden_states=True)


def t5(tokenizer, encoder, length, masked=False):
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    if not masked:
        return encoder(tokens.input_ids)[0]
    return encoder(tokens.input_ids, tokens.attention_mask)[0] * tokens.attention_mask[..., None]


def mean_square(difference):
    return (difference**2).flatten(1).mean(1)


def noised_by_ddpm(z):
    """√ā·z + √(1-ā)·ε at t uniform on 0..999, with the β of Stable Diffusion; t; ε; and v = √ā·ε - √(1-ā)·z."""
    t, noise = KEYS.integers("timestep", 1000), KEYS.normal("noise", z)
    alpha = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[t].view(-1, 1, 1, 1)
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    return signal * z + sigma * noise, t, noise, signal * noise - sigma * z


def noised_by_flow(z, place, shift):
    """(1-σ)·z + σ·ε and ε - z, with s = 1 - floor(1000·place)/1000 and σ = shift·s/(1 + (shift - 1)·s); σ (2,)."""
    linear = 1 - (1000 * place).floor() / 1000
    sigma = shift * linear / (1 + (shift - 1) * linear)
    wide, noise = sigma.view(-1, *[1] * (z.dim() - 1)), KEYS.normal("noise", z)
    return (1 - wide) * z + wide * noise, noise - z, sigma


def sd_error(pipe, pixels, velocity=False):
    x, t, noise, v = noised_by_ddpm(pipe.vae.encode(pixels).latent_dist.mode() * 0.18215)
    text = clip(pipe.tokenizer, pipe.text_encoder).last_hidden_state
    return mean_square(pipe.unet(x, t, text).sample - (v if velocity else noise))


def sdxl_error(pipe, pixels):
    x, t, noise, _ = noised_by_ddpm(pipe.vae.encode(pixels).latent_dist.mode() * 0.13025)
    first, second = clip(pipe.tokenizer, pipe.text_encoder), clip(pipe.tokenizer_2, pipe.text_encoder_2)
    text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    times = torch.tensor([[24, 20, 2, 0, 16, 16], [16, 32, 0, 8, 16, 16]]).float()
    added = {"text_embeds": second.text_embeds, "time_ids": times}
    return mean_square(pipe.unet(x, t, text, added_cond_kwargs=added).sample - noise)


def sd3_error(pipe, pixels):
    z = (pipe.vae.encode(pixels).latent_dist.mode() - 0.0609) * 1.5305
    first, second = clip(pipe.tokenizer, pipe.text_encoder), clip(pipe.tokenizer_2, pipe.text_encoder_2)
    third = torch.zeros(2, 256, 64)
    if pipe.text_encoder_3 is not None:
        third = t5(pipe.tokenizer_3, pipe.text_encoder_3, 256)
    text = torch.cat([torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1), third], 1)
    pooled = torch.cat([first.text_embeds, second.text_embeds], -1)
    place = 1 / (1 + torch.exp(-KEYS.normal("timestep", torch.zeros(2))))
    x, target, sigma = noised_by_flow(z, place, 3)
    return mean_square(pipe.transformer(x, text, pooled, 1000 * sigma).sample - target)


def flux_error(pipe, pixels):
    z = (pipe.vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
    x, target, sigma = noised_by_flow(z, KEYS.uniform("timestep"), 1)
    shape = z.shape
    output = pipe.transformer(
        FluxPipeline._pack_latents(x, *shape),
        t5(pipe.tokenizer_2, pipe.text_encoder_2, 512),
        clip(pipe.tokenizer, pipe.text_encoder).pooler_output,
        sigma,
        img_ids=FluxPipeline._prepare_latent_image_ids(2, shape[2] // 2, shape[3] // 2, "cpu", torch.float32),
        txt_ids=torch.zeros(512, 3),
        guidance=torch.tensor([3.5, 3.5]) if pipe.transformer.config.guidance_embeds else None,
    ).sample
    return mean_square(output - FluxPipeline._pack_latents(target, *shape))


def flux_unpacked(pipe, tokens, height, width):
    return FluxPipeline._unpack_latents(tokens, height, width, pipe.vae_scale_factor)


def wan_statistics(pipe):
    return (torch.tensor(pipe.vae.config[f"latents_{name}"]).view(1, 16, 1, 1, 1) for name in ("mean", "std"))


def wan_error(pipe, pixels):
    mean, std = wan_statistics(pipe)
    z = (pipe.vae.encode(pixels).latent_dist.mode() - mean) / std
    x, target, sigma = noised_by_flow(z, KEYS.uniform("timestep"), 3)
    text = t5(pipe.tokenizer, pipe.text_encoder, 512, masked=True)
    return mean_square(pipe.transformer(x, 1000 * sigma, text).sample - target)


def masked_error(pipe, pixels, side=None):
    """-(1/|M|)·Σ log p(code) with the codes nearest by brute force; `side` of Meissonic's grid, None for aMUSEd."""
    vq = pipe.vqvae
    features = vq.quant_conv(vq.encoder((pixels + 1) / 2)).permute(0, 2, 3, 1).reshape(2, 64, -1)
    codes = torch.cdist(features, vq.quantize.embedding.weight[None]).argmin(-1)
    assert len(codes.unique()) > 3
    ratio = torch.cos(KEYS.uniform("mask_ratio") * math.pi / 2)
    masked = codes.clone()
    for row, generator in enumerate(KEYS.generators("mask")):
        masked[row, torch.randperm(64, generator=generator) < max(1, round(64 * ratio[row].item()))] = 33
    text = clip(pipe.tokenizer, pipe.text_encoder)
    sizes = torch.tensor([[20.0, 24, 2, 0, 6], [32, 16, 0, 8, 6]])  # width, height, top, left, aesthetic score
    inputs = masked.view(2, 8, 8), text.hidden_states[-2], text.text_embeds
    if side is None:
        logits = pipe.transformer(*inputs, sizes)
    else:
        places = torch.tensor([[0.0, y, x] for y in range(side) for x in range(side)])
        logits = pipe.transformer(*inputs, 1000 * ratio, places, torch.zeros(77, 3), micro_conds=sizes)
    true = logits.permute(0, 2, 3, 1).reshape(2, 64, 32).softmax(-1).gather(-1, codes[..., None])[..., 0].log()
    return -torch.stack([true[row, masked[row] == 33].mean() for row in range(2)])


# ---- What else differs ----


def kl_reconstruction(pipe, pixels):
    return pipe.vae(pixels).sample


def code_reconstruction(pipe, pixels):
    return pipe.vqvae((pixels + 1) / 2).sample


def flux2_unpacked(pipe, tokens, height, width):
    side = 2 * pipe.vae_scale_factor
    return tokens.transpose(1, 2).unflatten(2, (height // side, width // side))


def qwen_unpacked(pipe, tokens, height, width):
    return pipe._unpack_latents(tokens, height, width, pipe.vae_scale_factor).squeeze(2)


def clip_reconstruction(pipe, pixels):
    return pipe.vae(pixels.unsqueeze(2)).sample.squeeze(2)


def opaque_reconstruction(pipe, pixels):
    return clip_reconstruction(pipe, torch.cat([pixels, torch.ones(2, 1, *pixels.shape[-2:])], 1))


def ltx_unpacked(pipe, tokens, height, width):
    return pipe._unpack_latents(tokens, 2, height // 32, width // 32)


def load_lora(pipe, folder):
    pipe.load_lora_weights(folder)


def load_into_transformer(pipe, folder):
    """The two lines of the card."""
    weights = "pytorch_lora_weights.safetensors"
    pipe.transformer.load_lora_adapter(folder, prefix="transformer", weight_name=weights)


def four_images() -> Dataset:
    return scored_dataset(num_rows=4)


def four_clips(height: int = 16, width: int = 32, num_frames: int = 6) -> Dataset:
    """Four random clips as arrays."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (4, num_frames, height, width, 3), dtype=np.uint8)
    columns = {"prompt": [f"clip {i % 3}" for i in range(4)], "score": rng.normal(size=4)}
    return Dataset.from_dict({**columns, "video": list(frames)})


@dataclass(frozen=True)
class Facts:
    """What differs between families."""

    build: Callable[[], DiffusionPipeline]
    error: Callable | None = None
    """Scores two images (or clips) and PROMPTS, (2,), from the formula; `test_conformance.py` needs none."""
    pixels: tuple[int, ...] = (3, 16, 16)
    latents: tuple[int, ...] = (4, 8, 8)
    sizes: tuple[tuple[int, int], int] = ((16, 16), 2)
    """The model's own height and width, and what sides are multiples of."""
    long_prompts: tuple[int, int] = (2, 77)
    """How many of three prompts of 32, 227 and 602 tokens (T5: 61, 301, 801) are cut, and the limit."""
    temperature: float = 0.001
    """1 where T does not apply."""
    sampled: bool = True
    """Whether the autoencoder's latents are a distribution."""
    reconstruct: Callable = kl_reconstruction
    """The autoencoder's own reconstruction of pixels."""
    load: Callable = load_lora
    dataset: Callable[[], Dataset] = four_images
    settings: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    """Arguments of generation."""
    learning_rate: float = 1e-3
    unguided: dict[str, Any] = field(default_factory=lambda: {"guidance_scale": 1.0})
    """Arguments with which the pipeline calls the denoiser once a step."""
    inverted: bool = False
    """Whether the scheduler's levels and times run from 0 (noise) to 1, and its velocity with them."""
    negated: bool = False
    """Whether the pipeline hands its scheduler latents - noise at times that fall."""
    unpack: Callable = lambda pipe, value, height, width: value
    """Latents as the family has them, of what the pipeline hands to its scheduler, and the image's size in pixels."""


_SD3 = {"error": sd3_error, "long_prompts": (2, 256)}
# Loaded from a folder, the pipeline's own size is what FluxPipeline says, 128 latents.
_FLUX = {"error": flux_error, "long_prompts": (1, 512), "sizes": ((16, 16), 4), "settings": {"resolution": 16}}
_FLUX |= {"unguided": {"guidance_scale": 3.5}, "unpack": flux_unpacked}
_FLUX2 = {
    "latents": (16, 4, 4),
    "sizes": ((16, 16), 4),
    "settings": {"resolution": 16},
    "unpack": flux2_unpacked,
    "learning_rate": 1e-2,
}
_MASKED = {
    "latents": (8, 8),
    "temperature": 1.0,
    "reconstruct": code_reconstruction,
    "load": load_into_transformer,
    "learning_rate": 3e-2,
}
_HALVED = {**_MASKED, "sizes": ((16, 16), 4)}
_WAN = {
    "pixels": (3, 5, 16, 32),
    "latents": (16, 2, 2, 4),
    "long_prompts": (1, 512),
    "dataset": four_clips,
    "settings": {"resolution": "16x32", "num_frames": 5},
    "call": {"height": 16, "width": 32, "num_frames": 5},
}
_LTX = {"pixels": (3, 5, 32, 64), "latents": (8, 2, 1, 2), "dataset": partial(four_clips, 32, 64)}
_LTX |= {"settings": {"resolution": "32x64", "num_frames": 5}, "unpack": ltx_unpacked}
_LTX |= {"call": {"height": 32, "width": 64, "num_frames": 5}}
# Modality guidance of 0 leaves what the transformer predicts of the video without the sound.
_LTX2 = {**_LTX, "sizes": ((512, 768), 32), "long_prompts": (0, 1024)}
_LTX2["unguided"] = {"guidance_scale": 1.0, "stg_scale": 0, "modality_scale": 0.0, "guidance_rescale": 0.0}
_COGVIDEOX = {"pixels": (3, 9, 16, 32), "latents": (4, 3, 2, 4), "sizes": ((16, 32), 16), "long_prompts": (2, 226)}
_COGVIDEOX |= {"dataset": partial(four_clips, num_frames=10), "settings": {"resolution": "16x32", "num_frames": 9}}
_COGVIDEOX |= {"call": {"height": 16, "width": 32, "num_frames": 9}}
_COGVIDEOX["unpack"] = lambda pipe, value, height, width: value.transpose(1, 2)
_MOCHI = {"pixels": (3, 7, 16, 32), "latents": (12, 2, 2, 4), "dataset": partial(four_clips, num_frames=8)}
_MOCHI |= {"settings": {"resolution": "16x32", "num_frames": 7}}
_MOCHI |= {"call": {"height": 16, "width": 32, "num_frames": 7}}
_SANA_VIDEO = {"pixels": (3, 5, 32, 64), "latents": (16, 2, 4, 8), "dataset": partial(four_clips, 32, 64)}
_SANA_VIDEO |= {"settings": {"resolution": "32x64", "num_frames": 5}}
_SANA_VIDEO |= {"call": {"height": 32, "width": 64, "frames": 5, "use_resolution_binning": False}}

TINY = {
    "sd": Facts(tiny.stable_diffusion, sd_error),
    "sd v": Facts(partial(tiny.stable_diffusion, "v_prediction"), partial(sd_error, velocity=True)),
    "sdxl": Facts(tiny.stable_diffusion_xl, sdxl_error),
    "sd3": Facts(tiny.stable_diffusion_3, **_SD3),
    "sd3.5": Facts(partial(tiny.stable_diffusion_3, "3.5"), **_SD3),
    "flux": Facts(tiny.flux, **_FLUX),
    "flux without guidance": Facts(partial(tiny.flux, guidance_embeds=False), **_FLUX),
    "wan": Facts(tiny.wan, wan_error, sizes=((480, 832), 16), **_WAN),
    "wan 2.2 a14b": Facts(tiny_video.wan_22_a14b, sizes=((480, 832), 16), **_WAN),
    "wan 2.2 5b": Facts(tiny_video.wan_22_5b, sizes=((704, 1280), 16), **_WAN),
    "skyreels v2": Facts(tiny_video.skyreels_v2, sizes=((544, 960), 16), **_WAN),
    "hunyuan video": Facts(
        tiny_video.hunyuan_video,
        sizes=((720, 1280), 16),
        **{**_WAN, "latents": (4, 2, 2, 4), "long_prompts": (2, 253)},
        unguided={},
    ),
    "ltx": Facts(tiny_ltx.ltx, sizes=((512, 704), 32), long_prompts=(2, 128), **_LTX),
    "ltx condition": Facts(
        tiny_ltx.ltx_condition, sizes=((512, 704), 32), long_prompts=(2, 256), negated=True, **_LTX
    ),
    "ltx-2": Facts(tiny_ltx.ltx2, **_LTX2),
    "krea-2": Facts(
        tiny_images.krea2,
        latents=(16, 8, 8),
        sizes=((1024, 1024), 4),
        long_prompts=(1, 392),
        settings={"resolution": 16},
        call={"height": 16, "width": 16},
        unguided={"guidance_scale": 0.0},
        unpack=lambda pipe, tokens, height, width: pipe._unpack_latents(tokens, height, width).squeeze(2),
        reconstruct=lambda pipe, pixels: pipe.vae(pixels.unsqueeze(2)).sample.squeeze(2),
    ),
    "ernie-image": Facts(
        tiny_images.ernie_image,
        latents=(16, 4, 4),
        sizes=((1024, 1024), 4),
        long_prompts=(0, 1024),
        settings={"resolution": 16},
        call={"height": 16, "width": 16},
    ),
    "sana": Facts(
        tiny_images.sana,
        pixels=(3, 32, 32),
        sizes=((32, 32), 4),
        long_prompts=(2, 299),
        dataset=partial(scored_dataset, 4, side=32),
        call={"height": 32, "width": 32, "use_resolution_binning": False},
        sampled=False,
    ),
    "lumina-2": Facts(
        tiny_images.lumina2,
        pixels=(3, 32, 32),
        latents=(4, 4, 4),
        sizes=((32, 32), 16),
        long_prompts=(2, 92),
        dataset=partial(scored_dataset, 4, side=32),
        call={"height": 32, "width": 32},
    ),
    "auraflow": Facts(
        tiny_images.aura_flow,
        sizes=((1024, 1024), 4),
        long_prompts=(2, 256),
        settings={"resolution": 16},
        call={"height": 16, "width": 16},
        learning_rate=1e-2,
    ),
    "cogview4": Facts(
        tiny_images.cogview4,
        sizes=((16, 16), 4),
        long_prompts=(0, 1024),
        call={"height": 16, "width": 16},
    ),
    "cogvideox": Facts(tiny_video.cogvideox, **_COGVIDEOX),
    "mochi": Facts(
        tiny_video.mochi,
        inverted=True,
        learning_rate=1e-2,
        sizes=((480, 848), 16),
        **{**_WAN, **_MOCHI, "long_prompts": (2, 256)},
    ),
    "kandinsky-5": Facts(
        tiny_kandinsky.kandinsky5_image,
        pixels=(3, 32, 32),
        latents=(4, 4, 4),
        sizes=((1024, 1024), 16),
        long_prompts=(1, 511),
        dataset=partial(scored_dataset, 4, side=32),
        settings={"resolution": 32},
        call={"height": 32, "width": 32},
        unpack=lambda pipe, value, height, width: value.squeeze(1).movedim(-1, 1),
    ),
    "kandinsky-5 video": Facts(
        tiny_kandinsky.kandinsky5_video,
        sizes=((512, 768), 16),
        unpack=lambda pipe, value, height, width: value[..., :4].movedim(-1, 1),
        **{**_WAN, "latents": (4, 2, 2, 4), "long_prompts": (1, 511)},
    ),
    "hidream": Facts(
        tiny_layers.hidream,
        sizes=((16, 16), 4),
        long_prompts=(2, 128),
        settings={"resolution": 16},
    ),
    "fibo": Facts(
        tiny_layers.bria_fibo,
        pixels=(3, 32, 64),
        latents=(16, 2, 4),
        sizes=((32, 32), 32),
        long_prompts=(0, 3000),
        settings={"resolution": 32},
        call={"height": 32, "width": 64},
        reconstruct=clip_reconstruction,
        unpack=lambda pipe, value, height, width: value.transpose(1, 2).unflatten(2, (height // 16, width // 16)),
    ),
    "ideogram-4": Facts(
        tiny_layers.ideogram4,
        latents=(16, 4, 4),
        sizes=((2048, 2048), 4),
        long_prompts=(0, 2029),
        settings={"resolution": 16},
        call={"height": 16, "width": 16, "guidance_scale": 7.0, "guidance_schedule": None},
        unguided={"guidance_scale": 1.0, "guidance_schedule": None},
        unpack=flux2_unpacked,
    ),
    "hunyuan video 1.5": Facts(
        tiny_video.hunyuan_video_15,
        sizes=((12, 20), 4),
        load=load_into_transformer,
        reconstruct=lambda pipe, pixels: torch.cat([pipe.vae(clip[None]).sample for clip in pixels]),
        unguided={},
        **{**_WAN, "latents": (4, 2, 4, 8), "long_prompts": (0, 981)},
    ),
    "sana-video": Facts(
        tiny_video.sana_video,
        sizes=((480, 832), 32),
        **{**_WAN, **_SANA_VIDEO, "long_prompts": (2, 299)},
    ),
    "chroma": Facts(tiny_images.chroma, **{**_FLUX, "error": None, "unguided": {"guidance_scale": 1.0}}),
    "z-image": Facts(
        tiny_language.z_image,
        latents=(4, 8, 8),
        sizes=((1024, 1024), 4),
        long_prompts=(1, 493),
        settings={"resolution": 16},
        call={"height": 16, "width": 16},
        unguided={"guidance_scale": 0.0},
    ),
    "flux.2": Facts(tiny_language.flux2, long_prompts=(1, 326), **_FLUX2, unguided={"guidance_scale": 3.5}),
    "flux.2 klein": Facts(tiny_language.flux2_klein, long_prompts=(1, 487), **_FLUX2),
    "qwen-image": Facts(
        tiny_qwen.qwen_image,
        latents=(16, 8, 8),
        sizes=((16, 16), 4),
        long_prompts=(1, 397),
        reconstruct=clip_reconstruction,
        settings={"resolution": 16},
        unguided={"true_cfg_scale": 1.0},
        unpack=qwen_unpacked,
    ),
    "qwen-image 2.1": Facts(
        tiny_qwen.qwen_image_21,
        pixels=(3, 32, 64),
        latents=(8, 2, 4),
        sizes=((1024, 1024), 32),
        long_prompts=(0, 1024),
        reconstruct=opaque_reconstruction,
        settings={"resolution": 32},
        call={"height": 32, "width": 64},
        unguided={},
        unpack=qwen_unpacked,
    ),
    "amused": Facts(tiny.amused, masked_error, **_MASKED),
    "meissonic": Facts(tiny.meissonic, partial(masked_error, side=8), **_MASKED),
}
if find_spec("sentencepiece"):
    TINY["kolors"] = Facts(tiny_kolors.kolors, long_prompts=(2, 256))
"""One entry a family: every test of `test_families.py` and `test_quantization.py` runs on it."""

SLOW = (
    *("cogview4", "kandinsky-5", "kandinsky-5 video", "hidream", "fibo", "ideogram-4", "hunyuan video 1.5"),
    *("cogvideox", "cogvideox 2b", "cogvideox 1.5", "mochi", "sana-video", "kolors", "ltx condition"),
)
"""Families of which the fast tests only compare predictions with the pipeline's; all else of them is slow."""

VARIANTS = TINY | {
    "ltx with a time for the decoder": Facts(
        partial(tiny_ltx.ltx, True), sizes=((512, 704), 32), long_prompts=(2, 128), **_LTX
    ),
    "ltx-2.3": Facts(partial(tiny_ltx.ltx2, "2.3"), **_LTX2),
    "cogvideox 1.5": Facts(partial(tiny_video.cogvideox, "1.5"), **{**_COGVIDEOX, "latents": (4, 4, 2, 4)}),
    "cogvideox 2b": Facts(partial(tiny_video.cogvideox, "2b"), **_COGVIDEOX),
    "sd3 without T5": Facts(partial(tiny.stable_diffusion_3, t5=False), sd3_error),
    "amused, halved grid": Facts(partial(tiny.amused, True), masked_error, **_HALVED),
    "meissonic, halved grid": Facts(partial(tiny.meissonic, True), partial(masked_error, side=4), **_HALVED),
}
"""Also what is another conditioning or grid, but trains as its family does."""
