"""Define the prompts and colours of the shapes world, and draw its images from a seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

RESOLUTION = 32
"""Side of every image, in pixels."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 40),
    "purple": (150, 50, 180),
    "orange": (240, 140, 30),
}
"""Colour name to its RGB value in 0..255."""

SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "cross")
PROMPTS: tuple[str, ...] = tuple(f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES)
"""The 24 prompts of the demo, all of the form `"a {colour} {shape}"`."""

_OVERSAMPLING = 4


def colour_of(prompt: str) -> tuple[int, int, int]:
    """
    Return the RGB value (0..255) of the first colour that a prompt names as a word.

    Raises:
        ValueError: if no word of the prompt is a colour of the shapes world.
    """
    for word in prompt.lower().replace(",", " ").split():
        if word in COLOURS:
            return COLOURS[word]
    raise ValueError(f"The prompt {prompt!r} names no colour of the shapes world: {', '.join(COLOURS)}.")


def draw(colour: str, shape: str, rng: np.random.Generator, quality: str | None = None) -> Image.Image:
    """
    Draw one image: a shape of random size and place on a background of random colour.

    Args:
        colour (`str`): A key of `COLOURS`.
        shape (`str`): One of `SHAPES`.
        rng (`numpy.random.Generator`): Source of every random choice.
        quality (`str`, *optional*):
            `"good"` draws the exact colour in the middle; `"bad"` draws a dull colour and blurs; `None` lies between.

    Returns:
        `PIL.Image.Image`: RGB, 32 x 32 pixels.
    """
    side = RESOLUTION * _OVERSAMPLING
    image = Image.new("RGB", (side, side), tuple(int(value) for value in rng.integers(0, 256, 3)))
    canvas = ImageDraw.Draw(image)
    radius = rng.uniform(0.18, 0.34) * side
    spread = 0.0 if quality == "good" else 0.05
    x, y = rng.uniform(0.5 - spread, 0.5 + spread, 2) * side if spread else (side / 2, side / 2)
    noise = rng.normal(0, 0 if quality == "good" else 15, 3)
    exact = np.clip(np.asarray(COLOURS[colour]) + noise, 0, 255)
    fill = tuple(int(value) for value in (0.5 * exact + 0.5 * 128 if quality == "bad" else exact))
    box = [x - radius, y - radius, x + radius, y + radius]
    if shape == "circle":
        canvas.ellipse(box, fill=fill)
    elif shape == "square":
        canvas.rectangle(box, fill=fill)
    elif shape == "triangle":
        canvas.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill)
    elif shape == "cross":
        arm = 0.4 * radius
        canvas.rectangle([x - radius, y - arm, x + radius, y + arm], fill=fill)
        canvas.rectangle([x - arm, y - radius, x + arm, y + radius], fill=fill)
    else:
        raise ValueError(f"Unknown shape {shape!r}: choose one of {', '.join(SHAPES)}.")
    if quality == "bad":
        image = image.filter(ImageFilter.GaussianBlur(1.2 * _OVERSAMPLING))
    return image.resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)


def samples(count: int, seed: int) -> Iterator[tuple[str, str, str, Image.Image]]:
    """
    Yield drawn training examples, the same ones for the same seed.

    One caption in five says "good", one says "bad" and three do not mention quality. The word stands before the colour
    or, equally often, before the whole caption.

    Args:
        count (`int`): Number of examples.
        seed (`int`): Seed of the whole sequence.

    Yields:
        `tuple`: caption, colour, shape, image.
    """
    rng = np.random.default_rng(seed)
    colours = list(COLOURS)
    for _ in range(count):
        colour, shape = colours[rng.integers(len(colours))], SHAPES[rng.integers(len(SHAPES))]
        roll = rng.random()
        quality = "good" if roll < 0.2 else "bad" if roll < 0.4 else None
        if quality is None:
            caption = f"a {colour} {shape}"
        else:
            caption = f"a {quality} {colour} {shape}" if rng.random() < 0.5 else f"{quality}, a {colour} {shape}"
        yield caption, colour, shape, draw(colour, shape, rng, quality)
