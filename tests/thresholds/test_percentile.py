"""Thresholds, ties and normalisation, held against counting by hand and against the statistics module."""

import statistics

import numpy as np
import pytest

from tgol_trainer.thresholds import (
    ThresholdError,
    apply_threshold,
    estimate_threshold,
    fit_normalization,
    summarize_weights,
)


def test_the_default_is_the_median():
    scores = [3.0, 1.0, 4.0, 1.5, 9.0, 2.0]
    threshold = estimate_threshold(scores)
    assert threshold.value == statistics.median(scores) == 2.5
    assert (threshold.num_positive, threshold.num_negative, threshold.num_ties) == (3, 3, 0)
    assert threshold.moved_from is None


def test_percentiles_interpolate_linearly_between_order_statistics():
    """Of 0, 10, 20, 30, 40 the 30th percentile lies at position 1.2: 10 + 0.2·10."""
    assert estimate_threshold([40, 10, 0, 30, 20], percentile=30).value == pytest.approx(12.0)


def test_an_even_number_of_float32_like_scores_keeps_float64_precision():
    scores = np.array([0.1, 0.2, 0.3, 0.4])
    assert estimate_threshold(scores).value == (0.2 + 0.3) / 2


def test_a_score_equal_to_the_threshold_counts_as_positive():
    threshold = estimate_threshold([1, 2, 2, 2, 3])
    assert threshold.value == 2
    assert (threshold.num_positive, threshold.num_negative, threshold.num_ties) == (4, 1, 3)


def test_ratings_whose_median_is_the_minimum_move_the_threshold_to_the_next_midpoint():
    """Six ratings of 1, then 2 and 5: the median is 1 and would label all positive; halfway to 2 is 1.5."""
    threshold = estimate_threshold([1, 1, 1, 1, 1, 1, 2, 5])
    assert (threshold.value, threshold.moved_from) == (1.5, 1.0)
    assert (threshold.num_positive, threshold.num_negative, threshold.num_ties) == (2, 6, 0)


def test_the_share_of_positives_of_win_counts_full_of_zeros_is_that_of_the_winners():
    wins = [0] * 690 + [1] * 200 + [2] * 37
    assert estimate_threshold(wins).num_positive == 237


def test_both_sides_are_never_empty_whatever_the_percentile():
    rng = np.random.default_rng(0)
    for percentile in (0, 1, 50, 99, 100):
        for levels in (2, 3, 1000):
            scores = rng.integers(0, levels, 50)
            scores[:2] = 0, levels - 1
            threshold = estimate_threshold(scores, percentile=percentile)
            assert 0 < threshold.num_positive < 50


def test_neighbouring_floats_are_still_divided():
    low = 1.0
    threshold = estimate_threshold([low, low, np.nextafter(low, 2), 2.0])
    assert 0 < threshold.num_positive < 4


NOISE = np.random.default_rng(0).normal(size=40)


@pytest.mark.parametrize("call", [estimate_threshold, lambda s: fit_normalization(s, "robust")])
@pytest.mark.parametrize(
    "scores",
    [
        1e9 + 1e-7 * NOISE,
        0.1 * 3 + 1e-16 * NOISE,
        np.float32(0.3) + np.float32(3e-8) * (NOISE > 0),
        1e-300 * (1 + 1e-16 * NOISE),
    ],
    ids=["a large offset", "float64", "the last bit of float32", "tiny"],
)
def test_scores_that_differ_by_rounding_alone_are_equal(scores, call):
    assert len(set(scores.tolist())) > 1 or scores[0] < 1e-200
    with pytest.raises(ThresholdError, match="All 40 scores equal"):
        call(np.asarray(scores, dtype=np.float64))


@pytest.mark.parametrize("scores", [1e9 + NOISE, 0.3 + 1e-6 * NOISE, np.float32(0.3) + 1e-4 * NOISE, 1e-300 * NOISE])
def test_small_differences_that_are_no_rounding_divide_the_scores(scores):
    assert estimate_threshold(scores).num_positive == 20


def test_a_deviation_that_float64_cannot_square_is_found():
    """Of n scores 0 and one s the deviation is s·√(n - 1)/n: for s = 1e300 and n = 4, 1e300·√3/4."""
    found = fit_normalization([0.0, 0.0, 0.0, 1e300], "zscore")
    assert found.scale == pytest.approx(1e300 * 3**0.5 / 4)


@pytest.mark.parametrize(
    "call", [estimate_threshold, lambda s: apply_threshold(s, 0.0), lambda s: fit_normalization(s, "zscore")]
)
def test_scores_that_cannot_be_divided_are_named(call):
    with pytest.raises(ThresholdError, match="All 3 scores equal 2"):
        call([2.0, 2.0, 2.0])
    with pytest.raises(ThresholdError, match="no scores"):
        call([])
    with pytest.raises(ThresholdError, match=r"1 of 3 scores are NaN or infinite \(row 1: nan\)"):
        call([1.0, float("nan"), 2.0])


def test_a_percentile_outside_0_to_100_is_refused():
    with pytest.raises(ValueError, match="between 0 and 100"):
        estimate_threshold([1, 2], percentile=101)


def test_a_threshold_from_elsewhere_labels_these_scores_and_keeps_its_source():
    threshold = apply_threshold([1, 2, 3, 4], 2.5, source="proxy", percentile=50.0)
    assert (threshold.num_positive, threshold.num_negative, threshold.source) == (2, 2, "proxy")


@pytest.mark.parametrize(("value", "side"), [(0.5, "negative"), (9.0, "positive")])
def test_a_fixed_threshold_outside_the_scores_names_the_empty_side(value, side):
    with pytest.raises(ThresholdError, match=f"leaves the {side} side empty.*run from 1 to 4"):
        apply_threshold([1, 2, 3, 4], value)


def test_z_scores_have_mean_zero_and_deviation_one():
    scores = np.random.default_rng(0).gamma(2, 3, 1000)
    z = fit_normalization(scores, "zscore")(scores)
    assert statistics.fmean(z) == pytest.approx(0, abs=1e-12)
    assert statistics.pstdev(z) == pytest.approx(1)


def test_robust_scores_ignore_an_outlier_and_agree_with_z_scores_on_normal_data():
    scores = np.random.default_rng(0).normal(10, 2, 200_000)
    robust = fit_normalization(scores, "robust")
    assert (robust.center, robust.scale) == pytest.approx((10, 2), rel=0.01)
    spoiled = fit_normalization(np.append(scores, 1e9), "robust")
    assert spoiled.scale == pytest.approx(robust.scale, rel=1e-3)


def test_robust_falls_back_on_the_standard_deviation_where_the_quartiles_coincide():
    scores = [3.0] * 98 + [0.0, 6.0]
    assert fit_normalization(scores, "robust").scale == pytest.approx(statistics.pstdev(scores))


def test_weights_are_summarised_with_the_share_of_the_largest_hundredth():
    """200 scores: 198 at distance 0 and two at distance 10 from τ with c = 5: weights 1 and 51."""
    summary = summarize_weights(1 + 5 * np.abs([0.0] * 198 + [10.0, -10.0]))
    assert summary.mean == pytest.approx((198 + 102) / 200)
    assert summary.max == 51
    assert summary.top_1_percent_share == pytest.approx(102 / 300)
