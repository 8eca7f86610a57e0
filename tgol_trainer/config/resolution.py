"""Read a training size as it is written: a side in pixels, or height and width."""

from __future__ import annotations

import re

_LARGEST_SIDE = 16384
"""Pixels. Larger images would fill the memory before anything is said of them."""


def read_resolution(value: int | str | None) -> int | str | None:
    """
    Return a side as a number, and height and width as `"480x832"`; from a command line both come as text.

    Raises:
        ValueError: for another form, and for a side that is no number from 1 to 16384.
    """
    if value is None:
        return None
    match = re.fullmatch(r"(\d+)(?:\s*[x×X*]\s*(\d+))?", str(value).strip())
    if match is None or not all(0 < int(side) <= _LARGEST_SIDE for side in match.groups() if side is not None):
        raise ValueError(
            f"`resolution` must be at least 1 and at most {_LARGEST_SIDE}: a number of pixels, or height and width as "
            f"in '480x832', got {value!r}."
        )
    return int(match[1]) if match[2] is None else f"{int(match[1])}x{int(match[2])}"


def size_of(resolution: int | str | None) -> tuple[int, int] | None:
    """Return the (height, width) in pixels that [`read_resolution`] read; `None` where it is not given."""
    sides = [] if resolution is None else [int(side) for side in str(resolution).split("x")]
    return (sides[0], sides[-1]) if sides else None
