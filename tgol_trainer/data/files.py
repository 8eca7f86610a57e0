"""Open the file that a cell of a dataset names: regular files alone, also where Unicode spells the name otherwise."""

from __future__ import annotations

import functools
import io
import os
import stat
import unicodedata
from pathlib import Path
from typing import Any, BinaryIO

NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class NotAFileError(ValueError):
    """The path leads to something that may never end or never begin: a pipe, a device, a socket."""


def open_file(path: str | Path) -> BinaryIO:
    """
    Open a file for reading.

    A name that differs in Unicode form ("é" as one sign or as two) or in blanks at its ends is found all the same:
    archives and file systems of other machines change these.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        `BinaryIO`: the open file.

    Raises:
        OSError: one of `NO_FILE` where there is none; the message says what lies nearby, if anything.
        NotAFileError: for a pipe, a device or a socket, which could block for ever.
    """
    path = os.path.expanduser(path)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        found = same_name(path)
        if found is None:
            raise FileNotFoundError(_nearby(path)) from error
        path, mode = found, os.stat(found).st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(path)
    if not stat.S_ISREG(mode):
        raise NotAFileError("it is a pipe or a device, not a file. Save its content as a file")
    return open(path, "rb")


def read_url(url: str) -> io.BytesIO:
    """Return the content of a URL that `datasets` can read: hf://, https://, zip://a.png::hf://..., file://."""
    if url.startswith("file://"):
        with open_file(url.removeprefix("file://")) as file:
            return io.BytesIO(file.read())
    from datasets.utils.file_utils import xopen

    try:
        with xopen(url, "rb") as file:  # with the user's token
            return io.BytesIO(file.read())
    except KeyError as error:  # from fsspec before 2026, for a name that an archive lacks
        raise FileNotFoundError(f"{url}: {error}") from error


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def same_name(path: str, *, any_case: bool = False) -> str | None:
    """
    Return the one existing path whose parts are those of `path` but for their Unicode form and blanks at their ends.

    Args:
        path (`str`): The path that is looked for.
        any_case (`bool`, *optional*, defaults to `False`): Whether capital letters may differ too.

    Returns:
        `str`, *optional*: an absolute path; `None` if there is none, or more than one.
    """
    parts = Path(os.path.abspath(path)).parts
    found = parts[0]
    for part in parts[1:]:
        wanted = os.path.join(found, part)
        if not os.path.lexists(wanted):
            names = _names(found, any_case, _stamp(found)).get(_plain(part).casefold() if any_case else _plain(part))
            if names is None or len(names) > 1:
                return None
            wanted = os.path.join(found, names[0])
        found = wanted
    return found


def absolute_path(path: Any, folder: str | Path) -> Any:
    """
    Return a path of a table in `folder` as an absolute path; it may be written as on Windows. URLs, blanks and values
    of another type stay.
    """
    if not isinstance(path, str) or not path.strip() or "://" in path:
        return path
    path = os.path.join(os.path.abspath(folder), path.strip().replace("\\", os.sep))  # keeps an absolute path
    # A file that is put there later is found too: `open_file` looks once more.
    return path if os.path.exists(path) else same_name(path) or path


def _stamp(folder: str) -> int:
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=64)
def _names(folder: str, any_case: bool, stamp: int) -> dict[str, list[str]]:
    """Return the names in a folder by what they are compared by; `stamp` tells a folder that has changed."""
    found: dict[str, list[str]] = {}
    try:
        entries = os.listdir(folder)
    except OSError:
        return found
    for name in entries:
        found.setdefault(_plain(name).casefold() if any_case else _plain(name), []).append(name)
    return found


def _nearby(path: str) -> str:
    """Say what may have been meant by a path where no file is; empty if nothing comes near."""
    other = same_name(path, any_case=True)
    if other is not None:
        return f"there is {os.path.basename(other)!r}, whose capital letters differ: write it like that"
    parts = Path(os.path.abspath(path)).parts
    for index in range(1, len(parts) - 1):
        if parts[index] == parts[index + 1]:
            shorter = os.path.join(*parts[:index], *parts[index + 1 :])
            if os.path.exists(shorter):
                return f"there is {shorter!r}: leave {parts[index]!r} out, since paths count from the table's folder"
    return ""
