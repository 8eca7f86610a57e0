"""Find the prompt and the stars of one image or video: inside its file, and in what lies beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from pathlib import Path
from typing import IO

from PIL import ImageFile, UnidentifiedImageError

from tgol_trainer._files import NotTextError, read_text
from tgol_trainer.data.files import same_name
from tgol_trainer.data.images import UNREADABLE, lacking_package, open_header

from .folders import IMAGES
from .generation import Generation, exif_texts, is_parameters, read_parameters, read_texts
from .stars import StarsError, exif_stars, xmp_stars
from .stealth import stealth_texts

_CAPTIONS = (".txt", ".caption")
_MOST_CAPTION_BYTES = 100_000
DARKTABLE = "XMP sidecars of darktable"
"""Place of a score; one star there may be nobody's."""


@dataclasses.dataclass(frozen=True)
class FileFacts:
    """What was found out about one file."""

    prompt: str | None = None
    score: float | None = None
    negative_prompt: str | None = None
    seed: str | None = None
    settings: str | None = None
    prompt_from: str | None = None
    score_from: str | None = None
    unread: str | None = None


def read_file(path: Path, folder: Path) -> FileFacts:
    """
    Read what a file and its neighbours say of its prompt and its score.

    Args:
        path (`Path`): An image or a video.
        folder (`Path`): Links to captions and sidecars that lead out of it are not followed.
    """
    made, score, score_from = None, None, None
    unread: list[str] = []
    if path.name.lower().endswith(IMAGES):
        try:
            with open_header(path) as image:
                made, score, score_from = _inside(image, unread)
        except UnidentifiedImageError:  # the check of the images says more
            unread.append(lacking_package(path) or "its format is not read")
        except UNREADABLE as error:
            unread.append(f"it cannot be opened: {error}")
    beside, (stars, place) = _caption(path, folder, unread), _sidecar(path, folder, unread)
    if stars is not None:
        score, score_from = stars, place
    made = beside or made
    if made is None:
        return FileFacts(score=score, score_from=score_from, unread="; ".join(unread) or None)
    if made.prompt is None and made.unread:
        unread.append(made.unread)
    return FileFacts(
        prompt=made.prompt,
        score=score,
        negative_prompt=made.negative_prompt,
        seed=None if made.seed is None else str(made.seed),  # up to 64 bits without a sign
        settings=json.dumps(made.settings, ensure_ascii=False) if made.settings else None,
        prompt_from=made.program if made.prompt else None,
        score_from=score_from,
        unread="; ".join(unread) or None,
    )


def _inside(image: ImageFile.ImageFile, unread: list[str]) -> tuple[Generation | None, float | None, str | None]:
    """Return what a file holds: how its image was made, its score, and where the score stands."""
    if image.format == "PNG" and image.fp is not None and _has_late_text(image.fp):
        image.load()  # Pillow reads what stands behind the pixels after them
    made = read_texts(_texts(image))
    exif = image.getexif()
    made = made or read_texts(exif_texts(exif)) or read_texts(stealth_texts(image))
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    packet = packet.encode("utf-8", errors="replace") if isinstance(packet, str) else packet
    if isinstance(packet, bytes):
        try:
            stars = xmp_stars(packet)
        except StarsError as error:
            unread.append(str(error))
            stars = None
        if stars is not None:
            return made, stars, "XMP in the files"
    stars = exif_stars(exif)
    return made, stars, None if stars is None else "EXIF"


def _has_late_text(file: IO[bytes]) -> bool:
    """Return whether a PNG file has a text or EXIF behind its pixels, where ExifTool for one writes XMP."""
    place, late = file.tell(), False
    file.seek(8)
    pixels = False
    while not late and len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        pixels |= kind == b"IDAT"
        late = pixels and kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
        file.seek(size + 4, os.SEEK_CUR)
    file.seek(place)
    return late


def _texts(image: ImageFile.ImageFile) -> dict[str, str]:
    return {str(name): text for name, text in image.info.items() if isinstance(text, str)}


def _beside(path: Path, ending: str, folder: Path, unread: list[str]) -> Path | None:
    """Return the file beside an image that has its name, also where Unicode spells the name otherwise."""
    for name in (Path(f"{path}{ending}"), path.with_suffix(ending)):  # `a.jpg.xmp` belongs to no `a.cr2`
        for each in (name, name.with_suffix(ending.upper())):
            file = Path(same_name(str(each)) or each)
            if not file.is_file():
                continue
            if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
                unread.append(f"{file.name} is a link that leads out of the folder")
                continue
            return file
    return None


def _caption(path: Path, folder: Path, unread: list[str]) -> Generation | None:
    """Return the prompt of a text file beside an image; A1111 writes its parameters into such files too."""
    for ending in _CAPTIONS:
        file = _beside(path, ending, folder, unread)
        if file is None:
            continue
        if file.stat().st_size > _MOST_CAPTION_BYTES:
            unread.append(
                f"{file.name} has {file.stat().st_size} bytes, more than the {_MOST_CAPTION_BYTES} of a caption"
            )
            continue
        try:
            text = read_text(file)
        except NotTextError as error:
            unread.append(str(error))
            continue
        made = read_parameters(text) if is_parameters(text) else Generation("", " ".join(text.split()) or None)
        if made.prompt is None:
            unread.append(f"{file.name} is empty")
            continue
        return dataclasses.replace(made, program=f"{ending} files")
    return None


def _sidecar(path: Path, folder: Path, unread: list[str]) -> tuple[float | None, str | None]:
    file = _beside(path, ".xmp", folder, unread)
    if file is None:
        return None, None
    try:
        packet = file.read_bytes()
        return xmp_stars(packet), DARKTABLE if b"http://darktable.sf.net/" in packet else "XMP sidecars"
    except StarsError as error:
        unread.append(f"{file.name}: {error}")
        return None, None
