"""Read a size as it is written, a side in pixels or height and width, and refuse one that a model does not take."""

from __future__ import annotations

import math
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


def check_sides(multiple: int, max_side: int | None = None, **given: int | str | None) -> None:
    """
    Refuse a size that a model does not take.

    Args:
        multiple (`int`): Sides in pixels must be multiples of it.
        max_side (`int`, *optional*): The longest side in pixels that the model takes.
        given (`int` or `str`, *optional*):
            Name of an argument to its value: a side, or height and width as in `"480x832"`; `None` if it is not given.

    Raises:
        ValueError: for the first that does not fit, with the nearest that does.
    """
    longest = math.inf if max_side is None else max_side // multiple * multiple
    for name, value in given.items():
        sides = [] if value is None else [int(side) for side in str(value).split("x")]
        fitting = [min(max(round(side / multiple), 1) * multiple, longest) for side in sides]
        if fitting == sides:
            continue
        causes = []
        if min(sides) < 1:
            causes.append(f"is less than {multiple}, the shortest side that this model takes")
        elif any(side % multiple for side in sides):
            both = ", on both sides" if len(sides) > 1 else ""
            causes.append(f"is not a multiple of {multiple}, as this model needs{both}")
        if max(sides) > longest:
            causes.append(f"is more than {longest}, the longest side that this model takes")
        raise ValueError(f"`{name}` {value} {' and '.join(causes)}: use {'x'.join(map(str, fitting))}.")
