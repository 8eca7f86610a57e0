"""
Time a training step: a plain LoRA loop as the floor, and this library's losses with and without its caches.

The passes through the network without any adapter stand beside them. No training step can cost less.

All variants train the same network with the same adapter, each in a process of its own. The processes take turns, one
step at a time (`turns.py`), so that what slows the machine for a while slows them all. All stay in memory: about 1 GB
each of `shapes`, 6 GB each of `sd15`. A line of the results file holds one variant of one run. Its ratio is the median
over the turns of its step beside the plain loop's:

    python scripts/benchmarks/throughput.py --network shapes --batch_size 64 --steps 12
    python scripts/benchmarks/throughput.py --network sd15 --resolution 256 --variants sft tgol

The first step is not timed. What is compiled is compiled there.

`--peers` adds diffusers' Diffusion-DPO example and the script of Diffusion-KTO, which lie in a folder (`peers.py`),
with as many images a batch.

`shapes` is the embedded model. `sd15` has the architecture of Stable Diffusion 1.5 and random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, TrainerCallback
from transformers.utils import logging as transformers_logging

from tgol_trainer import TGOLConfig, TGOLTrainer
from tgol_trainer.families import load_family
from tgol_trainer.shapes import PROMPTS, load_pipeline

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from peers import PEERS, peer_command
from turns import Program, StepClock, peak_memory

RESULTS = Path(__file__).parent / "results" / "throughput.jsonl"
LORA = {
    "r": 8,
    "lora_alpha": 8,
    "init_lora_weights": "gaussian",
    "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
}
VARIANTS: dict[str, dict[str, Any]] = {
    "sft, encoded at each step": {"loss_type": "sft", "cache": False},
    "sft": {"loss_type": "sft"},
    "tgol, encoded at each step": {"cache": False},
    "tgol": {},
    "tgol, precomputed reference": {"precompute_ref_log_probs": True},
    "tgol, compiled": {"torch_compile": True},
    "tgol, precomputed reference, compiled": {"precompute_ref_log_probs": True, "torch_compile": True},
}
"""Settings of each variant; the cache of images and prompts is on by default."""
FLOOR = "plain LoRA loop"
BOUND = "network without adapter"
"""Both passes through the frozen network, down to the bias of its first layer: no training step costs less."""


def random_sd15(resolution: int) -> StableDiffusionPipeline:
    """Return a pipeline of Stable Diffusion 1.5's sizes with random weights and the shapes model's tokenizer."""
    torch.manual_seed(0)
    tokenizer = load_pipeline().tokenizer
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
    )
    return StableDiffusionPipeline(
        vae=AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=resolution,
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel(sample_size=resolution // 8, cross_attention_dim=768, attention_head_dim=8),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def scored_images(number: int, resolution: int) -> datasets.Dataset:
    """Return random images as PNG files in memory, with prompts and scores."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (number, resolution, resolution, 3), dtype=np.uint8)
    columns = {
        "prompt": [PROMPTS[index % len(PROMPTS)] for index in range(number)],
        "image": [Image.fromarray(image) for image in images],
        "score": rng.normal(size=number),
    }
    return datasets.Dataset.from_dict(columns)


class StepTimes(TrainerCallback):
    """End a turn with each step."""

    def __init__(self, clock: StepClock) -> None:
        self.clock = clock
        self.spent: list[float] = []
        self.first = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """Note which passes came before the second step, and end the turn."""
        self.first = self.first or len(self.spent)
        self.clock.end_step()


@contextlib.contextmanager
def network_time(trainer: TGOLTrainer) -> Iterator[list[float]]:
    """Yield a list that collects the seconds of forward and backward passes of the denoiser."""
    spent: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent.append(time.perf_counter() - began)
            return result

        return call

    trainer.family.predict = timed(trainer.family.predict)  # type: ignore[method-assign]
    trainer.accelerator.backward = timed(trainer.accelerator.backward)  # type: ignore[method-assign]
    yield spent


def plain_steps(
    pipeline: StableDiffusionPipeline, options: argparse.Namespace, clock: StepClock, *, adapter: bool = True
) -> None:
    """Train as a plain script would, with all but the network prepared; without an adapter, one bias."""
    unet, batch = pipeline.unet, options.batch_size
    alphas = load_family(pipeline).likelihood.alphas_cumprod
    unet.requires_grad_(False)
    if adapter:
        unet.add_adapter(LoraConfig(**LORA))
    else:
        unet.conv_in.bias.requires_grad_(True)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    trained = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    side = unet.config.sample_size
    latents = torch.randn(batch, unet.config.in_channels, side, side)
    text = torch.randn(batch, pipeline.tokenizer.model_max_length, unet.config.cross_attention_dim)
    unet.train()
    for _ in range(options.steps + 1):
        noise = torch.randn_like(latents)
        timesteps = torch.randint(0, len(alphas), (batch,))
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noised = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        loss = torch.nn.functional.mse_loss(unet(noised, timesteps, text).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.end_step()


def trainer_steps(
    pipeline: StableDiffusionPipeline,
    options: argparse.Namespace,
    settings: dict[str, Any],
    rows: datasets.Dataset,
    folder: Path,
    clock: StepClock,
) -> float:
    """Train with this library; return the share of the timed steps that is spent in the network."""
    cache = {} if settings.get("cache") is False else {"cache_dir": f"{folder}/cache"}
    args = TGOLConfig(
        output_dir=f"{folder}/run",
        per_device_train_batch_size=options.batch_size,
        max_steps=options.steps + 1,
        save_strategy="no",
        logging_strategy="no",
        logging_first_step=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        gradient_checkpointing=options.gradient_checkpointing,
        **cache,
        **settings,
    )
    times = StepTimes(clock)
    trainer = TGOLTrainer(pipeline, args, rows, peft_config=LoraConfig(**LORA), callbacks=[times])
    with network_time(trainer) as spent:
        times.spent = spent
        trainer.train()
    return sum(spent[times.first :]) / sum(clock.seconds)


def load(options: argparse.Namespace) -> StableDiffusionPipeline:
    """Return a fresh pipeline of the network that is asked for."""
    return load_pipeline() if options.network == "shapes" else random_sd15(options.resolution)


def rows_of(options: argparse.Namespace) -> datasets.Dataset:
    """Return the images that every variant trains on."""
    return scored_images(max(options.batch_size, 8), 32 if options.network == "shapes" else options.resolution)


def work(name: str, folder: Path, options: argparse.Namespace) -> None:
    """Run one variant in this process, in turns with the others."""
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    clock, network = StepClock(), 1.0
    if name in (FLOOR, BOUND):
        plain_steps(load(options), options, clock, adapter=name == FLOOR)
    else:
        network = trainer_steps(load(options), options, VARIANTS[name], rows_of(options), folder, clock)
    clock.write(network=network, peak_bytes=peak_memory())


def started(name: str, folder: Path, options: argparse.Namespace) -> Program:
    """Start a variant or another project's script; return it stopped before its first timed step."""
    environment = {"OMP_NUM_THREADS": str(options.threads)}
    if name in PEERS:
        command = peer_command(name, folder.parent / "model", rows_of(options), options, folder)
        environment["ACCELERATE_USE_CPU"] = "true"
    else:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", name, str(folder)]
    return Program(command, folder, environment)


def measured(names: Sequence[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Run variants in turns; return what the clock of each wrote."""
    programs: dict[str, Program] = {}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # else stopped programs would stay for ever
    with tempfile.TemporaryDirectory() as folder:
        if options.peers:
            load(options).save_pretrained(f"{folder}/model")
        try:
            for number, name in enumerate(names):
                programs[name] = started(name, Path(folder) / str(number), options)
                print(f"started: {name}", flush=True)
            for _ in tqdm(range(options.steps), desc="Turns"):
                for program in programs.values():
                    program.step()
            return {name: program.finish() for name, program in programs.items()}
        finally:
            for program in programs.values():
                program.kill()


def main() -> None:
    """Run the variants in turns and append the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["shapes", "sd15"], default="shapes")
    parser.add_argument("--resolution", type=int, default=32, help="pixels; of shapes always 32")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each (default: 5)")
    known = [BOUND, *VARIANTS]
    parser.add_argument("--variants", nargs="+", choices=known, default=known, help="beside the plain loop")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--peers", type=Path, help="folder in which the scripts of other projects lie")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker[0], Path(options.worker[1]), options)
        return
    found = measured([FLOOR, *options.variants, *(PEERS if options.peers else [])], options)
    facts = {
        key: value for key, value in vars(options).items() if key not in ("output", "peers", "variants", "worker")
    }
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"
    options.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"\n{'variant':40} {'s/step':>8} {'ratio':>6} {'outside network':>16} {'peak memory':>12}")
    with options.output.open("a") as file:
        for name, run in found.items():
            turns = zip(run["seconds"], found[FLOOR]["seconds"], strict=True)
            line = {
                "variant": name,
                "seconds": statistics.median(run["seconds"]),
                "ratio": statistics.median(own / floor for own, floor in turns),
                "outside_network": 1 - run["network"] if name in VARIANTS else None,
                "peak_bytes": run["peak_bytes"],
                "all_seconds": run["seconds"],
                "machine": machine,
                **facts,
            }
            file.write(json.dumps(line) + "\n")
            outside = f"{100 * line['outside_network']:.1f} %" if name in VARIANTS else ""
            memory = f"{line['peak_bytes'] / 1e9:.2f} GB"
            print(f"{name:40} {line['seconds']:8.3f} {line['ratio']:6.2f} {outside:>16} {memory:>12}")


if __name__ == "__main__":
    main()
