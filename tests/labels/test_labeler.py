"""Labels of rows: normalisation before τ, exact signs, weights, one row of a stream at a time."""

import dataclasses

import numpy as np
import pytest

from tgol_trainer.labels import Labeler, LabelSettings, fit_labels
from tgol_trainer.thresholds import ScoreNormalization, ThresholdError, Weighting, apply_threshold


def labeler(threshold=0.0, **options):
    low_and_high = np.array([threshold - 1, threshold + 1])
    return Labeler(apply_threshold(low_and_high, threshold), **options)


def test_scores_are_normalised_before_the_threshold_and_weights_are_those_of_the_paper():
    """(70 - 50) / 10 = 2, 2 - 0.5 = 1.5, 1 + 5·1.5 = 8.5; (45 - 50) / 10 = -0.5, -0.5 - 0.5 = -1, 1 + 5·1 = 6."""
    labels = labeler(0.5, normalization=ScoreNormalization("zscore", 50.0, 10.0))([70, 45])
    assert labels.score.tolist() == [2.0, -0.5]
    assert labels.margin.tolist() == [1.5, -1.0]
    assert labels.weight.tolist() == [8.5, 6.0]


def test_the_sign_of_the_margin_is_that_of_the_float64_comparison():
    threshold = 0.1 + 0.2  # 0.30000000000000004: in float32 it equals 0.3
    assert np.float32(threshold) == np.float32(0.3)
    margins = labeler(threshold)([0.3, threshold, np.nextafter(threshold, 1)]).margin
    assert np.sign(margins).tolist() == [-1.0, 0.0, 1.0]


def test_a_margin_below_float32_keeps_its_sign_and_a_margin_beyond_it_stays_finite():
    scores = [1e-60, -1e-60, 1e-40, -1e-40, 0.0, 1e300, -1e300]
    margins = labeler()(scores).margin
    assert np.sign(margins).tolist() == np.sign(scores).tolist()
    assert np.isfinite(margins).all() and margins.dtype == np.float32
    assert np.abs(margins[:4]).tolist() == [np.finfo(np.float32).tiny] * 4  # normal: no device flushes it to 0


def test_rows_of_their_own_threshold_meet_it():
    labels = labeler(by_group={"a": 1.0})([0.5, 0.5], labeler(by_group={"a": 1.0}).row_thresholds(["a", "unseen"]))
    assert labels.margin.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("window", [None, 3])
def test_a_stream_is_labelled_row_by_row_as_the_whole_is_or_by_the_last_scores(window):
    """Window 3 from the source's last three, (2, 3, 4): adding 9, then 0, leaves (3, 4, 9) and (4, 9, 0)."""
    made = labeler(2.0, source=np.arange(5.0), window=window)
    made = dataclasses.replace(made, threshold=dataclasses.replace(made.threshold, percentile=50.0))
    label = made.follower()
    found = [label(score)["margin"] for score in (9.0, 0.0)]
    assert found == ([7.0, -2.0] if window is None else [9.0 - 4.0, 0.0 - 4.0])


def test_fitted_labels_are_what_the_labeler_makes_of_the_rows_that_are_kept():
    scores = np.random.default_rng(0).normal(size=400)
    settings = LabelSettings(normalization="zscore", dead_zone=0.3, weighting=Weighting(undesirable=2.0))
    labeler, labels, kept = fit_labels(scores, dataclasses.replace(settings, unit_mean_weight=True))
    unit = (scores - scores.mean()) / scores.std()
    assert kept.tolist() == (abs(unit - np.median(unit)) >= 0.3).tolist()
    margins = (unit - np.median(unit))[kept]
    weights = (1 + 5 * abs(margins)) * np.where(margins >= 0, 1, 2)
    np.testing.assert_allclose(labels.margin, margins, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(labels.weight, weights / weights.mean(), rtol=1e-5)
    again = labeler(scores[kept])
    np.testing.assert_array_equal(again.margin, labels.margin)
    np.testing.assert_allclose(again.weight, labels.weight, rtol=1e-6)
    assert labeler.threshold.num_positive == (margins >= 0).sum()


A = np.random.default_rng(3).normal(size=40)


@pytest.mark.parametrize("normalization", ["none", "zscore"])
@pytest.mark.parametrize(
    ("scores", "weights"),
    [
        (np.stack([A, 1 - 3 * A], axis=1), None),
        (np.stack([A, -A], axis=1), None),
        (np.stack([A, 0.1 + 7 * A], axis=1), (2.0, -2.0)),
        (np.stack([1e6 + A, 5 - (1e6 + A) / 3], axis=1), None),
        (np.stack([A, 1 - 3 * A], axis=1).astype(np.float32).astype(np.float64), None),
    ],
    ids=["b = 1 - 3a", "b = -a", "weights", "an offset", "float32"],
)
def test_score_columns_that_cancel_are_called_constant_and_not_divided_by_rounding(scores, weights, normalization):
    settings = LabelSettings(columns=("a", "b"), column_weights=weights, normalization=normalization)
    with pytest.raises(ThresholdError, match="The combination of a, b is constant"):
        fit_labels(scores, settings)


def test_columns_that_nearly_cancel_are_still_divided():
    scores = np.stack([A, -A + 1e-6 * np.random.default_rng(4).normal(size=40)], axis=1)
    assert fit_labels(scores, LabelSettings(columns=("a", "b"))).labeler.threshold.num_positive == 20


@pytest.mark.parametrize("bad", [1e39, -1e300])
def test_a_score_whose_weight_float32_cannot_hold_is_refused_before_training(bad):
    scores = np.append(A, bad)
    with pytest.raises(ThresholdError, match=r"Column 'stars': 1 of 41 scores.*such as .*e\+.*robust") as refused:
        fit_labels(scores, LabelSettings(), name="stars")
    assert f"{bad:g}" in str(refused.value)
    plain = fit_labels(scores, LabelSettings(weighting=Weighting(form="none")))
    assert np.isfinite(plain.labels.weight).all()
    assert np.isfinite(fit_labels(scores, LabelSettings(normalization="zscore")).labels.weight).all()
