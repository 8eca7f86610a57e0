"""Turn scores into what training reads of each row: the normalised score, the margin and the weight."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tgol_trainer import thresholds
from tgol_trainer.thresholds import Weighting

logger = logging.getLogger(__name__)

_TINY, _HUGE = np.finfo(np.float32).tiny, np.finfo(np.float32).max
_BLOCK = 100_000


@dataclasses.dataclass(frozen=True)
class RowLabels:
    """
    What training reads of the scores of N rows. The label of a row is the sign of its margin; 0 is positive.

    Args:
        score (`numpy.ndarray`): (N,) float32, the normalised score.
        margin (`numpy.ndarray`): (N,) float32, normalised score − τ.
        weight (`numpy.ndarray`): (N,) float32, weight w of each margin.
    """

    score: np.ndarray
    margin: np.ndarray
    weight: np.ndarray

    def row(self, index: int) -> dict[str, Any]:
        """Return the values of one row, as a batch names them."""
        return {"score": self.score[index], "margin": self.margin[index], "weight": self.weight[index]}


@dataclasses.dataclass(frozen=True)
class Labeler:
    """
    How scores become margins and weights, fitted to training data by [`fit_labels`].

    Args:
        threshold ([`thresholds.Threshold`]):
            The global τ in normalised units. Its counts are those of the training rows, as far as their scores are
            known; where rows have a τ of their own, the counts use that.
        normalization ([`thresholds.ScoreNormalization`], *optional*): Applied to scores before τ.
        weights ([`thresholds.WeightSummary`], *optional*):
            Summary of the weights of the training rows, where their scores are known.
        weighting ([`thresholds.Weighting`], *optional*): Turns margins into weights.
        by_group (`Mapping[str, float]`, *optional*):
            τ of each group in normalised units. Other groups take the global τ. `None` without groups.
        rows (`numpy.ndarray`, *optional*): (N,) τ of each training row, where rows differ.
        strategy (`dict`, *optional*): Facts about how τ was found, JSON-serialisable.
        score_std (`float`, *optional*, defaults to 1.0): Standard deviation of the source scores in normalised units.
        source (`numpy.ndarray`, *optional*):
            (M,) source scores in normalised units, in the order they were read. Kept only where they are needed.
        combination ([`thresholds.ScoreCombination`], *optional*):
            Makes one score of several columns, before normalisation.
        window (`int`, *optional*): Number of last scores whose percentile is the running threshold of a stream.
    """

    threshold: thresholds.Threshold
    normalization: thresholds.ScoreNormalization = dataclasses.field(default_factory=thresholds.ScoreNormalization)
    weights: thresholds.WeightSummary | None = None
    weighting: Weighting = dataclasses.field(default_factory=Weighting)
    by_group: Mapping[str, float] | None = None
    rows: np.ndarray | None = None
    strategy: dict[str, Any] = dataclasses.field(default_factory=dict)
    score_std: float = 1.0
    source: np.ndarray | None = None
    combination: thresholds.ScoreCombination | None = None
    window: int | None = None

    def __call__(
        self,
        scores: Sequence[float] | np.ndarray,
        tau: np.ndarray | float | None = None,
    ) -> RowLabels:
        """
        Label rows.

        Args:
            scores (`Sequence[float]`): (N,) raw scores, or (N, K) of the K columns of `combination`.
            tau (`numpy.ndarray` or `float`, *optional*):
                (N,) τ of the rows in normalised units; by default the global one.

        Returns:
            [`RowLabels`]: margins are computed in float64, so that their sign is exact, and stored in float32.
        """
        values = self.normalized(scores)
        margin = margins(values, self.threshold.value if tau is None else tau)
        score = np.clip(values, -_HUGE, _HUGE).astype(np.float32)
        return RowLabels(score, margin, self.weighting(margin).astype(np.float32, copy=False))

    def normalized(self, scores: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return (N,) float64 scores in normalised units, of (N,) raw scores or (N, K) of several columns."""
        values = np.asarray(scores, dtype=np.float64)
        if self.combination is not None and values.ndim == 2:
            values = self.combination(values)
        return self.normalization(values)

    def row_thresholds(self, groups: Sequence[str]) -> np.ndarray | None:
        """Return the (N,) τ of rows by their groups, or `None` where all rows have the global τ."""
        if self.by_group is None:
            return None
        return np.array([self.by_group.get(group, self.threshold.value) for group in groups], dtype=np.float64)

    def follower(self) -> Callable[[float], dict[str, Any]]:
        """
        Return a function that labels the raw scores of a stream one by one.

        With a running threshold the function follows the scores that it is given, starting from the last ones of
        `source`; else every score meets the global τ.
        """
        running = self.running_percentile() if self.window is not None else None

        def label(score: float) -> dict[str, Any]:
            tau = None if running is None else running.add(float(self.normalized([score])[0]))
            return self([score], tau).row(0)

        return label

    def running_percentile(self) -> thresholds.RunningPercentile:
        """Return the running threshold as it stands before the first row of training."""
        initial = [] if self.source is None or self.window is None else self.source[-self.window :].tolist()
        percentile = 50.0 if self.threshold.percentile is None else self.threshold.percentile
        return thresholds.RunningPercentile(percentile, self.window or 1024, initial)

    def to_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, JSON-serialisable: no scores and no names of groups."""
        digest = None if self.rows is None else hashlib.blake2b(self.rows.tobytes(), digest_size=16).hexdigest()
        return {
            "threshold": self.threshold.to_dict(),
            "normalization": dataclasses.asdict(self.normalization),
            "weights": dataclasses.asdict(self.weights) if self.weights else None,
            "weighting": dataclasses.asdict(self.weighting),
            "strategy": self.strategy,
            "score_std": self.score_std,
            "row_thresholds_blake2b": digest,
            "combination": dataclasses.asdict(self.combination) if self.combination else None,
        }

    def restored(self, saved: Mapping[str, Any]) -> Labeler:
        """
        Return the labeler of a checkpoint, for the data that this one was fitted to.

        Args:
            saved (`Mapping[str, Any]`): What `to_dict` returned when the checkpoint was written.

        Raises:
            ValueError: if the checkpoint's scores were made of other columns, or by another rule.
        """
        combination = self._restored_combination(saved.get("combination"))
        threshold = thresholds.Threshold(**saved["threshold"])
        if threshold.value != self.threshold.value:
            logger.warning(
                "The checkpoint's threshold is %.6g, the threshold of the data given now is %.6g. Training resumes "
                "with the checkpoint's. Start anew if the data were meant to change.",
                *(thresholds.shown(value, self.score_std) for value in (threshold.value, self.threshold.value)),
            )
        if saved["row_thresholds_blake2b"] != self.to_dict()["row_thresholds_blake2b"]:
            logger.warning(
                "The rows given now have other thresholds than the checkpoint was trained with. Training resumes "
                "with the thresholds of the rows given now. Start anew if the data were meant to change."
            )
        return dataclasses.replace(
            self,
            threshold=threshold,
            normalization=thresholds.ScoreNormalization(**saved["normalization"]),
            weights=thresholds.WeightSummary(**saved["weights"]) if saved["weights"] else None,
            weighting=Weighting(**saved["weighting"]),
            score_std=saved["score_std"],
            combination=combination,
        )

    def _restored_combination(self, saved: Mapping[str, Any] | None) -> thresholds.ScoreCombination | None:
        before = thresholds.ScoreCombination.from_dict(saved) if saved else None
        rules = [(each.columns, each.weights, each.method) if each else None for each in (before, self.combination)]
        if rules[0] != rules[1]:
            then, now = (
                "one score column" if rule is None else f"{rule[2]} of {rule[0]} by {rule[1]}" for rule in rules
            )
            raise ValueError(
                f"The checkpoint was trained on {then}, this run asks for {now}. Resume with the `score_columns`, "
                "`score_weights` and `score_combination` of the checkpoint, or start anew."
            )
        if before != self.combination:
            logger.warning(
                "The score columns of the data given now have other means, standard deviations or thresholds than "
                "the checkpoint's. Training resumes with the checkpoint's. Start anew if the data were meant to "
                "change."
            )
        return before


def margins(scores: np.ndarray, tau: np.ndarray | float) -> np.ndarray:
    """
    Return `scores − tau`, rounded to float32 with their signs kept.

    A label is the sign of its margin. A difference that float32 would round to 0, or to a subnormal number that some
    devices flush to 0, becomes the smallest normal number of its sign; 0 stays 0. Larger numbers stay finite.

    Args:
        scores (`numpy.ndarray`): (N,) float64.
        tau (`numpy.ndarray` or `float`): float64, one value or (N,).

    Returns:
        `numpy.ndarray`: (N,).
    """
    scores, tau = np.broadcast_arrays(scores, tau)  # views
    rounded = np.empty(scores.shape, dtype=np.float32)
    for start in range(0, len(scores), _BLOCK):  # keeps the float64 copies small
        part = scores[start : start + _BLOCK] - tau[start : start + _BLOCK]
        size = np.clip(np.abs(part), _TINY, _HUGE)
        rounded[start : start + _BLOCK] = np.where(part == 0, 0.0, np.copysign(size, part))
    return rounded
