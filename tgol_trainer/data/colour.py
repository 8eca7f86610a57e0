"""Bring the colours of an image to sRGB, which models and scorers take pixels for."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_PROFILED = ("RGB", "L", "CMYK")
"""Modes whose pixels a colour profile describes. Others are brought to one of them first, or have no such profile."""


def to_srgb(image: Image.Image) -> Image.Image:
    """
    Convert an image by the colour profile that it carries; the result carries none.

    Phones store Display P3 and cameras Adobe RGB: without the conversion their images are paler than anybody saw
    them. Transparency stays as it is. A profile that cannot be read or does not fit the image is ignored, as viewers
    do, and so is one of 16-bit grey.

    Args:
        image (`PIL.Image.Image`): Of any mode, loaded.

    Returns:
        `PIL.Image.Image`: the image itself if there is nothing to convert.
    """
    profile = image.info.get("icc_profile")
    if not isinstance(profile, bytes) or not profile:
        return image
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    opaque, alpha = image, None
    if image.mode in ("RGBA", "LA"):
        opaque, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
    transform = _transform(profile, opaque.mode) if opaque.mode in _PROFILED else None
    if transform is None:
        return image
    converted = transform.apply(opaque)
    converted.info.pop("icc_profile", None)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile to sRGB; `None` for a broken one, and for sRGB itself."""
    try:
        transform = ImageCms.buildTransform(
            ImageCms.getOpenProfile(io.BytesIO(profile)),
            ImageCms.createProfile("sRGB"),
            *(mode, "RGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if mode == "CMYK":
            return transform
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 1, 3)
        samples = Image.fromarray(grid if mode == "RGB" else grid[..., 0])
        moved = np.asarray(transform.apply(samples), dtype=int) - np.asarray(samples.convert("RGB"))
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    # Rounding alone would change the pixels of nearly every image, whose profile is sRGB.
    return transform if np.abs(moved).max() > 2 else None
