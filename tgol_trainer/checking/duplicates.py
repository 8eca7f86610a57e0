"""Find images that look nearly the same: compute a perceptual hash (mark) of each and group close marks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

MARK_BYTES = 35  # 256 bits of gradients, and the mean colour
DEFAULT_DISTANCE = 6  # bits of 256 that may differ between near duplicates; docs/checking.md has what was measured
_GRADIENT_BYTES = 32
_SIDE = 9
_MARGIN = 2.0  # grey levels of 255; neighbours that differ by less are equal, as a flat area is after lossy encoding
_COLOUR_TOLERANCE = 12
_FEWEST_BANDS = 8
# The bits of a band lie all over the image: a white sky or a plain background cannot fill a band with zeros.
_SHUFFLED = np.random.default_rng(0).permutation(8 * _GRADIENT_BYTES)


def image_mark(image: Image.Image) -> bytes:
    """
    Return a short mark that survives resizing and lossy encoding, but not cropping, turning or mirroring.

    It is the difference hash (dHash) in both directions on a 9 by 9 thumbnail: one bit where brightness rises to the
    next pixel by more than 2 grey levels, and one bit where it falls. The mean colour, which such hashes do not see,
    follows.

    Args:
        image (`PIL.Image.Image`): Mode `"RGB"`.

    Returns:
        `bytes`: of length `MARK_BYTES`.
    """
    small = np.asarray(image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    grey = small @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    gradients = np.concatenate([np.diff(grey[:-1], axis=1).ravel(), np.diff(grey[:, :-1], axis=0).ravel()])
    bits = np.concatenate([gradients > _MARGIN, gradients < -_MARGIN])
    return np.packbits(bits).tobytes() + np.rint(small.mean(axis=(0, 1))).astype(np.uint8).tobytes()


def group_marks(marks: np.ndarray, max_distance: int = DEFAULT_DISTANCE) -> np.ndarray:
    """
    Join marks that differ in few bits and have nearly the same mean colour; joining is transitive.

    The bits are cut into more bands than bits may differ, so two such marks agree in at least one band, and only marks
    that share a band are compared. Time grows with the number of such pairs, not with the square of the marks.

    Args:
        marks (`numpy.ndarray`): (N, `MARK_BYTES`) uint8, of [`image_mark`].
        max_distance (`int`, *optional*, defaults to 6): Bits of 256 that may differ, 0 to 31.

    Returns:
        `numpy.ndarray`: (N,) int64, one number per mark; equal numbers are one group.

    Raises:
        ValueError: for a distance outside 0 to 31.
    """
    if not 0 <= max_distance < 32:
        raise ValueError(f"`max_distance` must lie between 0 and 31, got {max_distance}.")
    if not len(marks):
        return np.zeros(0, dtype=np.int64)
    # Many equal marks, such as those of the blank images of failed generations, are one mark from here on.
    unique, inverse = np.unique(marks, axis=0, return_inverse=True)
    groups = np.arange(len(unique))
    colours = unique[:, _GRADIENT_BYTES:].astype(np.int16)
    for left, right in _sharing_a_band(unique[:, :_GRADIENT_BYTES], max(_FEWEST_BANDS, max_distance + 1)):
        apart = groups[left] != groups[right]
        left, right = left[apart], right[apart]
        bits = np.bitwise_count(unique[left, :_GRADIENT_BYTES] ^ unique[right, :_GRADIENT_BYTES]).sum(1)
        close = (bits <= max_distance) & (abs(colours[left] - colours[right]).max(1) <= _COLOUR_TOLERANCE)
        _join(groups, left[close], right[close])
    return groups[inverse.reshape(-1)]


def _sharing_a_band(gradients: np.ndarray, num_bands: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield two arrays at a time, pairs of rows whose bits agree in a band; sorted by the band they are neighbours."""
    for places in np.array_split(_SHUFFLED, num_bands):
        bits = gradients[:, places // 8] >> (7 - places % 8).astype(np.uint8) & 1
        packed = np.packbits(bits, axis=1)  # at most 32 bits
        band = np.zeros(len(packed), dtype=np.uint32)
        for byte in packed.T:
            band = band << np.uint32(8) | byte
        order = np.argsort(band, kind="stable")
        value = band[order]
        starts, step = np.arange(len(order) - 1), 1
        while starts.size:
            starts = starts[starts + step < len(order)]
            starts = starts[value[starts] == value[starts + step]]
            yield order[starts], order[starts + step]
            step += 1


def _join(groups: np.ndarray, left: np.ndarray, right: np.ndarray) -> None:
    """Overwrite `groups`: the two sides of each pair, and all they were joined with, get one number."""
    while True:
        one, other = groups[left], groups[right]
        apart = one != other
        if not apart.any():
            return
        np.minimum.at(groups, np.maximum(one, other)[apart], np.minimum(one, other)[apart])
        while (groups[groups] != groups).any():
            groups[:] = groups[groups]
