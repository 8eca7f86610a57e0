"""Open image values of any kind as RGB images, and turn RGB images into training pixels."""

from __future__ import annotations

import functools
import importlib.util
import io
import os
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from .colour import to_srgb
from .files import NO_FILE, NotAFileError, open_file, read_url

if TYPE_CHECKING:
    import torch

# What Pillow raises for broken files, over its many formats: UnidentifiedImageError is an OSError, a bad PNG chunk a
# SyntaxError, a bad TIFF tag anything from a KeyError to a struct.error.
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    KeyError,
    IndexError,
    TypeError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_ORIENTATION = 0x0112

# Pillow also opens EPS, for which it starts Ghostscript, and formats of films, fonts and measurements.
_FORMATS = ("AVIF", "BMP", "DIB", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "QOI", "TGA", "TIFF", "WEBP")
_PLUGIN_FORMATS = ("HEIF", "JXL")
"""Formats that Pillow opens with a package of their own, the extra `formats`."""
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
NO_VALUE, NO_SUCH_FILE = "there is neither a path nor data", "no such file"


class DataError(ValueError):
    """The data cannot be trained on as given; the message names column or argument, rows, cause and remedy."""


class VisualError(DataError):
    """
    One image or video that cannot be opened.

    Args:
        message (`str`): What went wrong, in the decoder's words where it has any.
        cause (`str`, *optional*, defaults to `"undecodable image"` or `"undecodable video"`):
            `"missing image"`, `"image file not found"`, `"truncated image"` or `"undecodable image"`, the same for
            videos, `"too few frames"` or `"image of a missing package"`.
    """

    medium = "image"

    # The second argument has a default because a DataLoader rebuilds a worker's exception from its message alone.
    def __init__(self, message: str, cause: str | None = None) -> None:
        super().__init__(message)
        self.cause = cause or f"undecodable {self.medium}"

    @property
    def absent(self) -> bool:
        """Whether there is nothing to open, as told from an image or video that is broken."""
        return self.cause in (f"missing {self.medium}", f"{self.medium} file not found")


class ImageError(VisualError):
    """One image that cannot be opened; see [`VisualError`]."""


def content_of(value: Any, error: type[VisualError]) -> Any:
    """Return the bytes or the path of an undecoded file, any other value as it is; raise `error` for no value."""
    if isinstance(value, dict):
        encoded = value.get("bytes")
        value = encoded if encoded is not None else value.get("path")
    if value is None or (isinstance(value, str) and not value.strip()):
        raise error(NO_VALUE, f"missing {error.medium}")
    return value


def open_image(value: Any) -> Image.Image:
    """
    Open an image given in any of the forms that datasets hold, as an upright RGB image.

    EXIF orientation is applied, and colours are converted to sRGB ([`to_srgb`]). Transparency is composited over
    white. Greyscale deeper than 8 bits is scaled, not clipped: `"I;16"` from 0..65535; `"I"` from 0..255 or 0..65535,
    whichever holds it, `"F"` also from 0..1; values beyond these from their own minimum..maximum. An animation gives
    its first frame.

    Args:
        value (`PIL.Image.Image`, `dict`, `str`, `pathlib.Path`, `bytes`, `numpy.ndarray` or nested `list`):
            An image; a dictionary with `"bytes"` or `"path"` (an undecoded [`datasets.Image`]); a path or a URL that
            `datasets` can read; an encoded file; or pixels (H, W) or (H, W, 1 to 4 channels), integers in 0..255 or
            floating point in 0..1.

    Returns:
        `PIL.Image.Image`: mode `"RGB"`, fully loaded, without EXIF orientation.

    Raises:
        ImageError: for a missing, truncated or undecodable image, and for a value of another kind.
    """
    try:
        image = _open(content_of(value, ImageError))
    except ImageError:
        raise
    except NO_FILE as error:
        raise ImageError(not_found(error), cause="image file not found") from error
    except NotAFileError as error:
        raise ImageError(str(error)) from error
    except UNREADABLE as error:
        message = f"{type(error).__name__}: {error}"
        if isinstance(error, Image.DecompressionBombError):
            message += " Save it with fewer pixels."
        if isinstance(error, UnidentifiedImageError):
            if (lacking := lacking_package(content_of(value, ImageError))) is not None:
                raise ImageError(lacking, "image of a missing package") from error
            # Without Pillow's own ending, the address of a buffer.
            message = f"cannot identify image file. These formats are read: {', '.join(readable_formats())}"
        truncated = isinstance(error, EOFError) or "truncated" in message.lower()
        raise ImageError(message, "truncated image" if truncated else None) from error
    if not image.width or not image.height:
        raise ImageError(f"a side of the image is zero: {image.width}x{image.height}")
    return image


def _open(value: Any) -> Image.Image:
    if isinstance(value, Image.Image):
        return _loaded(value)
    if isinstance(value, (np.ndarray, list, tuple)):
        return _loaded(_from_array(np.asarray(value)))
    if not isinstance(value, (str, Path, bytes, bytearray, memoryview)):
        raise ImageError(
            f"a value of type {type(value).__name__} is not an image; give a PIL image, a path, encoded bytes or a "
            "NumPy array"
        )
    # PIL.ImageFile.LOAD_TRUNCATED_IMAGES stays False, its default: a half grey image would be trained on.
    with _encoded(value) as file, Image.open(file, formats=readable_formats()) as image:
        return _loaded(image)


def lacking_package(value: Any) -> str | None:
    """
    Say which format a file has and what reads it, if a package is missing for that.

    Args:
        value (`str`, `pathlib.Path` or `bytes`): A path or encoded bytes.

    Returns:
        `str`, *optional*: `None` for any other file.
    """
    with _encoded(value) as file:
        start = file.read(16)
    format = None
    if start[4:8] == b"ftyp" and start[8:12] in _HEIF_BRANDS:
        format = "HEIF"
    elif start.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        format = "JXL"
    if format is None or format in readable_formats():
        return None
    return f"it is {format}, which `pip install 'tgol_trainer[formats]'` reads"


def open_header(path: Path) -> ImageFile.ImageFile:
    """
    Open an image file of a format that [`open_image`] reads, for what stands beside its pixels.

    Args:
        path (`Path`): The file.

    Returns:
        `PIL.ImageFile.ImageFile`: not decoded yet; close it.

    Raises:
        OSError: one of `UNREADABLE` where it cannot be opened.
    """
    return Image.open(path, formats=readable_formats())


def readable_formats() -> list[str]:
    """Return Pillow's names of the formats that are read here."""
    _register_plugins()
    Image.init()
    return [name for name in (*_FORMATS, *_PLUGIN_FORMATS) if name in Image.OPEN]


@functools.cache
def _register_plugins() -> None:
    if importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    if importlib.util.find_spec("pillow_jxl") is not None:
        importlib.import_module("pillow_jxl")  # registers itself


def _encoded(value: str | Path | bytes | bytearray | memoryview) -> BinaryIO:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return io.BytesIO(value)
    if isinstance(value, str) and "://" in value:
        try:
            return read_url(value)
        except UNREADABLE:
            raise
        except Exception as error:  # each client has its own errors, and a missing client raises ImportError
            raise ImageError(f"{type(error).__name__}: {error}") from error
    return open_file(value)


def not_found(error: OSError) -> str:
    """Return the message for a missing file: with what lies nearby, where [`open_file`] found something."""
    hint = str(error) if isinstance(error, FileNotFoundError) and error.errno is None else ""
    return f"{NO_SUCH_FILE}; {hint}" if hint else NO_SUCH_FILE


def _loaded(image: Image.Image) -> Image.Image:
    if image.format not in (
        None,
        "MPO",
        *readable_formats(),
    ):  # an object of the user's, of a format that may run programs
        raise ImageError(
            f"its format is {image.format}. Save it as PNG; these are read: {', '.join(readable_formats())}"
        )
    image.load()
    return _to_rgb(to_srgb(_upright(image)))


class Stored(NamedTuple):
    """How a file stores its image: Pillow's name of the mode, such as `"RGBA"`; the format; whether there are more."""

    mode: str
    format: str | None
    several: bool


def stored_form(value: Any) -> Stored | None:
    """
    Return how an image is stored, without decoding it; `None` for a URL, which would be fetched again. The value must
    be one that [`open_image`] opens.
    """
    value = content_of(value, ImageError)
    if isinstance(value, (list, tuple, np.ndarray)):
        value = _from_array(np.asarray(value))
    if isinstance(value, Image.Image):
        return Stored(value.mode, value.format, False)
    if isinstance(value, str) and "://" in value:
        return None
    with _encoded(value) as file, Image.open(file, formats=readable_formats()) as image:
        mode = image.mode  # before a second frame is looked at
        try:
            several = bool(getattr(image, "is_animated", False))
        except UNREADABLE:
            several = True  # there is a second one, and it is broken
        return Stored(mode, image.format, several)


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except (SyntaxError, ValueError, TypeError, KeyError, struct.error):
        return image  # broken metadata around good pixels: every viewer shows such a file unrotated
    # `exif_transpose` copies an image even where there is nothing to turn.
    return image if orientation == 1 else ImageOps.exif_transpose(image)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.float64), 65535.0)
    if image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        low, high = values.min(), values.max()
        if not np.isfinite(low + high):
            raise ImageError("the pixels hold NaN or infinite values")
        ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        whole = next((top for top in ranges if low >= 0 and high <= top), None)
        return _grey(values, whole) if whole else _grey(values - low, (high - low) or 1.0)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _grey(values: np.ndarray, whole: float) -> Image.Image:
    return Image.fromarray(np.rint(values * (255.0 / whole)).astype(np.uint8)).convert("RGB")


def _from_array(pixels: np.ndarray) -> Image.Image:
    if pixels.ndim == 3 and pixels.shape[2] not in (1, 2, 3, 4) and pixels.shape[0] in (1, 3, 4):
        raise ImageError(
            f"the array has shape {pixels.shape}, channels first; put them last: `image.transpose(1, 2, 0)`"
        )
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 2, 3, 4)) or not pixels.size:
        raise ImageError(f"the array has shape {pixels.shape}; expected (height, width) or (height, width, channels)")
    if pixels.dtype.kind == "b":
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.kind == "f":
        if not (pixels.min() >= 0 and pixels.max() <= 1):  # written so that NaN fails too
            raise ImageError(
                f"floating-point pixels must lie in 0..1, these run from {pixels.min():g} to {pixels.max():g}"
            )
        pixels = np.rint(pixels * 255)
    elif pixels.dtype.kind not in "ui" or pixels.min() < 0 or pixels.max() > 255:
        raise ImageError(f"pixels must be integers in 0..255 or floats in 0..1, not {pixels.dtype} beyond that")
    pixels = pixels.astype(np.uint8, copy=False)
    return Image.fromarray(np.ascontiguousarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def content_key(size: tuple[int, int], content: bytes) -> bytes:
    """Return a 16-byte hash of an image's (width, height) and pixels, or of a video's and its frames' digest."""
    import xxhash

    return xxhash.xxh3_128(b"%d %d " % size + content).digest()


def to_pixels(image: Image.Image, resolution: tuple[int, int]) -> torch.Tensor:
    """
    Resize an image until it covers the resolution, cut out the centre and scale to -1..1.

    Args:
        image (`PIL.Image.Image`): An image of any size; other modes than RGB go through [`open_image`].
        resolution (`tuple[int, int]`): (height, width) in pixels.

    Returns:
        `torch.Tensor`: (3, height, width), float32, -1 for black and 1 for white, contiguous.
    """
    import torch

    if image.mode != "RGB":
        image = open_image(image)
    height, width = resolution
    if image.size != (width, height):
        # This equals resizing everything and then cutting, without the large intermediate image. Pillow's LANCZOS is
        # antialiased: it widens its filter when it shrinks.
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=_kept_box(*image.size, resolution))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(127.5).sub_(1.0)


def _kept_box(width: int, height: int, resolution: tuple[int, int]) -> tuple[float, float, float, float]:
    kept_width = min(float(width), height * resolution[1] / resolution[0])
    kept_height = min(float(height), width * resolution[0] / resolution[1])
    left, top = (width - kept_width) / 2, (height - kept_height) / 2
    return left, top, min(left + kept_width, float(width)), min(top + kept_height, float(height))


def crop_offset(width: int, height: int, resolution: tuple[int, int]) -> tuple[int, int]:
    """
    Return (top, left) of the crop of [`to_pixels`] for an image of this width and height, in pixels of the resized
    image; `resolution` is (height, width).
    """
    left, top, right, bottom = _kept_box(width, height, resolution)
    return round(top * resolution[0] / (bottom - top)), round(left * resolution[1] / (right - left))


def cropped_share(width: int, height: int, resolution: tuple[int, int]) -> float:
    """
    Return the share of an image's area that the centre crop of [`to_pixels`] cuts away.

    Args:
        width (`int`): Width of the image in pixels.
        height (`int`): Height of the image in pixels.
        resolution (`tuple[int, int]`): (height, width) of the training pixels.

    Returns:
        `float`: at least 0, which is the same aspect ratio, and below 1.
    """
    ratio = (width * resolution[0]) / (height * resolution[1])
    return 1.0 - min(ratio, 1.0 / ratio)


def describe(value: Any, limit: int = 60) -> str:
    """Return a cell as a short text for a message: a path, a number of bytes, or a `repr` of about `limit` signs."""
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value = value.get("path") or value.get("bytes")
    if isinstance(value, (bytes, bytearray)):
        return f"<{len(value)} bytes>"
    if isinstance(value, np.ndarray):
        return f"<array {value.shape} {value.dtype}>"
    if isinstance(value, Image.Image):
        return f"<{value.mode} image {value.width}x{value.height}>"
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and len(value) > limit:
        # The end of a path tells more than its beginning.
        value = "..." + value[-limit + 3 :] if "/" in value and " " not in value else value[: limit - 3] + "..."
    text = repr(value) if not isinstance(value, (list, tuple)) or len(value) < 10 else f"<list of {len(value)}>"
    return text if len(text) <= limit + 2 else text[: limit - 3] + "..."
