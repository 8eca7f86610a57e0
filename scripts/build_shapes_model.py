"""
Train the shapes model that ships inside the package, from nothing, on a CPU.

    python scripts/build_shapes_model.py --output_dir tgol_trainer/shapes/pipeline

There are three stages: train the autoencoder, train the denoiser together with the text encoder, and measure the
result. The measurement is the share of samples whose colour is right and the share whose shape is right; a small
classifier, trained on drawn images, judges the shape. The command, the time each stage took and the quality go to
`build.json` beside the weights.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from PIL import Image
from shapes_build import (
    DrawnImages,
    Updates,
    build_tokenizer,
    colour_right,
    parse_arguments,
    text_config,
    to_tensor,
    train_denoiser,
    write_record,
)
from tqdm import trange
from transformers import CLIPTextModel, CLIPTokenizer

from tgol_trainer.shapes.world import PROMPTS, RESOLUTION, SHAPES, samples


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
    updates = Updates(vae.parameters(), 3e-3, steps, max_lr=4e-3)
    average = EMAModel(vae.parameters(), decay=0.995)
    for step in (bar := trange(steps, desc="autoencoder")):
        x = pixels[torch.randint(0, len(pixels), (32,))].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        reconstruction = vae.decode(posterior.sample()).sample
        mse = F.mse_loss(reconstruction, x)
        loss = mse + 0.2 * F.l1_loss(reconstruction, x) + 1e-6 * posterior.kl().mean()
        updates.take(loss)
        average.step(vae.parameters())
        if step % 100 == 0:
            bar.set_postfix(mse=f"{mse.item():.4f}")
    average.copy_to(vae.parameters())
    return vae.eval()


def train_unet(
    latents: torch.Tensor, drawn: DrawnImages, tokenizer: CLIPTokenizer, steps: int
) -> tuple[UNet2DConditionModel, CLIPTextModel, DDPMScheduler, float]:
    """Train UNet and text encoder together on scaled latents; return them with the scheduler and the last loss."""
    text_encoder = CLIPTextModel(text_config(tokenizer, num_layers=2))
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

    def loss_of(step: int) -> torch.Tensor:
        rows = torch.randint(0, len(latents), (64,))
        x, tokens = latents[rows], drawn.prompts_of(rows)
        t = torch.randint(0, 1000, (len(rows),))
        noise = torch.randn_like(x)
        prediction = unet(noise_scheduler.add_noise(x, noise, t), t, text_encoder(tokens)[0]).sample
        return F.mse_loss(prediction, noise)

    loss = train_denoiser([unet, text_encoder], loss_of, steps, 1.0, pct_start=0.1)
    return unet, text_encoder, noise_scheduler, loss


def train_shape_classifier(pixels: torch.Tensor, labels: torch.Tensor, steps: int = 600) -> torch.nn.Module:
    """Train a small convolutional classifier of the shape; it measures and is not shipped."""
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
    """Measure the quality of 480 samples (20 per prompt, DDIM 15 steps, guidance 3, seed 0)."""
    prompts = list(PROMPTS) * 20
    start = time.time()
    generator = torch.Generator().manual_seed(0)
    images: list[Image.Image] = []
    for first in range(0, len(prompts), 96):
        chunk = prompts[first : first + 96]
        images += pipe(chunk, num_inference_steps=15, guidance_scale=3.0, generator=generator).images
    seconds = time.time() - start
    shape = torch.tensor([SHAPES.index(prompt.split()[-1]) for prompt in prompts])
    return {
        "samples": len(prompts),
        "colour_right": colour_right(images, prompts),
        "shape_right": float((judge(to_tensor(images)).argmax(1) == shape).float().mean()),
        "shape_right_on_drawn_images": float((judge(drawn[0]).argmax(1) == drawn[1]).float().mean()),
        "images_per_second": round(len(prompts) / seconds, 1),
    }


def main() -> None:
    """Parse arguments, train, measure, save."""
    numbers = {"vae_steps": 4000, "unet_steps": 5000}
    args = parse_arguments("Train the embedded shapes model.", "tgol_trainer/shapes/pipeline", numbers)
    start = time.time()
    tokenizer = build_tokenizer()
    drawn = DrawnImages.draw(args.num_images, args.seed, tokenizer)
    pixels = drawn.pixels

    vae = train_autoencoder(pixels, args.vae_steps)
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in pixels.split(256)])
        held_out = to_tensor([image for *_, image in samples(512, args.seed + 1)])
        reconstruction_mse = F.mse_loss(vae.decode(vae.encode(held_out).latent_dist.mean).sample, held_out).item()
    scaling_factor = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scaling_factor)
    vae_seconds = time.time() - start
    unet, text_encoder, noise_scheduler, loss = train_unet(latents * scaling_factor, drawn, tokenizer, args.unet_steps)
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
    judged = torch.tensor([SHAPES.index(shape) for shape in drawn.shapes])
    judge = train_shape_classifier(pixels[:-1024], judged[:-1024])
    modules = {"vae": vae, "text_encoder": text_encoder, "unet": unet}
    results = {
        "seconds": {"autoencoder": round(vae_seconds), "training": round(training_seconds)},
        "autoencoder_mse_held_out": round(reconstruction_mse, 5),
        "denoiser_loss": round(loss, 4),
        "quality": measure(pipe, judge, (pixels[-1024:], judged[-1024:])),
    }
    write_record(args, list(numbers), modules, results)


if __name__ == "__main__":
    main()
