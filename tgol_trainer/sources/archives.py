"""Unpack a zip file of images into the cache of `datasets`, and refuse one that would do harm."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

import datasets
from tqdm.auto import tqdm

from tgol_trainer.data.images import DataError

logger = logging.getLogger(__name__)

_LARGEST_RATIO = 100
_HARMLESS_BYTES = 100_000_000
"""Images shrink little: a file that grows a hundredfold and to more than this is made to fill the disk."""


def unpacked(archive: Path) -> Path:
    """
    Return a folder with the content of a zip file; it is unpacked once.

    Args:
        archive (`Path`): The zip file.

    Returns:
        `Path`: folder in the cache of `datasets`, or the one folder in it that holds everything.

    Raises:
        DataError: for a file that is no zip file, is encrypted, would leave the folder or fill the disk, or is broken.
    """
    status = archive.stat()
    key = f"{archive.resolve()}\0{status.st_size}\0{status.st_mtime_ns}".encode(errors="surrogateescape")
    place = Path(datasets.config.HF_DATASETS_CACHE, "tgol_zip", hashlib.blake2b(key, digest_size=12).hexdigest())
    if not place.is_dir():
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(dir=place.parent))
        try:
            _unpack(archive, draft)
            os.replace(draft, place)
        except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
            raise DataError(f"`source`: {str(archive)!r} cannot be unpacked: {error}. Save it again.") from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        logger.info("%s is unpacked to %s.", archive, place)
    inside = [entry for entry in place.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else place


def _unpack(archive: Path, folder: Path) -> None:
    with zipfile.ZipFile(archive) as content:
        members = [member for member in content.infolist() if not member.is_dir()]
        for member in members:
            cause = _cause(member)
            if cause is not None:
                raise DataError(f"`source`: {str(archive)!r} is refused: {member.filename!r} {cause}.")
        size, free = sum(member.file_size for member in members), shutil.disk_usage(folder).free
        if size > free:
            raise DataError(
                f"`source`: {str(archive)!r} is refused: unpacked it has {size} bytes, and {str(folder.parent)!r} has "
                f"{free} bytes left. Unpack what you need yourself, and name the folder."
            )
        for member in tqdm(members, desc=f"Unpacking {archive.name}", unit="file", disable=len(members) < 500):
            content.extract(member, folder)


def _cause(member: zipfile.ZipInfo) -> str | None:
    """Return why a file in an archive is not unpacked; `None` for a good one."""
    name = PurePosixPath(member.filename.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or ":" in name.parts[0]:
        return "leads out of the folder"
    if stat.S_ISLNK(member.external_attr >> 16):
        return "is a link"
    if member.flag_bits & 1:
        return "is encrypted. Unpack it yourself, and name the folder"
    if member.file_size > max(_HARMLESS_BYTES, _LARGEST_RATIO * member.compress_size):
        return f"has {member.compress_size} bytes and would have {member.file_size} unpacked, as no image does"
    return None
