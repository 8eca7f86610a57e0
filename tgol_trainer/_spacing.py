"""Choose evenly spaced positions: frames of a clip, columns of a strip, rows of a table."""

from __future__ import annotations


def evenly_spaced(total: int, count: int) -> list[int]:
    """
    Return `count` positions of 0 .. total - 1, the first and the last among them; all where there are no more.

    Args:
        total (`int`): Number of positions.
        count (`int`): Number to choose; one position is the first.

    Returns:
        `list[int]`: ascending and different.
    """
    if total <= count:
        return list(range(total))
    return [round(index * (total - 1) / max(count - 1, 1)) for index in range(count)]
