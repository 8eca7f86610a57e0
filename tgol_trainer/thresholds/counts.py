"""Count labels by group (a prompt, a style, a source), and find groups whose labels are all equal."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class GroupCounts:
    """
    Counts of the labels of G groups.

    Args:
        num_rows (`np.ndarray`): (G,) integers.
        num_positive (`np.ndarray`): (G,) integers, rows at or above the threshold.
        mean (`np.ndarray`): (G,) float64, mean score.
        threshold (`np.ndarray`):
            (G,) float64, mean τ of the group's rows, which is the group's own τ if groups have their own.
    """

    num_rows: np.ndarray
    num_positive: np.ndarray
    mean: np.ndarray
    threshold: np.ndarray

    def __len__(self) -> int:
        return self.num_rows.size

    @property
    def several(self) -> np.ndarray:
        """(G,) bool, groups of at least two rows."""
        return self.num_rows > 1

    @property
    def one_sided(self) -> np.ndarray:
        """(G,) bool, groups of at least two rows whose labels are all equal."""
        return self.several & ((self.num_positive == 0) | (self.num_positive == self.num_rows))

    def one_sided_by_chance(self) -> float:
        """Share of the groups of several rows that would be one-sided if labels fell on rows at random."""
        sizes, positives = self.num_rows[self.several], self.num_positive[self.several]
        if not sizes.size:
            return 0.0
        rate = positives.sum() / sizes.sum()
        return float(np.mean(rate**sizes + (1 - rate) ** sizes))


def count_groups(groups: np.ndarray, scores: np.ndarray, threshold: float | np.ndarray) -> GroupCounts:
    """
    Count labels by group.

    Args:
        groups (`np.ndarray`): (N,) integers 0 .. G - 1, each number present; see [`group_ids`].
        scores (`np.ndarray`): (N,) float64.
        threshold (`float` or `np.ndarray`): τ, or (N,) one τ per row if groups have their own.

    Returns:
        [`GroupCounts`]
    """
    # At most two arrays of eight bytes per group at a time, since there may be ten million groups.
    kind = np.int32 if groups.size < 2**31 else np.int64
    num_rows = np.bincount(groups).astype(kind)
    num_positive = np.bincount(groups[scores >= threshold], minlength=num_rows.size).astype(kind)
    mean = np.bincount(groups, weights=scores).astype(np.float64, copy=False)
    np.divide(mean, num_rows, out=mean)
    own = np.ndim(threshold) > 0
    return GroupCounts(
        num_rows=num_rows,
        num_positive=num_positive,
        mean=mean,
        threshold=np.divide(np.bincount(groups, weights=threshold), num_rows)
        if own
        else np.broadcast_to(np.float64(threshold), num_rows.shape),
    )


def count_differing(groups: np.ndarray, scores: np.ndarray) -> int:
    """
    Count the groups whose scores are not all equal: those that a threshold of their own divides.

    Args:
        groups (`np.ndarray`): (N,) integers 0 .. G - 1, each number present; see [`group_ids`].
        scores (`np.ndarray`): (N,) float64.

    Returns:
        `int`
    """
    one = np.empty(int(groups.max()) + 1)
    one[groups] = scores
    differs = np.zeros(one.size, dtype=bool)
    differs[groups[scores != one[groups]]] = True
    return int(np.count_nonzero(differs))
