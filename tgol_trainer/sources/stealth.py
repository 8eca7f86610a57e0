"""Read the text that NovelAI and an extension of A1111 hide in the transparency of an image."""

from __future__ import annotations

import json
import zlib

import numpy as np
from PIL import Image

_PLAIN, _PACKED = b"stealth_pnginfo", b"stealth_pngcomp"
_START = 8 * (len(_PLAIN) + 4)
_MOST_BYTES = 1_000_000


def stealth_texts(image: Image.Image) -> dict[str, str]:
    """
    Return what the lowest bits of the alpha channel hold, column by column: a word, a length in bits, and a text,
    which may be packed by gzip.

    Args:
        image (`PIL.Image.Image`): It is decoded if it has an alpha channel.

    Returns:
        `dict[str, str]`: as the text chunks of a PNG file; nothing for an image without such a text.
    """
    if image.mode != "RGBA":
        return {}
    alpha = np.asarray(image.getchannel("A")).T.reshape(-1)
    start = np.packbits(alpha[:_START] & 1).tobytes()
    word, size = start[: len(_PLAIN)], int.from_bytes(start[len(_PLAIN) :], "big")
    if word not in (_PLAIN, _PACKED) or size > min(len(alpha) - _START, 8 * _MOST_BYTES):
        return {}
    content = np.packbits(alpha[_START : _START + size] & 1).tobytes()
    if word == _PACKED:
        unpacking = zlib.decompressobj(wbits=31)
        try:
            content = unpacking.decompress(content, _MOST_BYTES)
        except zlib.error:
            return {}
        if not unpacking.eof:  # it is cut short, or would grow beyond any prompt
            return {}
    text = content.decode("utf-8", errors="replace")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        return {"parameters": text}
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in found.items()}
