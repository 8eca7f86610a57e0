"""Kolors."""

from __future__ import annotations

from .stable_diffusion_xl import StableDiffusionXLFamily


class KolorsFamily(StableDiffusionXLFamily):
    """
    `KolorsPipeline`: SDXL's UNet and autoencoder with ChatGLM3 as text encoder, noise levels of 1100 steps.

    The UNet sees 256 tokens of each prompt, padding included, and the last token's layer as SDXL's pooled vector.
    diffusers has the class only where sentencepiece is installed, which its tokenizer needs.
    """

    required_components = ("unet", "vae", "text_encoder", "tokenizer")
    token_limits = {"tokenizer": 256}  # default of `encode_prompt`; the pipeline passes no other on
