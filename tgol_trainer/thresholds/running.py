"""Follow the percentile of the last scores of a stream."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable


class RunningPercentile:
    """
    The percentile of the last `window` scores, by NumPy's "linear" rule.

    Use it for endless data, or scores that drift. A score is labelled by the threshold of the window that it closes.
    If the percentile is the smallest score of the window, τ is the midpoint to the next distinct one, as in
    [`estimate_threshold`]; a window of equal scores gives that score.

    Args:
        percentile (`float`, *optional*, defaults to 50.0): Between 0 and 100.
        window (`int`, *optional*, defaults to 1024): Scores kept, at least 2.
        initial (`Iterable[float]`, *optional*): Finite scores seen before; the last `window` of them fill the window.

    Raises:
        ValueError: for a percentile or window out of range.
    """

    def __init__(self, percentile: float = 50.0, window: int = 1024, initial: Iterable[float] = ()) -> None:
        if not 0 <= percentile <= 100:
            raise ValueError(f"`percentile` must lie between 0 and 100, got {percentile}.")
        if window < 2:
            raise ValueError(f"`window` must be at least 2, got {window}.")
        self.percentile, self.window = percentile, window
        self._recent: deque[float] = deque(initial, maxlen=window)
        self._sorted = sorted(self._recent)

    def add(self, score: float) -> float:
        """Take in one finite score and return τ of the window that it closes; costs O(window)."""
        if len(self._recent) == self.window:
            del self._sorted[bisect.bisect_left(self._sorted, self._recent[0])]
        self._recent.append(score)
        bisect.insort(self._sorted, score)
        return self.value

    @property
    def value(self) -> float:
        """τ of the current window; NaN while it is empty."""
        scores = self._sorted
        if not scores:
            return math.nan
        position = self.percentile / 100 * (len(scores) - 1)
        below = math.floor(position)
        low, high = scores[below], scores[min(below + 1, len(scores) - 1)]
        value = low + (position - below) * (high - low)
        if value > scores[0]:
            return value
        second = bisect.bisect_right(scores, scores[0])
        return scores[0] if second == len(scores) else scores[0] + (scores[second] - scores[0]) / 2
