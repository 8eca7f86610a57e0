"""
Train a masked-token twin of the shapes model, an `AmusedPipeline` of 32×32 images, from nothing, on a CPU.

    python scripts/build_shapes_masked_model.py --vq_steps 2000 --transformer_steps 2000 --num_images 8192

Three stages: the VQ autoencoder (64 codes, 8×8 tokens an image), the transformer together with the text encoder, and
a measurement: the share of samples whose centre is nearest to the colour named. What was run, how long it took and how
good the result is goes to `build.json` beside the weights, which are stored in float16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from build_shapes_model import MAX_TOKENS, build_tokenizer, to_tensor
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel
from diffusers.training_utils import EMAModel
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from tgol_trainer.likelihoods import MaskedTokenLikelihood, RowGenerators
from tgol_trainer.shapes.world import COLOURS, PROMPTS, RESOLUTION, colour_of, samples

CODES = 64
WIDTH = 96


def train_autoencoder(pixels: torch.Tensor, steps: int) -> VQModel:
    """Train the VQ autoencoder on pixels (N, 3, 32, 32) in [0, 1]; codes out of use are moved."""
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
    optimizer = torch.optim.AdamW(vq.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    used = torch.zeros(CODES)
    for step in (bar := trange(steps, desc="autoencoder")):
        x = pixels[torch.randint(0, len(pixels), (32,))]
        latents = vq.encode(x).latents
        with torch.no_grad():
            used += torch.bincount(vq.quantize(latents)[2][2].flatten(), minlength=CODES)
        reconstruction, commitment = vq.decode(latents, return_dict=False)
        mse = F.mse_loss(reconstruction, x)
        loss = mse + 0.2 * F.l1_loss(reconstruction, x) + commitment.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        schedule.step()
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


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModelWithProjection:
    """A text encoder of three layers: its last layer but one is what the transformer attends to."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=64,
    )
    return CLIPTextModelWithProjection(config)


def train_transformer(
    codes: torch.Tensor, ids: torch.Tensor, empty: torch.Tensor, tokenizer: CLIPTokenizer, args: argparse.Namespace
) -> tuple[UVit2DModel, CLIPTextModelWithProjection, float]:
    """Train transformer and text encoder together on masked codes (N, 8, 8); return them with the last loss."""
    text_encoder = build_text_encoder(tokenizer)
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
    family = MaskedTokenLikelihood(mask_token_id=CODES)
    parameters = [*transformer.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=args.transformer_steps)
    average = EMAModel(parameters, decay=0.998)
    sizes = torch.tensor([[RESOLUTION, RESOLUTION, 0.0, 0.0, 6.0]])
    running = float(np.log(CODES))
    for step in (bar := trange(args.transformer_steps, desc="transformer")):
        rows = torch.randint(0, len(codes), (48,))
        tokens = ids[rows].clone()
        tokens[torch.rand(len(rows)) < 0.1] = empty
        text = text_encoder(tokens, output_hidden_states=True)
        draw = family.draw(codes[rows], RowGenerators(args.seed, step, range(len(rows))))
        logits = transformer(draw.inputs, text.hidden_states[-2], text.text_embeds, sizes.expand(len(rows), -1))
        loss = family.error(logits, draw).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        average.step(parameters)
        running = 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
    average.copy_to(parameters)
    return transformer.eval(), text_encoder.eval(), running


@torch.no_grad()
def measure(pipe: AmusedPipeline, per_prompt: int) -> dict[str, float]:
    """Quality of samples of the 24 prompts (12 steps, guidance 3, seed 0)."""
    prompts = list(PROMPTS) * per_prompt
    start = time.time()
    generator = torch.Generator().manual_seed(0)
    images = pipe(prompts, num_inference_steps=12, guidance_scale=3.0, generator=generator).images
    seconds = time.time() - start
    palette = np.array(list(COLOURS.values()))
    centres = np.stack([np.asarray(image)[14:18, 14:18].reshape(-1, 3).mean(0) for image in images])
    nearest = np.abs(centres[:, None] - palette).sum(-1).argmin(1)
    named = np.array([list(COLOURS.values()).index(colour_of(prompt)) for prompt in prompts])
    return {
        "samples": len(prompts),
        "colour_right": float((nearest == named).mean()),
        "images_per_second": round(len(prompts) / seconds, 1),
    }


def main() -> None:
    """Parse arguments, train, measure, save."""
    parser = argparse.ArgumentParser(description="Train the masked-token twin of the shapes model.")
    parser.add_argument("--output_dir", type=Path, default=Path("tgol_trainer/shapes/masked_pipeline"))
    parser.add_argument("--vq_steps", type=int, default=2500)
    parser.add_argument("--transformer_steps", type=int, default=3000)
    parser.add_argument("--num_images", type=int, default=16384)
    parser.add_argument("--samples_per_prompt", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    start = time.time()
    captions, _, _, images = zip(*samples(args.num_images, args.seed), strict=True)
    pixels = (to_tensor(list(images)) + 1) / 2
    tokenizer = build_tokenizer()
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(list(captions), **options).input_ids
    empty = tokenizer([""], **options).input_ids[0]

    vq = train_autoencoder(pixels, args.vq_steps)
    codes = encode(vq, pixels)
    with torch.no_grad():
        held_out = vq(pixels[-256:]).sample
    vq_seconds = time.time() - start
    transformer, text_encoder, loss = train_transformer(codes, ids, empty, tokenizer, args)
    seconds = time.time() - start - vq_seconds

    modules = {"vqvae": vq, "text_encoder": text_encoder, "transformer": transformer}
    pipe = AmusedPipeline(tokenizer=tokenizer, scheduler=AmusedScheduler(mask_token_id=CODES), **modules)
    pipe.set_progress_bar_config(disable=True)
    quality = measure(pipe, args.samples_per_prompt)
    pipe.to(torch.float16).save_pretrained(args.output_dir)
    record = {
        "command": f"python scripts/build_shapes_masked_model.py --vq_steps {args.vq_steps} --transformer_steps "
        f"{args.transformer_steps} --num_images {args.num_images} --seed {args.seed} --threads {args.threads}",
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        "seconds": {"autoencoder": round(vq_seconds), "training": round(seconds)},
        "autoencoder_mse_held_out": round(F.mse_loss(held_out, pixels[-256:]).item(), 5),
        "codes_used": len(codes.unique()),
        "transformer_loss": round(loss, 4),
        "quality": quality,
        "torch": torch.__version__,
    }
    (args.output_dir / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
