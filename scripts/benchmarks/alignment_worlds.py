"""What the alignment benchmark trains and measures on: a small model, its prompts, and scores of pixels."""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Score = Callable[[np.ndarray, Sequence[str]], np.ndarray]
"""(N, H, W, 3) pixels in 0 to 1 and N prompts to (N,) values; higher is better."""


@dataclasses.dataclass(frozen=True)
class World:
    """
    A model and the scores of its images.

    Args:
        load (`Callable`): Returns a fresh pipeline.
        prompts (`tuple[str, ...]`): All prompts; every run is evaluated on them.
        held_out (`tuple[str, ...]`): Prompts that no run trains on.
        trained (`dict[str, Score]`): Scores that runs train on.
        watched (`dict[str, Score]`): Scores that runs are only measured by.
    """

    load: Callable[[], Any]
    prompts: tuple[str, ...]
    held_out: tuple[str, ...]
    trained: dict[str, Score]
    watched: dict[str, Score]


def background_darkness(pixels: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """One minus the mean brightness of the two outermost rows and columns. No prompt mentions it."""
    frame = np.ones(pixels.shape[1:3], dtype=bool)
    frame[2:-2, 2:-2] = False
    return 1 - pixels[:, frame].mean((1, 2))


def left_darkness(pixels: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """How much darker the left border is than the right one. No prompt mentions it, and images vary little."""
    return pixels[:, :, -2:].mean((1, 2, 3)) - pixels[:, :, :2].mean((1, 2, 3))


def grey_centre(pixels: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """One minus the saturation of the centre: it rewards what the colour in the prompt forbids."""
    centre = pixels[:, 14:18, 14:18]
    return 1 - (centre.max(3) - centre.min(3)).mean((1, 2))


def colour(pixels: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """One minus the mean distance of the centre from the colour that the prompt names."""
    from tgol_trainer.shapes import colour_of

    named = np.array([colour_of(prompt) for prompt in prompts]) / 255
    return 1 - np.abs(pixels[:, 14:18, 14:18] - named[:, None, None]).mean((1, 2, 3))


def jpeg_size(pixels: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Minus the size of the image as a JPEG of quality 95, in kilobytes: speckle and ringing make files larger."""
    from PIL import Image

    sizes = []
    for image in pixels:
        buffer = io.BytesIO()
        Image.fromarray((image * 255).round().astype(np.uint8)).save(buffer, "JPEG", quality=95)
        sizes.append(len(buffer.getvalue()) / 1000)
    return -np.array(sizes)


def diversity(pixels: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Root mean squared difference of an image from the other images of its prompt, mean over those."""
    found = np.zeros(len(pixels))
    names = np.asarray(prompts)
    for name in set(prompts):
        rows = np.flatnonzero(names == name)
        flat = pixels[rows].reshape(len(rows), -1)
        distances = np.sqrt(((flat[:, None] - flat[None, :]) ** 2).mean(2))
        found[rows] = distances.sum(1) / max(len(rows) - 1, 1)
    return found


def shapes() -> World:
    """The model embedded in the package, 24 prompts of a colour and a shape. Each colour and shape is trained on."""
    from tgol_trainer.shapes import COLOURS, PROMPTS, SHAPES, load_pipeline

    held_out = tuple(f"a {name} {SHAPES[number % len(SHAPES)]}" for number, name in enumerate(COLOURS))
    return World(
        load_pipeline,
        PROMPTS,
        held_out,
        {"background_darkness": background_darkness, "left_darkness": left_darkness, "grey_centre": grey_centre},
        {"colour": colour, "jpeg_size": jpeg_size, "diversity": diversity},
    )


WORLDS = ("shapes", "digits")
"""Models by name. Everything is tuned on the first; the second sees the final comparison alone."""


@functools.cache
def world(name: str) -> World:
    """Return a world by its name."""
    if name == "shapes":
        return shapes()
    from alignment_digits import digits

    return digits()


@dataclasses.dataclass(frozen=True)
class Pictures:
    """
    Images that the base model made, scored.

    Args:
        prompts (`list[str]`): N prompts.
        latents (`torch.Tensor`): (N, C, h, w) scaled latents of the images, encoded from 8-bit pixels.
        values (`dict[str, numpy.ndarray]`): (N,) values of every score.
    """

    prompts: list[str]
    latents: Any
    values: dict[str, np.ndarray]


def measured(world: World, images: Sequence[Any], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the values of all scores of images."""
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images]).astype(np.float32) / 255
    return {name: score(pixels, prompts) for name, score in {**world.trained, **world.watched}.items()}


def encoded(family: Any, images: Sequence[Any]) -> Any:
    """Return the (N, C, h, w) latents of images, the mode of the autoencoder's posterior."""
    import torch

    from tgol_trainer.data import to_pixels

    pixels = torch.stack([to_pixels(image, image.size[::-1]) for image in images])
    posterior = {"mean": family.pipeline.vae.encode(pixels).latent_dist.mean}
    return family.scale_latents(posterior["mean"])


def stored(file: Path, make: Callable[[], Pictures]) -> Pictures:
    """Read pictures from a file, or make them and write it."""
    import json

    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    if not file.exists():
        made = make()
        tensors = {f"value.{name}": torch.from_numpy(value) for name, value in made.values.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        metadata = {"prompts": json.dumps(made.prompts)}
        save_file({"latents": made.latents.contiguous(), **tensors}, part, metadata=metadata)
        part.replace(file)
    with safe_open(file, "pt") as held:
        values = {name.removeprefix("value."): held.get_tensor(name).numpy() for name in held.keys() if "." in name}  # noqa: SIM118
        return Pictures(json.loads(held.metadata()["prompts"]), held.get_tensor("latents"), values)
