"""Define the threshold of a dataset, and check that scores can be divided by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

_ROUNDING = 1e-13


class ThresholdError(ValueError):
    """The scores cannot be divided into two classes as asked; the message says why and what to change."""


@dataclasses.dataclass(frozen=True)
class Threshold:
    """
    A threshold τ, and how it divides the scores.

    Args:
        value (`float`):
            τ, in the (normalised) unit of the scores it was estimated from; a score equal to τ is positive.
        source (`str`): `"percentile"`, `"fixed"`, `"proxy"`, `"group"` or `"oracle"`.
        num_scores (`int`): Number of scores labelled.
        num_positive (`int`): Scores with `score >= value`.
        num_ties (`int`): Scores equal to `value`.
        percentile (`float`, *optional*): The percentile asked for, 0 to 100; `None` for a fixed value.
        moved_from (`float`, *optional*):
            The percentile's own value, if it left the negative side empty and τ was moved; else `None`.
    """

    value: float
    source: str
    num_scores: int
    num_positive: int
    num_ties: int
    percentile: float | None = None
    moved_from: float | None = None

    @property
    def num_negative(self) -> int:
        """Scores below the threshold."""
        return self.num_scores - self.num_positive

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary."""
        return dataclasses.asdict(self)


def checked_scores(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return scores as (N,) float64, at least two different finite ones, or raise [`ThresholdError`]."""
    values = np.asarray(scores, dtype=np.float64).reshape(-1)
    if values.size == 0:
        raise ThresholdError("There are no scores: a threshold needs at least two different ones.")
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        rows = ", ".join(f"row {row}: {values[row]}" for row in bad[:5])
        raise ThresholdError(
            f"{bad.size} of {values.size} scores are NaN or infinite ({rows}). Remove those rows before estimating."
        )
    low, high = float(values.min()), float(values.max())
    if high - low <= rounding_error(values):
        rounding = f" up to rounding (they differ by {high - low:.2g})" if high > low else ""
        raise ThresholdError(
            f"All {values.size} scores equal {values[0]}{rounding}: nothing separates good from bad samples. Check "
            "that the right column was named, score with another reward, or add samples of other quality."
        )
    return values


def rounding_error(values: np.ndarray) -> float:
    """
    Return the difference below which (N,) float64 scores are the same number: 16 units in the last place of the
    largest one, in float32 where float32 holds every score, as of a column of that type.
    """
    with np.errstate(over="ignore"):
        single = bool((values.astype(np.float32) == values).all())
    return 16 * float(np.finfo(np.float32 if single else np.float64).eps) * float(np.abs(values).max())


def shown(value: float, spread: float) -> float:
    """Return a number in the unit of scores as a person is told it: 0 where it is rounding beside their `spread`."""
    return 0.0 if abs(value) < _ROUNDING * spread else value


def deviation(values: np.ndarray) -> float:
    """Return the standard deviation of (N,) scores, also of those whose squares float64 cannot hold."""
    size = float(np.abs(values).max()) or 1.0
    return float((values / size).std()) * size if size > 1e100 else float(values.std())


def checked_groups(scores: Sequence[float] | np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return [`checked_scores`] and their groups (N,) as int64, or raise [`ThresholdError`] if the lengths differ."""
    values, groups = checked_scores(scores), np.asarray(groups, dtype=np.int64).reshape(-1)
    if groups.size != values.size:
        raise ThresholdError(f"There are {values.size} scores and {groups.size} groups: each score needs one.")
    return values, groups


def labelled(values: np.ndarray, value: float, source: str, **facts: float | None) -> Threshold:
    """Return the [`Threshold`] of a τ in the unit of `values`, with the counts of those (N,) scores."""
    positive = int((values >= value).sum())
    return Threshold(
        value=float(value),
        source=source,
        num_scores=int(values.size),
        num_positive=positive,
        num_ties=int((values == value).sum()),
        **facts,
    )
