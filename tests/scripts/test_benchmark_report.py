"""The numbers of the alignment benchmark's report, by hand."""

import importlib.util
import math

import pytest

from tests import ROOT

FILE = ROOT / "scripts" / "benchmarks" / "alignment_report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("alignment_report", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(gains, method="tgo", seed=2, regime="dense", strength=0.1, updates=128):
    """A line with {drift: (gain, colour)}."""
    points = [
        {"drift": drift, "nats": 3.0, "gains": {name: {"gain": value, "held_out": value / 2} for name, value in pair}}
        for drift, (gain, colour) in gains.items()
        for pair in [(("dark", gain), ("colour", colour))]
    ]
    settings = {"method": method, "strength": strength, "score": "dark", "seed": seed, "regime": regime}
    return {**settings, "world": "shapes", "updates": updates, "points": points}


def test_an_interval_over_two_seeds_is_that_of_the_t_distribution(report):
    """Student's t with one degree of freedom is Cauchy's: its 97.5 % point is tan(0.475·π); half the range is s/√2."""
    low, high = report.interval([1.0, 3.0])
    half = math.tan(0.475 * math.pi)
    assert (low, high) == pytest.approx((2 - half, 2 + half))


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ((0.01, 0.2), "better"),
        ((-0.04, 0.2), "no worse"),
        ((-0.04, -0.01), "no worse"),
        ((-0.06, 0.2), ""),
        ((-0.3, -0.06), "worse"),
        ((-0.3, -0.01), "lower"),
    ],
)
def test_a_verdict_needs_the_whole_interval(report, bounds, expected):
    assert report.verdict(*bounds) == expected


def test_differences_are_taken_seed_by_seed(report, tmp_path):
    """Seeds differ by 10 in both methods alike, which a paired interval must not see. Seed 0 is the tuning seed."""
    lines = [
        run({5.0: (gain + 10 * seed, -gain)}, method, seed)
        for method, gain in (("tgo", 5), ("dpo", 3))
        for seed in (0, 2, 3, 4)
    ]
    rows = report.write_report(lines, tmp_path).splitlines()
    assert "| dpo (0.1) | 3 | 2.00 ± 0.00 better | -2.00 ± 0.00 worse |" in rows
    assert "| dark | tgo | 0.1: 5.00 (1) |" in rows
    row = next(row for row in rows if row.startswith("| tgo (0.1) | 3 | 35.00 ± "))
    assert row.split(" | ")[3].startswith("17.50 ± ") and row.endswith("| 3.0 |")
    assert (tmp_path / "benchmarks_alignment.md").read_text().splitlines() == rows


def test_a_run_that_does_not_gain_is_in_no_table_of_equal_gain(report):
    lines = [
        run({5.0: (gain, 0)}, method, seed) for seed in (2, 3) for method, gain in (("tgo", 2), ("dpo", seed - 3))
    ]
    table = report.difference_table(lines, "dark", "tgo (0.1)", 5.0, equal_gain=False).splitlines()
    assert table[2].startswith("| dpo (0.1) | 2 | 2.50 ± ")  # seed 2: 2 - (-1), seed 3: 2 - 0
    assert len(report.difference_table(lines, "dark", "tgo (0.1)", 5.0, equal_gain=True).splitlines()) == 2


def test_longer_runs_stand_in_tables_of_their_own(report, tmp_path):
    lines = [
        run({5.0: (gain, 0)}, seed=seed, updates=updates) for gain, updates in ((1, 128), (3, 512)) for seed in (0, 2)
    ]
    rows = report.write_report(lines, tmp_path).splitlines()
    assert [row for row in rows if row.startswith("| dark |")] == [
        "| dark | tgo | 0.1: 1.00 (1) |",
        "| dark | tgo | 0.1: 3.00 (1) |",
    ]
    assert [row[:23] for row in rows if row.startswith("| tgo (0.1) ")] == [
        "| tgo (0.1) | 1 | 1.00 ",
        "| tgo (0.1) | 1 | 3.00 ",
    ]


def test_at_equal_gain_the_run_with_more_is_scaled_back_between_its_measured_points(report):
    """
    At a drift of 5 ours gains 4 and the rival 3. Ours passes 3 halfway from (2, 0) to (4, -1), where colour is -0.5;
    the rival's colour there is measured, -2.
    """
    mine = run({2.0: (2, 0), 5.0: (4, -1)})
    theirs = run({2.0: (1, -1), 5.0: (3, -2)}, "dpo")
    assert report.at_gain(mine, 1, "colour") == 0  # between no change at all and the first point
    assert report.difference(mine, theirs, "colour", 5.0, True) == pytest.approx(1.5)
    assert report.difference(mine, theirs, "colour", 5.0, False) == pytest.approx(1.0)


def test_a_drift_that_was_not_measured_is_an_error_and_not_an_interpolation(report):
    with pytest.raises(ValueError, match="nothing was measured at a drift of 10"):
        report.at(run({5.0: (1, 0)}), 10.0)
    assert report.drifts_of([run({2.0: (1, 0), 5.0: (1, 0)}), run({5.0: (1, 0)})]) == [5.0]
