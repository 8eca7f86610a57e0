"""
Train the shapes model that ships inside the package, from nothing, on a CPU.

    python scripts/build_shapes_model.py --output_dir tgol_trainer/shapes/pipeline

Three stages: the autoencoder, the denoiser together with the text encoder, and a measurement of the result (share of
samples whose colour and whose shape are right, the shape judged by a small classifier trained on drawn images). What
was run, how long it took and how good the result is goes to `build.json` beside the weights.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tgol_trainer.shapes.world import COLOURS, PROMPTS, RESOLUTION, SHAPES, colour_of, samples

MAX_TOKENS = 48


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Stack RGB images into a float32 tensor (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer: every UTF-8 text encodes, one token a byte."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)


def train_autoencoder(pixels: torch.Tensor, steps: int) -> AutoencoderKL:
    """Train the autoencoder and store the latent scaling factor in its config."""
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=RESOLUTION,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    average = EMAModel(vae.parameters(), decay=0.995)
    for step in (bar := trange(steps, desc="autoencoder")):
        x = pixels[torch.randint(0, len(pixels), (32,))].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(reconstruction, x)
        loss = mse + 0.2 * F.l1_loss(reconstruction, x) + 1e-6 * posterior.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.step(vae.parameters())
        if step % 100 == 0:
            bar.set_postfix(mse=f"{mse.item():.4f}")
    average.copy_to(vae.parameters())
    return vae.eval()


def train_denoiser(
    latents: torch.Tensor, ids: torch.Tensor, empty: torch.Tensor, tokenizer: CLIPTokenizer, steps: int
) -> tuple[UNet2DConditionModel, CLIPTextModel, DDPMScheduler, float]:
    """Train denoiser and text encoder together on scaled latents; return them with the scheduler and the last loss."""
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            projection_dim=64,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=latents.shape[-1],
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    ).to(memory_format=torch.channels_last)
    noise_scheduler = DDPMScheduler(
        num_train_timesteps=1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
    )
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    average = EMAModel(parameters, decay=0.998)
    running = 1.0
    for step in (bar := trange(steps, desc="denoiser")):
        rows = torch.randint(0, len(latents), (64,))
        x, tokens = latents[rows], ids[rows].clone()
        tokens[torch.rand(len(rows)) < 0.1] = empty
        t = torch.randint(0, 1000, (len(rows),))
        noise = torch.randn_like(x)
        prediction = unet(noise_scheduler.add_noise(x, noise, t), t, text_encoder(tokens)[0]).sample
        loss = F.mse_loss(prediction, noise)
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
    return unet.eval(), text_encoder.eval(), noise_scheduler, running


def train_shape_classifier(pixels: torch.Tensor, labels: torch.Tensor, steps: int = 600) -> torch.nn.Module:
    """A small convolutional judge of the drawn shape; used for measuring, not shipped."""
    layers: list[torch.nn.Module] = []
    for width_in, width_out in ((3, 16), (16, 32), (32, 64)):
        layers += [torch.nn.Conv2d(width_in, width_out, 3, padding=1), torch.nn.BatchNorm2d(width_out)]
        layers += [torch.nn.ReLU(), torch.nn.MaxPool2d(2)]
    judge = torch.nn.Sequential(*layers, torch.nn.Flatten(), torch.nn.Linear(64 * 16, len(SHAPES)))
    optimizer = torch.optim.AdamW(judge.parameters(), 2e-3)
    for _ in trange(steps, desc="shape judge"):
        rows = torch.randint(0, len(pixels), (128,))
        loss = F.cross_entropy(judge(pixels[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge.eval()


@torch.no_grad()
def measure(pipe: StableDiffusionPipeline, judge: torch.nn.Module, drawn: tuple[torch.Tensor, torch.Tensor]) -> dict:
    """Quality of 480 samples (20 a prompt, DDIM 15 steps, guidance 3, seed 0)."""
    prompts = list(PROMPTS) * 20
    start = time.time()
    generator = torch.Generator().manual_seed(0)
    images: list[Image.Image] = []
    for first in range(0, len(prompts), 96):
        chunk = prompts[first : first + 96]
        images += pipe(chunk, num_inference_steps=15, guidance_scale=3.0, generator=generator).images
    seconds = time.time() - start
    palette = np.array(list(COLOURS.values()))
    centres = np.stack([np.asarray(image)[14:18, 14:18].reshape(-1, 3).mean(0) for image in images])
    nearest = np.abs(centres[:, None] - palette).sum(-1).argmin(1)
    named = [list(COLOURS.values()).index(colour_of(prompt)) for prompt in prompts]
    shape = torch.tensor([SHAPES.index(prompt.split()[-1]) for prompt in prompts])
    return {
        "samples": len(prompts),
        "colour_right": float((nearest == np.array(named)).mean()),
        "shape_right": float((judge(to_tensor(images)).argmax(1) == shape).float().mean()),
        "shape_right_on_drawn_images": float((judge(drawn[0]).argmax(1) == drawn[1]).float().mean()),
        "images_per_second": round(len(prompts) / seconds, 1),
    }


def main() -> None:
    """Parse arguments, train, measure, save."""
    parser = argparse.ArgumentParser(description="Train the embedded shapes model.")
    parser.add_argument("--output_dir", type=Path, default=Path("tgol_trainer/shapes/pipeline"))
    parser.add_argument("--vae_steps", type=int, default=4000)
    parser.add_argument("--unet_steps", type=int, default=5000)
    parser.add_argument("--num_images", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    start = time.time()
    captions, _, shapes, images = zip(*samples(args.num_images, args.seed), strict=True)
    pixels = to_tensor(list(images))
    tokenizer = build_tokenizer()
    options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(list(captions), **options).input_ids
    empty = tokenizer([""], **options).input_ids[0]

    vae = train_autoencoder(pixels, args.vae_steps)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
        held_out = to_tensor([image for *_, image in samples(512, args.seed + 1)])
        reconstruction_mse = F.mse_loss(vae.decode(vae.encode(held_out).latent_dist.mean).sample, held_out).item()
    scaling_factor = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scaling_factor)
    vae_seconds = time.time() - start
    unet, text_encoder, noise_scheduler, loss = train_denoiser(
        latents * scaling_factor, ids, empty, tokenizer, args.unet_steps
    )
    training_seconds = time.time() - start

    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(noise_scheduler.config, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    # Shipped in half precision, measured as shipped: rounded to float16, run in float32.
    for module in (vae, text_encoder, unet):
        module.to(torch.float16)
    pipe.save_pretrained(args.output_dir)
    for module in (vae, text_encoder, unet):
        module.to(torch.float32)
    judged = torch.tensor([SHAPES.index(shape) for shape in shapes])
    judge = train_shape_classifier(pixels[:-1024], judged[:-1024])
    modules = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    record = {
        "command": f"python scripts/build_shapes_model.py --vae_steps {args.vae_steps} --unet_steps {args.unet_steps} "
        f"--num_images {args.num_images} --seed {args.seed} --threads {args.threads}",
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        "seconds": {"autoencoder": round(vae_seconds), "training": round(training_seconds)},
        "autoencoder_mse_held_out": round(reconstruction_mse, 5),
        "denoiser_loss": round(loss, 4),
        "quality": measure(pipe, judge, (pixels[-1024:], judged[-1024:])),
        "torch": torch.__version__,
    }
    (args.output_dir / "build.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
