"""Compute the offsets of the ordinal loss, which has several cut points instead of one threshold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def ordinal_offsets(percentiles: Sequence[float]) -> list[float]:
    """
    Return the offsets b_k of the cut points of the ordinal loss, which are the centred logits of the percentiles.

    An example at percentile p is above the cut points below p; `b_k = g_k - mean(g)` with `g_k = logit(p_k/100)` is
    the implicit reward at which being above the k-th is as likely as not under a logistic model of the scores.

    Args:
        percentiles (`Sequence[float]`): m increasing values in (0, 100).

    Returns:
        `list[float]`: m numbers of mean 0; `[0.0]` for one percentile.

    Raises:
        ValueError: for none, or values that do not increase within (0, 100).
    """
    inside = all(0 < p < 100 for p in percentiles)
    if not percentiles or not inside or any(a >= b for a, b in itertools.pairwise(percentiles)):
        raise ValueError(f"The percentiles must increase and lie between 0 and 100, got {list(percentiles)}.")
    logits = [math.log(p / (100 - p)) for p in percentiles]
    mean = sum(logits) / len(logits)
    return [logit - mean for logit in logits] if len(logits) > 1 else [0.0]
