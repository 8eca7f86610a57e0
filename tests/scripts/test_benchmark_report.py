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


def run(points, method="tgo", seed=0, regime="dense"):
    """A line of a results file with (drift, gain) points; colour gains a tenth less than the trained score."""
    return {
        "method": method,
        "temperature": 0.001,
        "learning_rate": 2e-4,
        "score": "dark",
        "seed": seed,
        "regime": regime,
        "points": [
            {"step": 4 * number + 4, "drift": drift}
            | {"dark": {"gain": gain}, "colour_faithfulness": {"gain": gain - 0.1}}
            | {"jpeg_compressibility": {"gain": 0.0}}
            for number, (drift, gain) in enumerate(points)
        ],
    }


def test_gain_at_a_drift_is_interpolated_in_its_logarithm_and_grows_with_the_root_of_the_first(report):
    """Gains 1 at drift 1 and 3 at 100: at 10, halfway in the logarithm, 2; at 0.64 its root, 0.8."""
    line = run([(100, 3), (1, 1)])
    assert report.at_drift(line, "dark", 10) == pytest.approx(2)
    assert report.at_drift(line, "dark", 0.64) == pytest.approx(0.8)
    assert math.isnan(report.at_drift(line, "dark", 0.4)) and math.isnan(report.at_drift(line, "dark", 101))


def test_the_pareto_front_keeps_what_nothing_beats_and_its_area_is_that_of_its_steps(report):
    """(2, 1), (4, 0.5), (8, 3): the second is beaten. Steps: 1 over ln(8/2), 3 over ln(16/8)."""
    points = [(8, 3), (4, 0.5), (2, 1)]
    assert report.pareto(points) == [(2, 1), (8, 3)]
    assert report.hypervolume(points, 16) == pytest.approx(math.log(4) + 3 * math.log(2))
    assert report.hypervolume([(2, -1)], 16) == 0


def test_an_interval_over_two_seeds_is_that_of_the_t_distribution(report):
    """Student's t with one degree of freedom is Cauchy's: its 97.5 % point is tan(0.475·π); half the range is s/√2."""
    low, high = report.interval([1.0, 3.0])
    half = math.tan(0.475 * math.pi)
    assert (low, high) == pytest.approx((2 - half, 2 + half))


def test_the_report_has_a_row_a_setting_and_differences_seed_by_seed(report, tmp_path):
    """Seeds differ by 10 in both methods alike, which a paired interval must not see."""
    lines = [
        run([(1, gain + 10 * seed), (20, gain + 10 * seed)], method, seed)
        for method, gain in (("centred", 5), ("dpo", 3))
        for seed in (0, 1, 2)
    ]
    text = report.write_report([*lines, run([(1, 1), (20, 1)], regime="stars")], tmp_path)
    row = next(row for row in text.splitlines() if row.startswith("| dpo (T 0.001) | "))
    assert row == "| dpo (T 0.001) | " + "2.00 ± 0.00 | " * 6 + "0.00 ± 0.00 | " * 2 + "0.00 ± 0.00 |"
    # Both points have the same gain: the mean over seeds, 15, over all of ln(15 / 1), the second point being outside.
    row = next(row for row in text.splitlines() if row.startswith("| centred | 0.001 | 0.0002 | 3 | 15.00 ± "))
    assert row.endswith(f"| 8, 8 | {15 * math.log(15):.2f} |")
    assert "## Star ratings, trained on dark" in text
    assert (tmp_path / "benchmarks_alignment.png").stat().st_size > 10_000


def test_a_mean_over_the_seeds_that_reached_a_drift_says_how_many_they_were(report):
    """One of two seeds stays below drift 5: a mean over the other one alone must not pass for both."""
    settings = report.by_setting([run([(1, 1), (20, 1)]), run([(1, 3), (4, 3)], seed=1)], "dark")
    text = report.table(settings, "dark")
    assert "| 1.00 (1 of 2) |" in text and "| 8, – |" in text


def test_the_best_of_two_methods_are_compared_where_most_seeds_reached_the_drift(report):
    """
    At drift 2: T 0.1 gains 1, T 0.2 gains 2 and 0 is DPO's. At drift 5 T 0.2 was reached by one seed in three, so that
    T 0.1 is left, with a gain of 1 against 3. Two seeds alone are not compared.
    """
    far, near = [(1, 1), (10, 1)], [(1, 2), (4, 2)]
    lines = [run(far, "centred", seed) | {"temperature": 0.1} for seed in range(3)]
    lines += [run(near if seed else [(1, 2), (10, 2)], "centred", seed) | {"temperature": 0.2} for seed in range(3)]
    lines += [run([(2, 0), (5, 3)], "dpo", seed) for seed in range(3)]
    lines += [run(far, "kto", seed) for seed in range(2)]
    rows = report.best_table(lines, "centred").splitlines()[2:]
    assert rows == [
        "| dark | 2 | 0.2 | dpo | 0.001 | 3 | 2.00 ± 0.00 | 2.00 ± 0.00 | 0.00 ± 0.00 |",
        "| dark | 5 | 0.1 | dpo | 0.001 | 3 | -2.00 ± 0.00 | -2.00 ± 0.00 | 0.00 ± 0.00 |",
    ]
    assert report.summary(lines).splitlines()[2:] == [
        "| dark | centred | 2.00 ± 0.00 (0.2, 3) | 1.00 ± 0.00 (0.1, 3) | 1.00 ± 0.00 (0.1, 3) |",
        "| dark | dpo | 0.00 ± 0.00 (0.001, 3) | 3.00 ± 0.00 (0.001, 3) | – |",
    ]
    assert "| dark | kto | 1.00 ± 0.00 (0.001, 2) |" in report.summary(lines[-2:])
