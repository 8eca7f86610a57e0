"""Videos on paper: rows of frames, before above after, for each prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

from .plots import _font, _resized, _wrapped

_INK, _RULE = "#222222", "#d0d0d0"


def save_contact_sheet(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    before: Sequence[Sequence[Image.Image]],
    after: Sequence[Sequence[Image.Image]],
    *,
    num_shown: int = 6,
    scale: int | None = None,
) -> None:
    """
    Draw a few frames of each video in a row: below each prompt the video before, and under it the one after.

    Args:
        path (`str` or `os.PathLike`):
            PNG file; missing folders are made.
        prompts (`Sequence[str]`):
            One a pair of videos; cut to two lines.
        before (`Sequence[Sequence[PIL.Image.Image]]`):
            Frames of the videos before.
        after (`Sequence[Sequence[PIL.Image.Image]]`):
            Frames of the videos after.
        num_shown (`int`, *optional*, defaults to 6):
            Frames drawn of each video, spread evenly from the first to the last; fewer where a video has fewer. The
            number of each frame, from 1, stands above it.
        scale (`int`, *optional*):
            Whole factor by which frames are enlarged, pixel by pixel. `None` takes the smallest that makes every frame
            at least 128 pixels wide and high, and reduces frames above 320 pixels to that size.

    Raises:
        ValueError: if there are no videos, lengths differ, a video is empty, or `num_shown` or `scale` is below 1.
    """
    _check(prompts, before, after, num_shown, scale)
    shown = [[_chosen(len(video), num_shown) for video in pair] for pair in zip(before, after, strict=True)]
    rows = [
        [_resized([video[i] for i in numbers], scale) for video, numbers in zip(pair, picked, strict=True)]
        for pair, picked in zip(zip(before, after, strict=True), shown, strict=True)
    ]
    frames = [image for pair in rows for row in pair for image in row]
    cell_width, cell_height = max(image.width for image in frames), max(image.height for image in frames)
    size = min(max(cell_width // 16, 12), 18)
    font, small, bold = _font(size), _font(size - 2), _font(size, bold=True)
    gap, margin, line = 4, 2 * size, size + 5
    label = int(max(bold.getlength(title) for title in ("Before", "After"))) + size
    columns = max(len(row) for pair in rows for row in pair)
    width = 2 * margin + label + columns * (cell_width + gap) - gap
    captions = [_wrapped(prompt, font, width - 2 * margin, 2) for prompt in prompts]
    heights = [line * len(caption) + 2 * (line + cell_height + gap) + margin for caption in captions]
    sheet = Image.new("RGB", (width, margin + sum(heights)), "white")
    canvas, y = ImageDraw.Draw(sheet), margin
    for index, (caption, pair, picked) in enumerate(zip(captions, rows, shown, strict=True)):
        if index:
            canvas.line((margin, y - margin // 2, width - margin, y - margin // 2), fill=_RULE)
        for text in caption:
            canvas.text((margin, y), text, fill=_INK, font=font)
            y += line
        for title, row, numbers in zip(("Before", "After"), pair, picked, strict=True):
            canvas.text((margin, y + line + cell_height // 2), title, fill=_INK, font=bold, anchor="lm")
            for column, (image, number) in enumerate(zip(row, numbers, strict=True)):
                x = margin + label + column * (cell_width + gap)
                canvas.text(
                    (x + cell_width // 2, y + line - 3), str(number + 1), fill="#666666", font=small, anchor="ms"
                )
                sheet.paste(image, (x + (cell_width - image.width) // 2, y + line))
            y += line + cell_height + gap
        y += margin
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, format="PNG")


def _chosen(total: int, num_shown: int) -> list[int]:
    count = min(total, num_shown)
    return [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]


def _check(
    prompts: Sequence[str],
    before: Sequence[Sequence[Image.Image]],
    after: Sequence[Sequence[Image.Image]],
    num_shown: int,
    scale: int | None,
) -> None:
    lengths = {"prompts": len(prompts), "before": len(before), "after": len(after)}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"A sheet needs as many of each: {', '.join(f'{k} has {n}' for k, n in lengths.items())}.")
    if not prompts:
        raise ValueError("There are no videos to draw.")
    for name, videos in (("before", before), ("after", after)):
        empty = [index for index, video in enumerate(videos) if not len(video)]
        if empty:
            raise ValueError(f"`{name}`: video {empty[0]} has no frames.")
    for name, value in (("num_shown", num_shown), ("scale", scale)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` is {value}; it must be at least 1.")
