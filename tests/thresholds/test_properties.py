"""Thresholds of any scores, found by hypothesis: labels, ties, order, scale, windows."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgol_trainer.thresholds import RunningPercentile, ThresholdError, estimate_threshold

RATINGS = st.integers(1, 5).map(float)
NUMBERS = st.floats(-1e9, 1e9, allow_subnormal=False)
SCORES = st.lists(st.one_of(RATINGS, NUMBERS), min_size=1, max_size=40)
PERCENTILES = st.floats(0, 100)


@given(SCORES, PERCENTILES)
@settings(max_examples=200)
def test_both_sides_are_filled_and_counted_or_all_scores_are_equal(scores, percentile):
    if len(set(scores)) == 1:
        with pytest.raises(ThresholdError):
            estimate_threshold(scores, percentile=percentile)
        return
    found = estimate_threshold(scores, percentile=percentile)
    counts = Counter(score >= found.value for score in scores)
    assert (found.num_positive, found.num_negative) == (counts[True], counts[False])
    assert counts[True] and counts[False]
    assert found.num_ties == scores.count(found.value)
    assert min(scores) < found.value <= max(scores)


@given(st.lists(RATINGS, min_size=2, max_size=30).filter(lambda scores: len(set(scores)) > 1), st.randoms())
@settings(max_examples=100)
def test_the_order_of_rows_and_a_scale_of_a_power_of_two_change_nothing(scores, random):
    found = estimate_threshold(scores)
    mixed = scores.copy()
    random.shuffle(mixed)
    assert estimate_threshold(mixed) == found
    assert estimate_threshold([4 * score for score in scores]).value == 4 * found.value


@given(
    st.lists(RATINGS, min_size=2, max_size=30).filter(lambda scores: len(set(scores)) > 1), PERCENTILES, PERCENTILES
)
@settings(max_examples=100)
def test_a_higher_percentile_never_makes_more_positives(scores, one, other):
    low, high = sorted((one, other))
    positives = [estimate_threshold(scores, percentile=p).num_positive for p in (low, high)]
    assert positives[0] >= positives[1]


@given(SCORES, st.integers(2, 12), PERCENTILES)
@settings(max_examples=100)
def test_a_running_percentile_is_that_of_the_last_scores(scores, window, percentile):
    running = RunningPercentile(percentile, window)
    assert math.isnan(running.value)
    for number, score in enumerate(scores):
        value = running.add(score)
        last = scores[max(0, number + 1 - window) : number + 1]
        if len(set(last)) == 1:
            assert value == last[0]
            continue
        wanted = estimate_threshold(last, percentile=percentile).value
        assert value == pytest.approx(wanted, rel=1e-9, abs=1e-9 * np.ptp(last))
