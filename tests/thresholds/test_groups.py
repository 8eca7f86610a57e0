"""Thresholds of groups, oracle baselines and the running percentile, against loops over groups and other libraries."""

import math

import numpy as np
import pytest
from scipy import stats
from scipy.special import logsumexp
from scipy.stats import sem

from tgol_trainer.thresholds import (
    RunningPercentile,
    ThresholdError,
    estimate_group_thresholds,
    estimate_oracle_thresholds,
    estimate_threshold,
    group_ids,
    variance_components,
)


def grouped(num_groups=40, seed=0, between=1.0, within=0.5, sizes=(2, 12)):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(num_groups), rng.integers(*sizes, size=num_groups))
    scores = rng.normal(size=num_groups)[groups] * between + within * rng.normal(size=groups.size)
    order = rng.permutation(groups.size)
    return scores[order], groups[order]


def test_groups_are_numbered_in_order_of_first_appearance():
    numbers, names = group_ids(["b", "a", "b", "c", "a"])
    assert numbers.tolist() == [0, 1, 0, 2, 1]
    assert names.tolist() == ["b", "a", "c"]
    assert group_ids(["a", "a\0", "a" * 1_000_000] * 1000)[0].tolist() == [0, 1, 2] * 1000


def test_variance_components_of_groups_of_one_size_are_those_of_a_one_way_analysis_of_variance():
    """With n scores in each of G groups, scipy's F is MS_between/MS_within, so ω² = σ²·(F - 1)/n."""
    rng = np.random.default_rng(1)
    table = rng.normal(size=(30, 1)) + 0.7 * rng.normal(size=(30, 6))
    within, between = variance_components(table.ravel(), np.repeat(np.arange(30), 6))
    f = stats.f_oneway(*table).statistic
    assert within == pytest.approx(table.var(axis=1, ddof=1).mean())
    assert between == pytest.approx(within * (f - 1) / 6)


def test_variance_components_of_unequal_groups_are_right_on_average():
    """ω = 1, σ = 0.5: over 300 data sets the mean estimates lie within 4 standard errors of 0.25 and 1."""
    found = np.array([variance_components(*grouped(seed=seed)) for seed in range(300)])
    error = found.std(axis=0) / math.sqrt(300)
    assert np.all(np.abs(found.mean(axis=0) - [0.25, 1.0]) < 4 * error)


@pytest.mark.parametrize("statistic", ["percentile", "mean"])
def test_each_group_is_pooled_by_its_reliability(statistic):
    """The rule, group by group: v is π/2 for the median of normal scores and 1 for the mean."""
    scores, groups = grouped()
    found = estimate_group_thresholds(scores, groups, statistic=statistic)
    within, between = variance_components(scores, groups)
    pooled = np.median(scores) if statistic == "percentile" else scores.mean()
    assert found.pooled == pytest.approx(pooled)
    for group in range(40):
        own = scores[groups == group]
        statistic_value = np.median(own) if statistic == "percentile" else own.mean()
        if statistic == "percentile" and statistic_value == own.min():
            statistic_value = np.sort(own)[:2].mean()
        sampling = (math.pi / 2 if statistic == "percentile" else 1) * within / own.size
        weight = between / (between + sampling)
        assert found.reliability[group] == pytest.approx(weight)
        assert found.values[group] == pytest.approx(weight * statistic_value + (1 - weight) * pooled)


def test_pooling_is_closer_to_the_true_medians_than_either_extreme():
    """Groups of 2 to 5 noisy scores, true medians known: squared error of pooled, own and global thresholds."""
    rng = np.random.default_rng(0)
    errors = np.zeros(3)
    for _ in range(50):
        truth = 0.5 * rng.normal(size=60)
        groups = np.repeat(np.arange(60), rng.integers(2, 6, size=60))
        scores = truth[groups] + rng.normal(size=groups.size)
        found = estimate_group_thresholds(scores, groups)
        own = np.array([np.median(scores[groups == group]) for group in range(60)])
        errors += [((v - truth) ** 2).mean() for v in (found.values, own, np.full(60, found.pooled))]
    assert errors[0] < 0.9 * errors[1:].min()


@pytest.mark.parametrize("percentile", [25.0, 80.0])
def test_other_percentiles_use_the_sampling_variance_of_that_percentile(percentile):
    """Large groups of normal scores: the spread of the sample percentile is √(v·σ²/n) with the v of the docstring."""
    rng = np.random.default_rng(0)
    share, n = percentile / 100, 400
    spread = np.percentile(rng.normal(size=(4000, n)), percentile, axis=1).std()
    scores, groups = grouped(num_groups=30, sizes=(n, n + 1))
    found = estimate_group_thresholds(scores, groups, percentile=percentile)
    implied = (found.between_variance / found.reliability[0] - found.between_variance) / found.within_variance * n
    assert math.sqrt(implied / n) == pytest.approx(spread, rel=0.05)
    assert share * (1 - share) < implied


def test_one_image_a_prompt_gives_every_row_the_global_threshold():
    scores = np.random.default_rng(0).normal(size=100)
    found = estimate_group_thresholds(scores, np.arange(100))
    assert set(found.values) == {estimate_threshold(scores).value}
    assert math.isnan(found.within_variance)


def test_equal_scores_and_single_scores_take_the_pooled_threshold_and_one_sided_groups_are_counted():
    scores = np.array([0.0, 1.0, 2.0, 3.0, 9.0, 9.0, 9.5, 5.0, 5.2, 4.8])
    groups = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    lonely = np.append(scores, [7.0, 7.0, 1.0]), np.append(groups, [3, 3, 4])
    found = estimate_group_thresholds(*lonely)
    assert found.values[3] == found.values[4] == found.pooled
    labels = [lonely[0][lonely[1] == group] >= found.values[group] for group in range(5)]
    assert found.num_one_sided == sum(label.all() or not label.any() for label in labels)


def test_a_group_whose_percentile_is_its_minimum_still_gets_both_labels():
    """0 0 0 1 beside 0 0 0 9: medians are the minima, so the midpoints 0.5 and 4.5 stand in for them."""
    scores, groups = np.array([0, 0, 0, 1, 20, 20, 20, 29.0]), np.repeat([0, 1], 4)
    found = estimate_group_thresholds(scores, groups)
    weight = found.reliability[0]
    assert found.values[0] == pytest.approx(weight * 0.5 + (1 - weight) * found.pooled)
    assert found.values[1] == pytest.approx(weight * 24.5 + (1 - weight) * found.pooled)


def correction(exponents):
    """Half the squared standard error of a mean of exponentials, relative to it."""
    powers = np.exp(exponents - exponents.max())
    return 0.0 if powers.size < 2 else (sem(powers) / powers.mean()) ** 2 / 2


def test_the_oracle_of_four_samples_is_less_biased_than_the_log_mean_exp():
    """
    Normal scores of variance 1 at β = 1.5: τ* = 1/(2β) = 1/3. The plain estimate from 4 samples is too low by about
    β·(exp(1/β²) - 1)/(2·4) = 0.105, to first order.
    """
    scores, groups = np.random.default_rng(0).normal(size=80_000), np.repeat(np.arange(20_000), 4)
    found = estimate_oracle_thresholds(scores, groups, beta=1.5).values.mean()
    plain = 1.5 * np.log(np.exp(scores / 1.5).reshape(-1, 4).mean(1)).mean()
    assert plain < 1 / 3 - 0.07
    assert found == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize("beta", [None, 0.001, 0.3, 1e6])
def test_the_oracle_leaves_each_sample_out_of_its_own_baseline(beta):
    scores, groups = grouped()
    found = estimate_oracle_thresholds(scores, groups, beta=beta)
    used = found.beta if beta is None else beta
    if beta is None:
        residuals = scores - np.array([scores[groups == g].mean() for g in groups])
        assert used == pytest.approx(math.sqrt((residuals**2).sum() / (scores.size - 40)))
    for row, group in enumerate(groups):
        mates = np.delete(scores, row)[np.delete(groups, row) == group]
        expected = used * (logsumexp(mates / used) - math.log(mates.size) + correction(mates / used))
        assert found.leave_one_out[row] == pytest.approx(expected, rel=1e-9, abs=1e-9 * max(1, used))
    for group in range(40):
        own = scores[groups == group]
        expected = used * (logsumexp(own / used) - math.log(own.size) + correction(own / used))
        assert found.values[group] == pytest.approx(expected, abs=1e-3)


def test_the_oracle_falls_back_to_the_pooled_threshold_for_single_and_equal_samples():
    scores, groups = np.array([1.0, 2.0, 3.0, 4.0, 4.0]), np.array([0, 0, 1, 2, 2])
    found = estimate_oracle_thresholds(scores, groups, beta=1.0)
    assert found.leave_one_out[:2].tolist() == pytest.approx([2.0, 1.0])
    assert found.leave_one_out[2:].tolist() == [3.0, 3.0, 3.0]
    assert found.values[1:].tolist() == [3.0, 3.0]


def test_an_oracle_without_two_samples_of_a_prompt_says_so():
    with pytest.raises(ThresholdError, match="several samples per prompt"):
        estimate_oracle_thresholds([1.0, 2.0, 3.0], np.arange(3))


@pytest.mark.parametrize("percentile", [0.0, 30.0, 50.0, 100.0])
def test_the_running_percentile_is_that_of_the_last_window(percentile):
    rng = np.random.default_rng(0)
    stream = np.concatenate([rng.normal(size=60), rng.integers(0, 3, size=60)])
    running = RunningPercentile(percentile, window=16, initial=stream[:5])
    for end in range(6, stream.size):
        window = stream[max(0, end - 16) : end]
        expected = estimate_threshold(window, percentile=percentile).value if np.ptp(window) else window[0]
        assert running.add(stream[end - 1]) == pytest.approx(expected)


def test_a_million_rows_of_200_thousand_prompts_take_seconds():
    scores, groups = grouped(num_groups=200_000, sizes=(1, 10))
    found = estimate_group_thresholds(scores, groups)
    assert found.values.shape == (200_000,)
    assert estimate_oracle_thresholds(scores, groups).leave_one_out.shape == scores.shape
