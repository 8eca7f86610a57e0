"""Draw videos as rows of frames, before above after, for each prompt."""

from __future__ import annotations

import os
from collections.abc import Sequence

from PIL import Image, ImageDraw

from tgol_trainer._spacing import evenly_spaced

from .drawing import INK, RULE, Style, check_sheet, resized, save_png, wrapped

_GAP = 4
"""Pixels between neighbouring frames."""


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
        path (`str` or `os.PathLike`): PNG file; missing folders are made. It appears whole or not at all.
        prompts (`Sequence[str]`): One per pair of videos; cut to two lines.
        before (`Sequence[Sequence[PIL.Image.Image]]`): Frames of the videos before.
        after (`Sequence[Sequence[PIL.Image.Image]]`): Frames of the videos after.
        num_shown (`int`, *optional*, defaults to 6):
            Frames drawn of each video, spread evenly from the first to the last; fewer if a video has fewer. The
            number of each frame, from 1, stands above it.
        scale (`int`, *optional*):
            Whole factor by which frames are enlarged, pixel by pixel. `None` takes the smallest that makes every frame
            at least 128 pixels wide and high, and reduces frames above 320 pixels to that size.

    Raises:
        ValueError: if there are no videos, lengths differ, a video is empty, or `num_shown` or `scale` is below 1.
    """
    check_sheet("sheet", {"prompts": prompts, "before": before, "after": after}, num_shown=num_shown, scale=scale)
    if not prompts:
        raise ValueError("There are no videos to draw.")
    rows = {}
    for name, videos in (("before", before), ("after", after)):
        empty = [index for index, video in enumerate(videos) if not len(video)]
        if empty:
            raise ValueError(f"`{name}`: video {empty[0]} has no frames.")
        rows[name.title()] = [_numbered_frames(video, num_shown, scale) for video in videos]
    shown = [row for side in rows.values() for row in side]
    cell_width = max(image.width for row in shown for _, image in row)
    cell_height = max(image.height for row in shown for _, image in row)
    style = Style.for_width(cell_width)
    font, small, bold = style.font(), style.font(2), style.font(bold=True)
    margin, line = style.margin, style.line
    label = int(max(bold.getlength(title) for title in rows)) + style.size
    width = 2 * margin + label + max(map(len, shown)) * (cell_width + _GAP) - _GAP
    captions = [wrapped(prompt, font, width - 2 * margin, 2) for prompt in prompts]
    heights = [line * len(caption) + 2 * (line + cell_height + _GAP) + margin for caption in captions]
    sheet = Image.new("RGB", (width, margin + sum(heights)), "white")
    canvas, y = ImageDraw.Draw(sheet), margin
    for index, caption in enumerate(captions):
        if index:
            canvas.line((margin, y - margin // 2, width - margin, y - margin // 2), fill=RULE)
        for text in caption:
            canvas.text((margin, y), text, fill=INK, font=font)
            y += line
        for title, side in rows.items():
            canvas.text((margin, y + line + cell_height // 2), title, fill=INK, font=bold, anchor="lm")
            for column, (number, image) in enumerate(side[index]):
                x = margin + label + column * (cell_width + _GAP)
                above = (x + cell_width // 2, y + line - 3)
                canvas.text(above, str(number + 1), fill="#666666", font=small, anchor="ms")
                sheet.paste(image, (x + (cell_width - image.width) // 2, y + line))
            y += line + cell_height + _GAP
        y += margin
    save_png(sheet, path)


def _numbered_frames(video: Sequence[Image.Image], num_shown: int, scale: int | None) -> list[tuple[int, Image.Image]]:
    numbers = evenly_spaced(len(video), num_shown)
    return list(zip(numbers, resized([video[number] for number in numbers], scale), strict=True))
