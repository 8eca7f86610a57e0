"""The bootstrap of τ held against real resampling, and counts by group against plain loops."""

import itertools
import math
import statistics
from collections import defaultdict

import numpy as np
import pytest
from scipy import stats

from tgol_trainer.thresholds import (
    ThresholdError,
    ThresholdInterval,
    bootstrap_groups,
    bootstrap_interval,
    bootstrap_thresholds,
    count_groups,
    estimate_threshold,
    group_draw,
    group_ids,
    oracle_draw,
)

NORMAL = np.random.default_rng(1).normal(size=31)
STARS = np.random.default_rng(2).integers(1, 6, 40).astype(float)
WINS = np.array([0.0] * 22 + [1.0] * 6 + [2.0] * 2)
LONE_MINIMUM = np.array([0.0, *[1.0] * 6, 5.0])
SCORES = {"continuous": NORMAL, "stars": STARS, "win counts, most are 0": WINS, "a lone minimum": LONE_MINIMUM}
# More than 100 scores are not resampled: two order statistics are drawn.
MANY = {
    "continuous": np.random.default_rng(1).normal(size=150),
    "stars": np.random.default_rng(2).integers(1, 6, 120).astype(float),
    "win counts, half are 0": np.array([0.0] * 60 + [1.0] * 40 + [2.0] * 20),
}
CASES = [(scores, percentile) for scores in SCORES.values() for percentile in (0, 25, 50, 90)]
CASES += [(scores, percentile) for scores in MANY.values() for percentile in (10, 50, 90, 99.9)]


def resampled(scores, percentile, count=4000):
    """τ of real resamples; those that are all equal have none."""
    rng, found = np.random.default_rng(3), []
    for _ in range(count):
        try:
            found.append(estimate_threshold(rng.choice(scores, scores.size), percentile=percentile).value)
        except ThresholdError:
            continue
    return np.array(found)


@pytest.mark.parametrize(("scores", "percentile"), CASES)
def test_replicates_are_distributed_as_the_thresholds_of_real_resamples(scores, percentile):
    drawn = bootstrap_thresholds(np.sort(scores), percentile=percentile, num_replicates=20_000)
    drawn = drawn[~np.isnan(drawn)]
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


# ---- Groups ----

POOLED, WITHIN, BETWEEN, BETA = 0.25, 4.0, 1.5, 0.7
DRAWS = {
    "median": group_draw(POOLED, WITHIN, BETWEEN),
    "mean": group_draw(POOLED, WITHIN, BETWEEN, statistic="mean"),
    "oracle": oracle_draw(POOLED, BETA),
}


def pooled_towards(own, variance, count):
    """The posterior mean of a normal model: precisions 1/ω² about τ, and count/variance about the group's own."""
    return (POOLED / BETWEEN + own * count / variance) / (1 / BETWEEN + count / variance)


def group_threshold(name, scores):
    if len(set(scores)) == 1:
        return POOLED
    if name == "oracle":
        powers = [math.exp(score / BETA) for score in scores]
        mean = statistics.fmean(powers)
        return BETA * (math.log(mean) + statistics.variance(powers) / (2 * len(powers) * mean**2))
    if name == "mean":
        return pooled_towards(statistics.fmean(scores), WITHIN, len(scores))
    own = statistics.median(scores)
    if own == min(scores):
        own = (own + sorted(set(scores))[1]) / 2
    return pooled_towards(own, math.pi / 2 * WITHIN, len(scores))  # π/2: the median of normal scores


@pytest.mark.parametrize("scores", [(-1.0, 2.0), (0.5, 1.0, 3.0), (1.0, 1.0, 2.0, 4.0)], ids=["2", "3", "4, a tie"])
@pytest.mark.parametrize("name", DRAWS)
def test_the_threshold_of_a_group_is_drawn_as_often_as_among_all_its_resamples(name, scores):
    """All n^n resamples are equally likely; those of equal scores, half of them for n = 2, say nothing of it."""
    resamples = list(itertools.product(scores, repeat=len(scores)))
    exact = defaultdict(float)
    for resample in resamples:
        exact[round(group_threshold(name, resample), 9)] += 1 / len(resamples)
    rng = np.random.default_rng(0)
    drawn = np.concatenate([DRAWS[name](np.array(scores), rng) for _ in range(25)]).round(9)
    found = dict(zip(*np.unique(drawn + 0.0, return_counts=True), strict=True))
    assert set(found) <= set(exact)
    for value, share in exact.items():
        error = math.sqrt(share * (1 - share) / drawn.size)
        assert found.get(value, 0) / drawn.size == pytest.approx(share, abs=4.5 * error)


@pytest.mark.parametrize("name", DRAWS)
def test_a_group_of_equal_scores_and_groups_that_do_not_differ_take_the_pooled_threshold(name):
    rng = np.random.default_rng(0)
    assert (DRAWS[name](np.array([2.0, 2.0, 2.0]), rng) == POOLED).all()
    assert (group_draw(POOLED, WITHIN, 0.0)(np.array([1.0, 2.0, 3.0]), rng) == POOLED).all()


@pytest.mark.parametrize("name", ["mean", "oracle"])
def test_a_large_group_is_drawn_with_the_mean_and_the_error_that_the_delta_method_gives(name):
    scores = np.sort(np.random.default_rng(4).normal(size=3000))
    drawn = np.concatenate([DRAWS[name](scores, np.random.default_rng(seed)) for seed in range(10)])
    centre, error = group_threshold(name, scores.tolist()), 0.0
    if name == "mean":
        error = statistics.pstdev(scores) / math.sqrt(3000) * BETWEEN / (BETWEEN + WITHIN / 3000)
    else:
        powers = np.exp(scores / BETA)
        error = BETA * powers.std() / powers.mean() / math.sqrt(3000)
    assert drawn.mean() == pytest.approx(centre, abs=5 * error / math.sqrt(drawn.size))
    assert drawn.std() == pytest.approx(error, rel=0.05)


def test_intervals_of_groups_end_at_replicates_and_count_the_rows_between():
    """Each group's replicates are its own scores here: of 41, the 2.5 % and 97.5 % ends are the 2nd and the 40th."""
    rng = np.random.default_rng(5)
    keys = np.repeat([70, 3, 11], 41)
    scores = rng.normal(size=keys.size) + keys
    order = rng.permutation(keys.size)
    found = bootstrap_groups(scores[order], keys[order], lambda values, rng: values)
    assert found.keys.tolist() == [3, 11, 70]
    for key, low, high in zip(found.keys, found.low, found.high, strict=True):
        own = sorted(scores[keys == key])
        assert (low, high) == (own[1], own[39])
    assert found.flip_share(scores, keys) == 38 / 41  # 2nd to 39th; the upper end is positive for both
    others = np.array([3.0, 70.0]), np.array([4, 71])
    assert found.flip_share(*others) == 0  # groups without an interval
    part = bootstrap_groups(scores, keys, lambda values, rng: values, max_groups=2)
    assert len(set(part.keys) & {3, 11, 70}) == 2 == len(part.low)
    assert part.low.tolist() == [sorted(scores[keys == key])[1] for key in part.keys]


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
