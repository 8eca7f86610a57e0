"""
Train a masked-token twin of the shapes model, an `AmusedPipeline` of 32×32 images, from nothing, on a CPU.

    python scripts/build_shapes_masked_model.py --vq_steps 2000 --transformer_steps 2000 --num_images 8192

There are three stages: train the VQ autoencoder (64 codes, 8×8 tokens per image), train the transformer together with
the text encoder, and measure the share of samples whose centre is nearest to the colour that the prompt names. The
command, the time each stage took and the quality go to `build.json` beside the weights, which are stored in float16.
"""

from __future__ import annotations

import argparse
import math
import time

import torch
import torch.nn.functional as F
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from shapes_build import (
    DrawnImages,
    Updates,
    build_tokenizer,
    colour_right,
    parse_arguments,
    text_config,
    train_denoiser,
    write_record,
)
from tqdm import trange
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from tgol_trainer.likelihoods import MaskedTokenLikelihood, RowGenerators
from tgol_trainer.shapes.world import PROMPTS, RESOLUTION

CODES = 64
WIDTH = 96


def train_autoencoder(pixels: torch.Tensor, steps: int) -> VQModel:
    """Train the VQ autoencoder on pixels (N, 3, 32, 32) in [0, 1]; unused codes are moved to latents."""
    vq = VQModel(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        norm_num_groups=8,
        num_vq_embeddings=CODES,
        sample_size=RESOLUTION,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    updates = Updates(vq.parameters(), 2e-3, steps)
    used = torch.zeros(CODES)
    for step in (bar := trange(steps, desc="autoencoder")):
        x = pixels[torch.randint(0, len(pixels), (32,))]
        latents = vq.encode(x).latents
        with torch.no_grad():
            used += torch.bincount(vq.quantize(latents)[2][2].flatten(), minlength=CODES)
        reconstruction, commitment = vq.decode(latents, return_dict=False)
        mse = F.mse_loss(reconstruction, x)
        loss = mse + 0.2 * F.l1_loss(reconstruction, x) + commitment.mean()
        updates.take(loss)
        if step % 25 == 0:
            bar.set_postfix(mse=f"{mse.item():.4f}", codes=int((used > 0).sum()))
            if step < steps // 2:
                _revive(vq, latents.detach(), used)
            used.zero_()
    return vq.eval()


def _revive(vq: VQModel, latents: torch.Tensor, used: torch.Tensor) -> None:
    dead = (used == 0).nonzero()[:, 0]
    places = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    vq.quantize.embedding.weight.data[dead] = places[torch.randint(0, len(places), (len(dead),))]


@torch.no_grad()
def encode(vq: VQModel, pixels: torch.Tensor) -> torch.Tensor:
    """Code ids (N, 8, 8) of pixels (N, 3, 32, 32) in [0, 1]."""
    parts = []
    for x in pixels.split(256):
        latents = vq.encode(x).latents
        parts.append(vq.quantize(latents)[2][2].reshape(len(x), *latents.shape[-2:]))
    return torch.cat(parts)


def train_transformer(
    codes: torch.Tensor, drawn: DrawnImages, tokenizer: CLIPTokenizer, args: argparse.Namespace
) -> tuple[UVit2DModel, CLIPTextModelWithProjection, float]:
    """Train transformer and text encoder together on masked codes (N, 8, 8); return them with the last loss."""
    # Three layers, since the transformer attends to the last but one.
    text_encoder = CLIPTextModelWithProjection(text_config(tokenizer, num_layers=3))
    transformer = UVit2DModel(
        hidden_size=WIDTH,
        cond_embed_dim=64,
        micro_cond_encode_dim=4,
        micro_cond_embed_dim=20,
        encoder_hidden_size=64,
        vocab_size=CODES + 1,
        codebook_size=CODES,
        in_channels=64,
        block_out_channels=64,
        num_res_blocks=1,
        block_num_heads=4,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=2 * WIDTH,
        sample_size=codes.shape[-1],
    )
    likelihood = MaskedTokenLikelihood(mask_token_id=CODES)
    sizes = torch.tensor([[RESOLUTION, RESOLUTION, 0.0, 0.0, 6.0]])

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(0, len(codes), (48,))
        text = text_encoder(drawn.prompts_of(rows), output_hidden_states=True)
        draw = likelihood.draw(codes[rows], RowGenerators(args.seed, step, range(len(rows))))
        logits = transformer(draw.inputs, text.hidden_states[-2], text.text_embeds, sizes.expand(len(rows), -1))
        return likelihood.error(logits, draw).mean()

    loss = train_denoiser([transformer, text_encoder], loss_of, args.transformer_steps, math.log(CODES))
    return transformer, text_encoder, loss


@torch.no_grad()
def measure(pipe: AmusedPipeline, per_prompt: int) -> dict[str, float]:
    """Measure the quality of samples of the 24 prompts (12 steps, guidance 3, seed 0)."""
    prompts = list(PROMPTS) * per_prompt
    start = time.time()
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompts, num_inference_steps=12, guidance_scale=3.0, generator=generator).images
    seconds = time.time() - start
    return {
        "samples": len(prompts),
        "colour_right": colour_right(images, prompts),
        "images_per_second": round(len(prompts) / seconds, 1),
    }


def main() -> None:
    """Parse arguments, train, measure, save."""
    numbers = {"vq_steps": 2500, "transformer_steps": 3000}
    args = parse_arguments(
        "Train the masked-token twin of the shapes model.",
        "tgol_trainer/shapes/masked_pipeline",
        {**numbers, "samples_per_prompt": 20},
    )
    start = time.time()
    tokenizer = build_tokenizer()
    drawn = DrawnImages.draw(args.num_images, args.seed, tokenizer)
    pixels = (drawn.pixels + 1) / 2

    vq = train_autoencoder(pixels, args.vq_steps)
    codes = encode(vq, pixels)
    with torch.no_grad():
        held_out = vq(pixels[-256:]).sample
    vq_seconds = time.time() - start
    transformer, text_encoder, loss = train_transformer(codes, drawn, tokenizer, args)
    seconds = time.time() - start - vq_seconds

    modules = {"vqvae": vq, "text_encoder": text_encoder, "transformer": transformer}
    pipe = AmusedPipeline(tokenizer=tokenizer, scheduler=AmusedScheduler(mask_token_id=CODES), **modules)
    pipe.set_progress_bar_config(disable=True)
    quality = measure(pipe, args.samples_per_prompt)
    pipe.to(torch.float16).save_pretrained(args.output_dir)
    results = {
        "seconds": {"autoencoder": round(vq_seconds), "training": round(seconds)},
        "autoencoder_mse_held_out": round(F.mse_loss(held_out, pixels[-256:]).item(), 5),
        "codes_used": len(codes.unique()),
        "transformer_loss": round(loss, 4),
        "quality": quality,
    }
    write_record(args, list(numbers), modules, results)


if __name__ == "__main__":
    main()
