"""Give images of different shapes training sizes of their own, of about the same number of pixels."""

from __future__ import annotations

import logging

import numpy as np

logger = logging.getLogger(__name__)

MAX_RATIO = 2.0
"""Ratio of the longer side of a size to the shorter one, at most."""
_STEPS = 16
"""A square's side has about so many steps between sizes: 64 pixels at 1024, 32 at 512."""


class Buckets:
    """
    The sizes that images are trained at: near the area of one size, and never above it.

    Sides are multiples of a step, which is itself a multiple of what the model needs. The shorter side is at least
    half of the longer one. An image goes to the size of the nearest aspect ratio, in its logarithm.

    Args:
        resolution (`tuple[int, int]`): (height, width) in pixels; the first size, whose area the others keep.
        multiple (`int`): Both sides of every other size are multiples of it.
        max_side (`int`, *optional*): The longest side in pixels that the model takes.
    """

    def __init__(self, resolution: tuple[int, int], multiple: int, max_side: int | None = None) -> None:
        area = resolution[0] * resolution[1]
        step = multiple * max(1, round(area**0.5 / _STEPS / multiple))
        sizes = [resolution]
        for height in range(step, int((area * MAX_RATIO) ** 0.5) + 1, step):
            width = area // height // step * step
            short, long = sorted((height, width))
            fits = max_side is None or long <= max_side
            if short and long <= MAX_RATIO * short and fits and (height, width) != resolution:
                sizes.append((height, width))
        self.sizes = np.array(sizes)
        self._log_ratios = np.log(self.sizes[:, 1] / self.sizes[:, 0])

    def of(self, sizes: np.ndarray) -> np.ndarray:
        """
        Return the bucket of each image, as numbers into `sizes` of the buckets.

        Args:
            sizes (`numpy.ndarray`): (N, 2) widths and heights of images in pixels.

        Returns:
            `numpy.ndarray`: (N,) int64.
        """
        different, inverse = np.unique(sizes, axis=0, return_inverse=True)
        ratios = np.log(different[:, 0] / different[:, 1])
        distance = np.abs(ratios[:, None] - self._log_ratios)
        # Of equally near sizes the largest, which only matters where a ratio lies in the middle.
        nearest = distance <= distance.min(axis=1, keepdims=True) + 1e-9
        return np.where(nearest, self.sizes.prod(axis=1), 0).argmax(axis=1)[inverse.reshape(-1)]

    def resolutions(self, sizes: np.ndarray, batch_size: int) -> np.ndarray | None:
        """
        Return the training size of each image, so that every size fills at least one batch.

        A size with fewer images than a batch gives them to the nearest size that has more, with a warning.

        Args:
            sizes (`numpy.ndarray`): (N, 2) widths and heights of images in pixels.
            batch_size (`int`): Rows of a batch.

        Returns:
            `numpy.ndarray`, *optional*: (N, 2) heights and widths; `None` if all are the first size.
        """
        numbers = self.of(sizes)
        counts = np.bincount(numbers, minlength=len(self.sizes))
        full = np.flatnonzero(counts >= batch_size)
        if not full.size:
            full = np.array([counts.argmax()])
        moved = int(counts.sum() - counts[full].sum())
        if moved:
            logger.warning(
                "%d of %d images have a shape that too few share to fill a batch of %d. They are trained at the "
                "nearest size, which cuts more of them away. Smaller batches leave them their own.",
                *(moved, len(sizes), batch_size),
            )
        distance = np.abs(self._log_ratios[:, None] - self._log_ratios[full])
        final = full[distance.argmin(axis=1)][numbers]
        return self.sizes[final] if final.any() else None
