"""Write files and folders that appear whole or not at all; read text, and say where it is not UTF-8."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """
    Yield a draft beside a file; the draft takes the file's place when the block ends without an error.

    Args:
        path (`str` or `os.PathLike`):
            The file. Missing folders are made. A file that exists keeps its mode, a new one gets that of the umask.

    Raises:
        OSError: where the folder cannot be written; the file is then as it was and no draft is left.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield draft
        draft.chmod(stat.S_IMODE(target.stat().st_mode) if target.exists() else _mode(target.parent))
        _sync(draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """
    Write a file at once; text is UTF-8.

    Args:
        path (`str` or `os.PathLike`): The file.
        content (`str` or `bytes`): All of it.
    """
    with replacing(path) as draft:
        draft.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: str | os.PathLike[str], content: dict[str, Any] | list[Any]) -> None:
    """
    Write indented JSON at once; values that JSON does not have become text.

    Args:
        path (`str` or `os.PathLike`): The file.
        content (`dict` or `list`): All of it.
    """
    write_file(path, json.dumps(content, indent=2, default=str) + "\n")


class NotTextError(ValueError):
    """A file is not UTF-8; the message names the file, line and character, and the remedy."""


def read_text(path: str | os.PathLike[str]) -> str:
    """
    Read a file of UTF-8 text, with or without a byte order mark.

    Args:
        path (`str` or `os.PathLike`): The file.

    Returns:
        `str`: its text, with line ends as they are.

    Raises:
        NotTextError: for another encoding.
    """
    check_text(path)
    return Path(path).read_bytes().decode("utf-8-sig")


def check_text(path: str | os.PathLike[str]) -> None:
    """
    Check that a file is UTF-8, line by line.

    Args:
        path (`str` or `os.PathLike`): The file.

    Raises:
        NotTextError: if it is not.
    """
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1 and line.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise NotTextError(f"{str(path)!r} is UTF-16. Save it as UTF-8.")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                place, byte = len(line[: error.start].decode("utf-8")) + 1, line[error.start]
                shown = bytes([byte]).decode("cp1252", errors="replace")
                raise NotTextError(
                    f"{str(path)!r} is not UTF-8: line {number}, character {place} is the byte 0x{byte:02x} "
                    f"({shown!r} in Windows-1252). Save the file as UTF-8 (a spreadsheet as 'CSV UTF-8')."
                ) from error
            if number == 1 and "\0" in text:
                raise NotTextError(f"{str(path)!r} holds zero bytes, as UTF-16 does. Save it as UTF-8.")


def settle(folder: str | os.PathLike[str]) -> None:
    """
    Bring all files below a folder to the disk, with the mode that the umask gives to any new file.

    safetensors makes its files readable for their owner alone.

    Args:
        folder (`str` or `os.PathLike`): The folder.
    """
    root = Path(folder)
    mode = _mode(root)
    for path in (*root.rglob("*"), root):
        if path.is_file():
            path.chmod(mode)
        _sync(path)


def move(source: Path, place: Path) -> None:
    """
    Put a settled file or folder in the place of another, which is gone when this returns.

    Args:
        source (`Path`): On the same disk.
        place (`Path`): A folder there is first moved to the side, since a rename replaces files alone.
    """
    aside = source.with_name(f"{place.name}.old")
    if place.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(place, aside)
    os.replace(source, place)
    _sync(place.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _mode(folder: Path) -> int:
    """Return the mode of a new file in a folder. `os.umask` cannot be asked without changing it for other threads."""
    probe = folder / f".{os.getpid()}.{threading.get_ident()}.mode"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    return mode


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # cannot open a folder
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
