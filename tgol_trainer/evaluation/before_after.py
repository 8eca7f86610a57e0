"""Draw pairs of images side by side, before and after training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from .drawing import INK, SOFT, Style, check_sheet, resized, save_png, score_line, wrapped

_INNER = 6
"""Pixels between the two images of a pair."""


def save_before_after_grid(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    *,
    columns: int = 2,
    scale: int | None = None,
    scores: Mapping[str, tuple[Sequence[float | None], Sequence[float | None]]] | None = None,
) -> None:
    """
    Draw pairs of images, before on the left and after on the right, below their prompt.

    Args:
        path (`str` or `os.PathLike`): PNG file; missing folders are made. It appears whole or not at all.
        prompts (`Sequence[str]`): One per pair; cut to two lines.
        before (`Sequence[PIL.Image.Image]`): Images before.
        after (`Sequence[PIL.Image.Image]`): Images after.
        columns (`int`, *optional*, defaults to 2): Pairs side by side.
        scale (`int`, *optional*):
            Whole factor by which images are enlarged, pixel by pixel. `None` takes the smallest that makes every
            image at least 128 pixels wide and high, and reduces images above 320 pixels to that size.
        scores (`Mapping[str, tuple[Sequence, Sequence]]`, *optional*):
            Name of a score to its values before and after, written below the images; `None` is written as "–".

    Raises:
        ValueError: if there are no pairs, lengths differ, or `columns` or `scale` is below 1.
    """
    scores = scores or {}
    content = {"prompts": prompts, "before": before, "after": after}
    for name, sides in scores.items():
        content[f"scores[{name!r}] before"], content[f"scores[{name!r}] after"] = sides
    check_sheet("grid", content, columns=columns, scale=scale)
    if not prompts:
        raise ValueError("There are no pairs to draw.")
    pairs = list(zip(resized(before, scale), resized(after, scale), strict=True))
    cell_width = max(image.width for pair in pairs for image in pair)
    cell_height = max(image.height for pair in pairs for image in pair)
    style = Style.for_width(cell_width)
    font, small, bold = style.font(), style.font(1), style.font(bold=True)
    margin, line = style.margin, style.line
    pair_width = 2 * cell_width + _INNER
    captions = [wrapped(prompt, font, pair_width, 2) for prompt in prompts]
    columns = min(columns, len(prompts))
    rows = [range(start, min(start + columns, len(prompts))) for start in range(0, len(prompts), columns)]
    caption_lines = [max(len(captions[i]) for i in row) for row in rows]
    row_heights = [line * (top + len(scores)) + cell_height + 4 for top in caption_lines]
    height = margin + line + sum(row_heights) + margin * len(rows)
    sheet = Image.new("RGB", (columns * (pair_width + margin) + margin, height), "white")
    canvas = ImageDraw.Draw(sheet)
    for column in range(columns):
        x = margin + column * (pair_width + margin)
        for side, title in enumerate(("Before", "After")):
            centre = x + side * (cell_width + _INNER) + cell_width / 2
            canvas.text((centre, margin // 2), title, fill=INK, font=bold, anchor="ma")
    y = margin // 2 + line + margin // 2
    for row, top, row_height in zip(rows, caption_lines, row_heights, strict=True):
        for column, i in enumerate(row):
            x = margin + column * (pair_width + margin)
            # A short caption stands next to its images, not at the top of its row.
            for number, text in enumerate(captions[i], start=top - len(captions[i])):
                canvas.text((x, y + number * line), text, fill=INK, font=font)
            for side, image in enumerate(pairs[i]):
                cell = x + side * (cell_width + _INNER)
                sheet.paste(image, (cell + (cell_width - image.width) // 2, y + line * top + 2))
                for number, (name, values) in enumerate(scores.items(), start=top):
                    text = score_line(name, values[side][i], small, cell_width)
                    below = (cell + cell_width / 2, y + line * number + cell_height + 6)
                    canvas.text(below, text, fill=SOFT, font=small, anchor="ma")
        y += row_height + margin
    save_png(sheet, path)
