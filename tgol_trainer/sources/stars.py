"""Read the stars that people give to images: `xmp:Rating` in a file or beside it, and the rating in EXIF."""

from __future__ import annotations

from typing import Any
from xml.parsers import expat

_RATING = "http://ns.adobe.com/xap/1.0/ Rating"
_EXIF_RATING = 0x4746
_MOST_BYTES = 16_000_000
_REJECTED = 0.0


class StarsError(ValueError):
    """A packet of XMP is not read; the message says why."""


def xmp_stars(packet: bytes) -> float | None:
    """
    Return the rating of an XMP packet.

    Args:
        packet (`bytes`): XML, as it stands in an image or in a sidecar.

    Returns:
        `float`, *optional*: 1 to 5 stars; 0 for an image that was rejected (-1 in XMP); `None` for one without a
        rating, which XMP also writes as 0.

    Raises:
        StarsError: for XML that is broken, too large, or declares entities, which can grow without end.
    """
    if len(packet) > _MOST_BYTES:
        raise StarsError(f"its XMP has {len(packet)} bytes, more than the {_MOST_BYTES} that are read")
    found: list[str] = []
    inside: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        inside.append(name)
        if _RATING in attributes:
            found.append(attributes[_RATING])

    def text(data: str) -> None:
        if inside and inside[-1] == _RATING:
            found.append(data)

    def refuse(*_: Any) -> None:
        raise StarsError("its XMP declares a document type, which may define entities that grow without end")

    parser = expat.ParserCreate(namespace_separator=" ")
    parser.StartElementHandler = start
    parser.EndElementHandler = lambda _: inside.pop()
    parser.CharacterDataHandler = text
    parser.StartDoctypeDeclHandler = refuse
    parser.buffer_text = True
    wide = packet.startswith((b"\xff\xfe", b"\xfe\xff"))  # UTF-16, whose zero bytes belong to its letters
    try:
        parser.Parse(packet if wide else packet.strip(b"\0 \r\n\t"), True)
    except expat.ExpatError as error:
        raise StarsError(f"its XMP is not XML: {error}") from error
    return next((number for number in map(_stars, found) if number is not None), None)


def exif_stars(exif: Any) -> float | None:
    """Return the rating of the EXIF block of an image, a mapping from tags; `None` for no rating."""
    return _stars(exif.get(_EXIF_RATING))


def _stars(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if number == -1:
        return _REJECTED
    return number if 0 < number <= 5 else None
