"""
Time the steps of diffusers' Diffusion-DPO example on the model and the images of `throughput.py`.

The script is found in a folder and started as it is, in a process of its own:

    python scripts/benchmarks/throughput.py --network shapes --batch_size 64 --peers /folder/with/diffusers

What it imports and this machine may lack is replaced: the image transforms of torchvision by ones on Pillow and
PyTorch of the same result up to rounding, and wandb, which it does not use here, by an empty module.
"""

from __future__ import annotations

import io
import itertools
import json
import os
import runpy
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

SCRIPT = "train_diffusion_dpo.py"


def write_pairs(rows: datasets.Dataset, file: Path) -> None:
    """Write rows of images as pairs of neighbours, in the columns of the Pick-a-Pic dataset."""

    def encoded(image: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return buffer.getvalue()

    images = [encoded(image) for image in rows["image"]]
    columns = {
        "jpg_0": images[::2],
        "jpg_1": images[1::2],
        "label_0": [int(a > b) for a, b in zip(rows["score"][::2], rows["score"][1::2], strict=True)],
        "caption": rows["prompt"][::2],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns).to_parquet(file)


def peer_steps(peers: Path, model: Path, rows: datasets.Dataset, options: Any, folder: Path) -> list[float]:
    """
    Run the example for a few steps; return the seconds of each step but the first.

    Args:
        peers (`Path`): Folder somewhere below which the script lies.
        model (`Path`): Saved pipeline.
        rows (`datasets.Dataset`): Prompts, images and scores; a batch of B images is B/2 pairs.
        options (`argparse.Namespace`): Those of `throughput.py`.
        folder (`Path`): What is written lies there.
    """
    scripts = sorted(peers.rglob(SCRIPT))
    if not scripts:
        raise SystemExit(f"There is no {SCRIPT} below {peers}.")
    if not (folder / "pairs").is_dir():
        write_pairs(rows, folder / "pairs" / "train.parquet")
    flags = {
        "pretrained_model_name_or_path": model,
        "dataset_name": folder / "pairs",
        "dataset_split_name": "train",
        "output_dir": folder / "peer",
        "resolution": rows[0]["image"].height,
        "train_batch_size": options.batch_size // 2,
        "vae_encode_batch_size": options.batch_size,
        "max_train_steps": options.steps + 1,
        "rank": 8,
        "report_to": "wandb",
        "mixed_precision": "no",
    }
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    if options.gradient_checkpointing:
        given.append("--gradient_checkpointing")
    command = [sys.executable, __file__, str(scripts[0]), *given, "--no_hflip"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)  # noqa: S603
    if done.returncode:
        raise SystemExit(f"{scripts[0]} failed:\n{done.stderr[-3000:]}")
    ends = json.loads(done.stdout.splitlines()[-1])
    return [end - start for start, end in itertools.pairwise(ends)]


def stand_in_transforms() -> types.ModuleType:
    """Return the transforms that the script uses."""
    import numpy as np
    import torch
    from PIL import Image

    def resize(size: int, interpolation: Any) -> Callable[[Image.Image], Image.Image]:
        def call(image: Image.Image) -> Image.Image:
            factor = size / min(image.size)
            return image.resize((round(image.width * factor), round(image.height * factor)), interpolation)

        return call

    def centre_crop(size: int) -> Callable[[Image.Image], Image.Image]:
        def call(image: Image.Image) -> Image.Image:
            left, top = (image.width - size) // 2, (image.height - size) // 2
            return image.crop((left, top, left + size, top + size))

        return call

    def compose(steps: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
        def call(value: Any) -> Any:
            for step in steps:
                value = step(value)
            return value

        return call

    def tensor(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)

    module = types.ModuleType("torchvision.transforms")
    found = {
        "Compose": compose,
        "Resize": resize,
        "CenterCrop": centre_crop,
        "Lambda": lambda function: function,
        "ToTensor": lambda: tensor,
        "Normalize": lambda mean, std: lambda value: (value - mean[0]) / std[0],
        "InterpolationMode": types.SimpleNamespace(BILINEAR=Image.Resampling.BILINEAR),
    }
    for name, value in found.items():
        setattr(module, name, value)
    return module


def main() -> None:
    """Run the script of the first argument with the others, and print when each step of its optimizer ended."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transforms = stand_in_transforms()
    torchvision = types.ModuleType("torchvision")
    torchvision.transforms = transforms  # type: ignore[attr-defined]
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    import accelerate  # noqa: F401 - these look for torchvision and wandb, and find none
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}
    sys.modules["wandb"] = types.ModuleType("wandb")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("\n" + json.dumps(ends))


if __name__ == "__main__":
    main()
