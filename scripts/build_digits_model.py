"""
Train the digits model of the alignment benchmark: a small Stable Diffusion pipeline of handwritten digits.

    pip install scikit-learn
    python scripts/build_digits_model.py

The pictures are the 1,797 digits that scikit-learn ships (8×8 pixels, from the UCI repository), enlarged to 32×32,
white on black and, inverted, black on white. The network has the architecture of the shapes model. It is no part of
the package: the benchmark reads it from `scripts/benchmarks/digits_pipeline`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_shapes_model import train_autoencoder, train_unet
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from shapes_build import MAX_TOKENS, DrawnImages, build_tokenizer, parse_arguments, to_tensor, write_record

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "benchmarks"))

from alignment_digits import NAMES, STYLES, load_digits  # noqa: E402


def prepared(seed: int, tokenizer: object) -> DrawnImages:
    """Return every digit in both styles, moved by up to two pixels in four versions, with its caption."""
    digits, labels = load_digits()
    rng = np.random.default_rng(seed)
    images, captions = [], []
    for _ in range(4):
        for digit, label in zip(digits, labels, strict=True):
            large = Image.fromarray((digit * 255).astype(np.uint8)).resize((32, 32), Image.Resampling.BICUBIC)
            moved = np.roll(np.asarray(large), rng.integers(-2, 3, 2), (0, 1))
            for style in STYLES:
                grey = moved if style == "white" else 255 - moved
                images.append(Image.fromarray(grey).convert("RGB"))
                captions.append(f"a {style} {NAMES[label]}")
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(captions, **options).input_ids  # type: ignore[operator]
    empty = tokenizer([""], **options).input_ids[0]  # type: ignore[operator]
    return DrawnImages(to_tensor(images), tuple(captions), ids, empty)


def main() -> None:
    """Parse arguments, train, save."""
    numbers = {"vae_steps": 2500, "unet_steps": 5000}
    folder = "scripts/benchmarks/digits_pipeline"
    args = parse_arguments("Train the digits model of the alignment benchmark.", folder, numbers)
    start = time.time()
    tokenizer = build_tokenizer()
    digits = prepared(args.seed, tokenizer)
    vae = train_autoencoder(digits.pixels, args.vae_steps)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in digits.pixels.split(256)])
        error = F.mse_loss(vae.decode(latents[:512]).sample, digits.pixels[:512]).item()
    scaling_factor = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scaling_factor)
    unet, text_encoder, noise_scheduler, loss = train_unet(
        latents * scaling_factor, digits, tokenizer, args.unet_steps
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(noise_scheduler.config, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    modules = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    for module in modules.values():
        module.to(torch.float16)
    pipeline.save_pretrained(args.output_dir)
    results = {
        "seconds": round(time.time() - start),
        "autoencoder_mse": round(error, 5),
        "denoiser_loss": round(loss, 4),
    }
    write_record(args, list(numbers), modules, results)


if __name__ == "__main__":
    main()
