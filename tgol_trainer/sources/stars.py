"""Read the stars that people give to images: `xmp:Rating` in a file or beside it, and the rating in EXIF."""

from __future__ import annotations

from typing import Any
from xml.parsers import expat

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns# "
_ROOT, _DESCRIPTION = _RDF + "RDF", _RDF + "Description"
_RATING = "http://ns.adobe.com/xap/1.0/ Rating"
_PERCENT = ("http://ns.microsoft.com/photo/1.0/ Rating", "http://ns.microsoft.com/photo/1.0 Rating")
_REJECTIONS = {
    "http://ns.adobe.com/xmp/1.0/DynamicMedia/ pick": "-1",  # Lightroom Classic
    "http://ns.adobe.com/xmp/1.0/DynamicMedia/ good": "false",  # Lightroom
    "http://www.digikam.org/ns/1.0/ PickLabel": "1",
}
_EXIF_RATING, _EXIF_PERCENT = 0x4746, 0x4749
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
        `float`, *optional*: 1 to 5 stars, of `xmp:Rating` or else of Microsoft's percentage; 0 for an image that was
        rejected (a rating of -1, or the flag of Lightroom or digiKam on an image without stars); `None` for one
        without a rating, which XMP also writes as 0.

    Raises:
        StarsError: for XML that is broken, too large, or declares entities, which can grow without end.
    """
    if len(packet) > _MOST_BYTES:
        raise StarsError(f"its XMP has {len(packet)} bytes, more than the {_MOST_BYTES} that are read")
    found: dict[str, str] = {}
    inside: list[str] = []

    def start(name: str, attributes: dict[str, str]) -> None:
        inside.append(name)
        if inside[-2:] == [_ROOT, _DESCRIPTION]:  # deeper ones describe other images, such as those of a collage
            for each, value in attributes.items():
                found.setdefault(each, value)

    def text(data: str) -> None:
        if inside[-3:-1] == [_ROOT, _DESCRIPTION] and data.strip():
            found.setdefault(inside[-1], data)

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
    stars = _stars(found.get(_RATING))
    if stars is None:
        stars = next((number for name in _PERCENT if (number := _stars_of_percent(found.get(name))) is not None), None)
    if stars is None and any(found.get(name, "").strip().lower() == value for name, value in _REJECTIONS.items()):
        stars = _REJECTED
    return stars


def exif_stars(exif: Any) -> float | None:
    """Return the rating of the EXIF block of an image, a mapping from tags; `None` for no rating."""
    stars = _stars(exif.get(_EXIF_RATING))
    return stars if stars is not None else _stars_of_percent(exif.get(_EXIF_PERCENT))


def _stars(value: Any) -> float | None:
    number = _number(value)
    if number == -1:
        return _REJECTED
    return number if number is not None and 0 < number <= 5 else None


def _stars_of_percent(value: Any) -> float | None:
    """Return the stars of Microsoft's percentage: 1, 25, 50, 75 and 99 stand for 1 to 5."""
    number = _number(value)
    if number is None or not 0 < number <= 100:
        return None
    return 1.0 + round(number / 25)


def _number(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
