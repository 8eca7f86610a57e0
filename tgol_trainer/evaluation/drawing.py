"""Draw sheets of images: fonts and distances, text that fits, images brought to a common size."""

from __future__ import annotations

import bisect
import dataclasses
import math
import os
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

from PIL import Image, ImageFont

from tgol_trainer._files import replacing

INK, SOFT, RULE = "#222222", "#555555", "#d0d0d0"
_MIN_SIDE, _MAX_SIDE = 128, 320
"""Sides, in pixels, between which images are brought."""


@dataclasses.dataclass(frozen=True)
class Style:
    """Fonts of a sheet, and distances in pixels: size of the text, edge of the sheet, one line of text to the next."""

    size: int
    margin: int
    line: int

    @classmethod
    def for_width(cls, width: int) -> Style:
        """Return the style of a sheet whose images are `width` pixels wide."""
        size = min(max(width // 16, 12), 18)
        return cls(size, margin=2 * size, line=size + 5)

    def font(self, smaller: int = 0, *, bold: bool = False) -> ImageFont.FreeTypeFont:
        """Return the font, `smaller` pixels below the size of the text."""
        import matplotlib

        file = Path(matplotlib.get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf")
        # The other layout engine is an optional library that places glyphs differently.
        return ImageFont.truetype(str(file), self.size - smaller, layout_engine=ImageFont.Layout.BASIC)


def save_png(sheet: Image.Image, path: str | os.PathLike[str]) -> None:
    """Write a PNG file that appears whole or not at all; missing folders are made."""
    with replacing(path) as draft:
        sheet.save(draft, format="PNG")


def check_sheet(kind: str, content: Mapping[str, Sized], **at_least_one: int | None) -> None:
    """Raise a `ValueError` if contents differ in length, or if a number that is given is below 1."""
    lengths = {name: len(values) for name, values in content.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A {kind} needs as many of each: {', '.join(f'{k} has {n}' for k, n in lengths.items())}.")
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")


def resized(images: Sequence[Image.Image], scale: int | None = None) -> list[Image.Image]:
    """
    Return RGB images that are enlarged pixel by pixel by a whole factor. `None` takes the smallest factor that makes
    an image at least 128 pixels wide and high, and reduces an image above 320 pixels to that size.
    """
    result = []
    for image in images:
        image = image.convert("RGB")
        factor = scale or math.ceil(_MIN_SIDE / min(image.size))
        if factor > 1:
            image = enlarged(image, factor)
        elif scale is None and max(image.size) > _MAX_SIDE:
            image.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.LANCZOS)
        result.append(image)
    return result


def enlarged(image: Image.Image, factor: int) -> Image.Image:
    """Return an image enlarged pixel by pixel by a whole factor."""
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def printable(text: str) -> str:
    """Return one line that can be drawn: white space collapsed, control characters and lone surrogates replaced."""
    text = " ".join(text.encode("utf-8", "replace").decode("utf-8").split())
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: float, max_lines: int) -> list[str]:
    """Return at most `max_lines` lines no wider than `width` pixels, broken at spaces where one is near."""
    # A readable glyph is at least one pixel wide, so the rest would not be seen.
    rest = printable(text)[: int(width) * max_lines]
    lines: list[str] = []
    while rest and len(lines) < max_lines:
        fitting = _fitting(rest, font, width)
        if fitting == len(rest):
            return [*lines, rest]
        if len(lines) == max_lines - 1:
            return [*lines, rest[: _fitting(rest, font, width - font.getlength("…"))].rstrip() + "…"]
        space = rest.rfind(" ", 0, fitting + 1)
        cut = space if space > 0 else fitting
        lines.append(rest[:cut].rstrip())
        rest = rest[cut:].lstrip()
    return lines


def _fitting(text: str, font: ImageFont.FreeTypeFont, width: float) -> int:
    """Return how many characters fit, at least one."""
    lengths = range(2, len(text) + 1)
    return 1 + bisect.bisect_right(lengths, width, key=lambda length: font.getlength(text[:length]))


def score_line(name: str, value: float | None, font: ImageFont.FreeTypeFont, width: float) -> str:
    """Return name and value of a score; the name is cut so that both fit into `width` pixels."""
    text = "–" if value is None else f"{value:.4g}"
    shown = wrapped(name, font, width - font.getlength(f" {text}"), 1)
    return f"{shown[0]} {text}" if shown else text
