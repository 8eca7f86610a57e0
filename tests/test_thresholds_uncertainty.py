"""The bootstrap of τ held against real resampling, and counts by group against plain loops."""

import statistics
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats

from tgol_trainer.thresholds import (
    ThresholdError,
    ThresholdInterval,
    bootstrap_interval,
    bootstrap_thresholds,
    count_groups,
    estimate_threshold,
    group_ids,
)

NORMAL = np.random.default_rng(1).normal(size=31)
STARS = np.random.default_rng(2).integers(1, 6, 40).astype(float)
WINS = np.array([0.0] * 22 + [1.0] * 6 + [2.0] * 2)
LONE_MINIMUM = np.array([0.0, *[1.0] * 6, 5.0])
SCORES = {"continuous": NORMAL, "stars": STARS, "win counts, most are 0": WINS, "a lone minimum": LONE_MINIMUM}


def resampled(scores, percentile, count=4000):
    """τ of real resamples; those that are all equal have none."""
    rng, found = np.random.default_rng(3), []
    for _ in range(count):
        try:
            found.append(estimate_threshold(rng.choice(scores, scores.size), percentile=percentile).value)
        except ThresholdError:
            continue
    return np.array(found)


@pytest.mark.parametrize("percentile", [0, 25, 50, 90])
@pytest.mark.parametrize("name", SCORES)
def test_replicates_are_distributed_as_the_thresholds_of_real_resamples(name, percentile):
    scores = SCORES[name]
    drawn = bootstrap_thresholds(np.sort(scores), percentile=percentile, num_replicates=20_000)
    real = resampled(scores, percentile, 1500)
    # τ is a sum of products of floats in either computation; equal values must count as equal.
    assert stats.ks_2samp(drawn.round(9), real.round(9)).pvalue > 1e-3
    assert 1 - drawn.size / 20_000 == pytest.approx(1 - real.size / 1500, abs=0.03)  # resamples all equal


def test_a_million_scores_get_the_interval_that_the_binomial_distribution_gives():
    """τ lies at or below x_(j) where at least half of the resample does: P(Bin(n, j/n) >= (n + 1)/2)."""
    n = 1_000_001
    interval = bootstrap_interval(np.random.default_rng(0).permutation(n).astype(float))
    j = np.arange(n // 2 - 3000, n // 2 + 3001)
    below = stats.binom.sf((n + 1) // 2 - 1, n, j / n)
    low, high = (j[np.searchsorted(below, share)] - 1 for share in (0.025, 0.975))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=40)  # 20,000 draws: standard error 12


def test_flips_are_the_scores_whose_label_differs_between_the_ends():
    scores = np.array([1.0, 2.0, 2.0, 3.0, 4.0])
    assert ThresholdInterval(2.0, 3.0, 0.95).num_flips(scores) == sum((s >= 2) != (s >= 3) for s in scores) == 2
    assert ThresholdInterval(2.0, 2.0, 0.95).num_flips(scores) == 0


def test_scores_without_a_threshold_have_no_interval():
    with pytest.raises(ThresholdError, match="All 3 scores"):
        bootstrap_interval([1, 1, 1])


@pytest.mark.parametrize("own", [False, True], ids=["one threshold", "a threshold a group"])
def test_counts_means_and_sides_of_groups_are_those_of_a_loop(own):
    rng = np.random.default_rng(0)
    groups, _ = group_ids(rng.integers(0, 80, 400))
    scores = rng.normal(size=groups.size)
    threshold = groups / 80 if own else 0.3
    rows = defaultdict(list)
    for index, group in enumerate(groups.tolist()):
        rows[group].append(index)
    counts = count_groups(groups, scores, threshold)
    assert len(counts) == len(rows)
    for group, members in rows.items():
        tau = group / 80 if own else 0.3
        labels = [scores[index] >= tau for index in members]
        assert (counts.num_rows[group], counts.num_positive[group]) == (len(members), sum(labels))
        assert counts.mean[group] == pytest.approx(statistics.fmean(scores[members]))
        assert counts.one_sided[group] == (len(members) > 1 and len(set(labels)) == 1)
        assert counts.threshold[group] == pytest.approx(tau)


def test_one_sided_groups_of_random_labels_are_as_many_as_chance_makes():
    rng, groups = np.random.default_rng(0), np.repeat(np.arange(20_000), 3)
    counts = count_groups(groups, rng.normal(size=groups.size), 0.0)
    assert counts.one_sided_by_chance() == pytest.approx(2 / 8, abs=1e-3)
    assert counts.one_sided.mean() == pytest.approx(2 / 8, abs=0.01)
