"""Encode small copies of images for a report: a thumbnail for the gallery and a larger preview."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image

PREVIEW_FORMATS = ("PNG", "WEBP")
"""What is written here, and so all that is read again."""

THUMBNAIL_SIDE, PREVIEW_SIDE, CLIP_SIDE = 128, 512, 320
_LOSSLESS_SIDE = 64
_MILLISECONDS = 160


def encode_thumbnail(frames: Sequence[Image.Image]) -> bytes:
    """
    Encode an image at 128 pixels or fewer, or the first, middle and last frame of a video side by side: as PNG up to
    64 pixels per side, else as WebP.
    """
    shown = [frames[0]] if len(frames) == 1 else [frames[0], frames[len(frames) // 2], frames[-1]]
    small = [_reduced(frame, THUMBNAIL_SIDE) for frame in shown]
    if len(small) == 1 and max(small[0].size) <= _LOSSLESS_SIDE:
        return _encoded(small[0], format="PNG", optimize=True)
    strip = Image.new("RGB", (sum(frame.width for frame in small), small[0].height))
    for index, frame in enumerate(small):
        strip.paste(frame, (index * small[0].width, 0))
    return _encoded(strip, format="WEBP", quality=70)


def encode_preview(frames: Sequence[Image.Image]) -> bytes | None:
    """
    Encode an image at 512 pixels or fewer, or the frames of a video as an animation of 320, as WebP; return `None` if
    the thumbnail is as large.
    """
    if len(frames) > 1:
        first, *others = (_reduced(frame, CLIP_SIDE) for frame in frames)
        return _encoded(
            first, format="WEBP", quality=70, save_all=True, append_images=others, duration=_MILLISECONDS, loop=0
        )
    if max(frames[0].size) <= THUMBNAIL_SIDE:
        return None
    return _encoded(_reduced(frames[0], PREVIEW_SIDE), format="WEBP", quality=80)


def _reduced(image: Image.Image, side: int) -> Image.Image:
    image = image.convert("RGB")
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def _encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()
