"""What both build scripts of the embedded shapes models share: options, data, text encoder, updates, the record."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.training_utils import EMAModel
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import trange
from transformers import CLIPTextConfig, CLIPTokenizer

from tgol_trainer.shapes.world import COLOURS, colour_of, samples

MAX_TOKENS = 48


def parse_arguments(description: str, output_dir: str, numbers: Mapping[str, int]) -> argparse.Namespace:
    """Read the command line and set threads and seed; `numbers` are the options of one script, with defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir), help="folder of the pipeline")
    for name, default in {**numbers, "num_images": 16384, "seed": 0, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    return args


def to_tensor(images: Sequence[Image.Image]) -> torch.Tensor:
    """Stack RGB images into a float32 tensor (N, 3, 32, 32) in [-1, 1]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True)
class DrawnImages:
    """Drawn images with their captions."""

    pixels: torch.Tensor
    """(N, 3, 32, 32) in [-1, 1]."""
    shapes: tuple[str, ...]
    ids: torch.Tensor
    """Tokens of the captions, (N, 48)."""
    empty: torch.Tensor
    """Tokens of the empty prompt, (48,)."""

    @classmethod
    def draw(cls, count: int, seed: int, tokenizer: CLIPTokenizer) -> DrawnImages:
        """Draw images and tokenize their captions."""
        captions, _, shapes, images = zip(*samples(count, seed), strict=True)
        options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True, "return_tensors": "pt"}
        ids = tokenizer(list(captions), **options).input_ids
        return cls(to_tensor(images), shapes, ids, tokenizer([""], **options).input_ids[0])

    def prompts_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Tokens of rows, a tenth of them replaced by the empty prompt, as classifier-free guidance needs."""
        tokens = self.ids[rows].clone()
        tokens[torch.rand(len(rows)) < 0.1] = self.empty
        return tokens


def build_tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer: every UTF-8 text encodes, one token a byte."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = alphabet + [symbol + "</w>" for symbol in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=MAX_TOKENS)


def text_config(tokenizer: CLIPTokenizer, num_layers: int) -> CLIPTextConfig:
    """Configuration of a CLIP text encoder of width 64."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        projection_dim=64,
    )


class Updates:
    """AdamW at a learning rate on a one-cycle schedule (`options` of `OneCycleLR`), gradients clipped at norm 1."""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], rate: float, steps: int, **options: float) -> None:
        self.parameters = list(parameters)
        self.optimizer = torch.optim.AdamW(self.parameters, rate)
        options = {"max_lr": rate, **options}
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, total_steps=steps, **options)

    def take(self, loss: torch.Tensor) -> None:
        """Make one update."""
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()


def train_denoiser(
    modules: Sequence[torch.nn.Module],
    loss_of: Callable[[int], torch.Tensor],
    steps: int,
    first_loss: float,
    **options: float,
) -> float:
    """Train networks together on the loss of each step, and leave the moving average of their weights in them.

    Args:
        modules: the denoiser and its text encoder; in evaluation mode afterwards.
        loss_of: draws a batch and computes its loss, from the number of the step.
        steps: number of updates.
        first_loss: where the running mean of the loss starts.
        options: of `OneCycleLR`.

    Returns:
        Running mean of the loss at the end.
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    updates = Updates(parameters, 1e-3, steps, max_lr=1.5e-3, **options)
    average, running = EMAModel(parameters, decay=0.998), first_loss
    for step in (bar := trange(steps, desc="denoiser")):
        loss = loss_of(step)
        updates.take(loss)
        average.step(parameters)
        running = 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
    average.copy_to(parameters)
    for module in modules:
        module.eval()
    return running


def colour_right(images: Sequence[Image.Image], prompts: Sequence[str]) -> float:
    """Share of images whose centre is nearest to the colour that the prompt names."""
    palette = np.array(list(COLOURS.values()))
    centres = np.stack([np.asarray(image)[14:18, 14:18].reshape(-1, 3).mean(0) for image in images])
    nearest = np.abs(centres[:, None] - palette).sum(-1).argmin(1)
    named = np.array([list(COLOURS.values()).index(colour_of(prompt)) for prompt in prompts])
    return float((nearest == named).mean())


def write_record(
    args: argparse.Namespace,
    options: Sequence[str],
    modules: Mapping[str, torch.nn.Module],
    results: Mapping[str, Any],
) -> None:
    """Write `build.json` beside the weights and print it; the command that it records names `options`."""
    flags = " ".join(f"--{name} {getattr(args, name)}" for name in (*options, "num_images", "seed", "threads"))
    record = {
        "command": f"python scripts/{Path(sys.argv[0]).name} {flags}",
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in modules.items()},
        **results,
        "torch": torch.__version__,
    }
    text = json.dumps(record, indent=2)
    (args.output_dir / "build.json").write_text(text + "\n")
    print(text)
