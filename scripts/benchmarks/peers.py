"""
Time the steps of other projects' scripts on the model and the images of `throughput.py`.

Each script is found in a folder and started as it is, in a process of its own:

    python scripts/benchmarks/throughput.py --network shapes --batch_size 64 --peers /folder/with/the/scripts

What they import and this machine may lack is replaced: the image transforms of torchvision by ones on Pillow and
PyTorch of the same result up to rounding, and wandb, which they do not use here, by an empty module.
"""

from __future__ import annotations

import io
import os
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))

from turns import StepClock, peak_memory

DPO, KTO = "diffusers' Diffusion-DPO example", "Diffusion-KTO's script"
PEERS = {DPO: "train_diffusion_dpo.py", KTO: "train_kto_sd_v1.5.py"}
"""Name to the file of the script."""


def pairs(rows: datasets.Dataset) -> datasets.Dataset:
    """Return rows of images as pairs of neighbours, in the columns of the Pick-a-Pic dataset."""

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
    return datasets.Dataset.from_dict(columns)


def labelled(rows: datasets.Dataset) -> datasets.Dataset:
    """Return rows of images with a caption and whether the score is above 0."""
    labels = [int(score > 0) for score in rows["score"]]
    return datasets.Dataset.from_dict({"image": list(rows["image"]), "caption": rows["prompt"], "label": labels})


def peer_command(name: str, model: Path, rows: datasets.Dataset, options: Any, folder: Path) -> list[str]:
    """
    Return the command that runs a script for a few steps, two of them untimed, between which one of the scripts saves.

    Args:
        name (`str`): A key of `PEERS`.
        model (`Path`): Saved pipeline.
        rows (`datasets.Dataset`): Prompts, images and scores; a batch of B images is B/2 pairs.
        options (`argparse.Namespace`): Those of `throughput.py`; the script lies somewhere below its `peers`.
        folder (`Path`): What is written lies there.
    """
    scripts = sorted(options.peers.rglob(PEERS[name]))
    if not scripts:
        raise RuntimeError(f"There is no {PEERS[name]} below {options.peers}.")
    data = folder / "data"
    data.mkdir(parents=True)
    (pairs if name == DPO else labelled)(rows).to_parquet(data / "train.parquet")
    flags = {
        "pretrained_model_name_or_path": model,
        "dataset_name": data,
        "dataset_split_name": "train",
        "output_dir": folder / "peer",
        "resolution": rows[0]["image"].height,
        "train_batch_size": options.batch_size // (2 if name == DPO else 1),
        "vae_encode_batch_size": options.batch_size,
        "max_train_steps": options.steps + 2,
        "rank": 8,
        "report_to": "wandb",
        "mixed_precision": "no",
    }
    given = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    if options.gradient_checkpointing:
        given.append("--gradient_checkpointing")
    given += ["--no_hflip"] if name == DPO else ["--use_lora"]
    return [sys.executable, __file__, str(scripts[0]), *given]


def stand_in_transforms() -> types.ModuleType:
    """Return the transforms that the scripts use; one of them transforms tensors (C, H, W), the other images."""
    import numpy as np
    import torch
    from PIL import Image

    def resize(size: int, interpolation: Any) -> Callable[[Image.Image], Image.Image]:
        def call(image: Any) -> Any:
            if isinstance(image, torch.Tensor):
                factor = size / min(image.shape[1:])
                sides = [round(side * factor) for side in image.shape[1:]]
                return torch.nn.functional.interpolate(image[None], sides, mode="bilinear", antialias=True)[0]
            factor = size / min(image.size)
            return image.resize((round(image.width * factor), round(image.height * factor)), interpolation)

        return call

    def centre_crop(size: int) -> Callable[[Image.Image], Image.Image]:
        def call(image: Any) -> Any:
            if isinstance(image, torch.Tensor):
                top, left = ((side - size) // 2 for side in image.shape[1:])
                return image[:, top : top + size, left : left + size]
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
        "RandomHorizontalFlip": lambda p: lambda image: image.flip(-1),  # p is 1: the script draws itself
        "Lambda": lambda function: function,
        "ToTensor": lambda: tensor,
        "Normalize": lambda mean, std: lambda value: (value - mean[0]) / std[0],
        "InterpolationMode": types.SimpleNamespace(BILINEAR=Image.Resampling.BILINEAR),
    }
    for name, value in found.items():
        setattr(module, name, value)
    return module


def main() -> None:
    """Run the script of the first argument with the others; a turn ends with each step of its optimizer."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    transforms = stand_in_transforms()
    torchvision = types.ModuleType("torchvision")
    functional = types.ModuleType("torchvision.transforms.functional")
    functional.crop = None  # type: ignore[attr-defined] - imported, and used for random crops alone
    torchvision.transforms = transforms  # type: ignore[attr-defined]
    clock = StepClock(untimed=2)
    register_optimizer_step_post_hook(lambda *_: clock.end_step())
    import accelerate  # noqa: F401 - these look for torchvision and wandb, and find none
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    sys.modules |= {"torchvision": torchvision, "torchvision.transforms": transforms}
    sys.modules["torchvision.transforms.functional"] = functional
    sys.modules["wandb"] = types.ModuleType("wandb")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    clock.write(peak_bytes=peak_memory())


if __name__ == "__main__":
    main()
