"""Draw how images changed in training: one row per prompt, one column per step."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from tgol_trainer._spacing import evenly_spaced

from .drawing import INK, RULE, SOFT, Style, enlarged, resized, save_png, score_line, wrapped

_MIN_SIDE, _MAX_HEIGHT = 160, 320
_GAP = 6

Scores = Mapping[str, Sequence[Sequence[float | None]]]


def frame_row(frames: Sequence[Image.Image], num_shown: int = 3) -> Image.Image:
    """
    Put up to `num_shown` frames of a video, spread evenly from the first to the last, side by side. Each frame is at
    least 128 and at most 320 pixels wide and high.
    """
    shown = resized([frames[number] for number in evenly_spaced(len(frames), num_shown)])
    width, height = shown[0].size
    row = Image.new("RGB", (len(shown) * (width + 2) - 2, height), "white")
    for column, image in enumerate(shown):
        row.paste(image, (column * (width + 2), 0))
    return row


def save_sample_strip(
    path: str | os.PathLike[str],
    prompts: Sequence[str],
    titles: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    *,
    scores: Scores | None = None,
    means: Mapping[str, Sequence[float | None]] | None = None,
) -> None:
    """
    Draw images of the same prompts and seeds at successive moments, so that each row shows how one changed.

    Args:
        path (`str` or `os.PathLike`): PNG file; missing folders are made. It appears whole or not at all.
        prompts (`Sequence[str]`):
            One per row, written above its images; cut to two lines. A prompt equal to the one above is not repeated.
        titles (`Sequence[str]`): One per column, such as `"base"` and `"step 50"`.
        images (`Sequence[Sequence[PIL.Image.Image]]`):
            For each column one image per row. Small ones are enlarged pixel by pixel to 160 pixels or more, large ones
            reduced to a height of 320.
        scores (`Mapping[str, Sequence[Sequence]]`, *optional*):
            Name of a score to its values, arranged as `images`, written below each; `None` is written as "–".
        means (`Mapping[str, Sequence]`, *optional*):
            Name of a score to its mean in each column, written below the titles.

    Raises:
        ValueError: if there is no image, or the numbers of titles, prompts, images and scores do not agree.
    """
    scores, means = scores or {}, means or {}
    _check(prompts, titles, images, scores, means)
    columns = [[_fitted(image) for image in column] for column in images]
    widths = [max(image.width for image in column) for column in columns]
    style = Style.for_width(max(widths))
    font, small, bold = style.font(), style.font(2), style.font(bold=True)
    line, margin = style.line, style.margin
    width = 2 * margin + sum(widths) + _GAP * (len(widths) - 1)
    captions = [
        [] if row and prompt == prompts[row - 1] else wrapped(prompt, font, width - 2 * margin, 2)
        for row, prompt in enumerate(prompts)
    ]
    image_heights = [max(image.height for image in row) for row in zip(*columns, strict=True)]
    heights = [
        line * (len(caption) + len(scores)) + height + margin // 2 + (margin // 2 if caption else 0)
        for caption, height in zip(captions, image_heights, strict=True)
    ]
    head = margin // 2 + line * (1 + len(means))
    sheet = Image.new("RGB", (width, head + sum(heights) + margin // 2), "white")
    canvas = ImageDraw.Draw(sheet)
    lefts = [margin + sum(widths[:column]) + _GAP * column for column in range(len(widths))]
    for column, (left, title) in enumerate(zip(lefts, titles, strict=True)):
        centre = left + widths[column] / 2
        canvas.text((centre, margin // 2), title, fill=INK, font=bold, anchor="ma")
        for number, (name, values) in enumerate(means.items(), start=1):
            text = score_line(name, values[column], small, widths[column])
            canvas.text((centre, margin // 2 + line * number), text, fill=SOFT, font=small, anchor="ma")
    y = head
    for row, (caption, height) in enumerate(zip(captions, heights, strict=True)):
        top = y
        if caption:
            canvas.line((margin, y + margin // 4, width - margin, y + margin // 4), fill=RULE)
            top += margin // 2
        for text in caption:
            canvas.text((margin, top), text, fill=INK, font=font)
            top += line
        for column, left in enumerate(lefts):
            image = columns[column][row]
            sheet.paste(image, (left + (widths[column] - image.width) // 2, top))
            for number, (name, found) in enumerate(scores.items()):
                text = score_line(name, found[column][row], small, widths[column])
                below = (left + widths[column] / 2, top + image_heights[row] + 3 + line * number)
                canvas.text(below, text, fill=SOFT, font=small, anchor="ma")
        y += height
    save_png(sheet, path)


def _fitted(image: Image.Image) -> Image.Image:
    image = image.convert("RGB")
    factor = -(-_MIN_SIDE // min(image.size))
    if factor > 1:
        return enlarged(image, factor)
    if image.height > _MAX_HEIGHT:
        width = max(round(image.width * _MAX_HEIGHT / image.height), 1)
        return image.resize((width, _MAX_HEIGHT), Image.Resampling.LANCZOS)
    return image


def _check(
    prompts: Sequence[str],
    titles: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    scores: Scores,
    means: Mapping[str, Sequence[float | None]],
) -> None:
    if not prompts or not titles:
        raise ValueError("There is no image to draw: a strip needs a prompt and a column.")
    for name, found in (("images", images), *((f"scores[{key!r}]", value) for key, value in scores.items())):
        lengths = sorted({len(column) for column in found})
        if len(found) != len(titles) or lengths != [len(prompts)]:
            raise ValueError(
                f"`{name}` has {len(found)} columns of {lengths} rows; there are {len(titles)} titles and "
                f"{len(prompts)} prompts."
            )
    for name, values in means.items():
        if len(values) != len(titles):
            raise ValueError(f"`means[{name!r}]` has {len(values)} values for {len(titles)} columns.")
