"""The numbers of the alignment benchmark's report, by hand."""

import importlib.util
import math
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "scripts" / "benchmarks" / "alignment_report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("alignment_report", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def line(drift, gain, method="tgo", seed=0, regime="dense"):
    scores = {
        name: {"gain": gain, "win_rate": 0.5} for name in ("dark", "colour_faithfulness", "jpeg_compressibility")
    }
    return {
        "method": method,
        "score": "dark",
        "seed": seed,
        "regime": regime,
        "learning_rate": drift,
        "drift": drift,
    } | scores


def test_gain_at_a_drift_is_interpolated_in_its_logarithm_and_not_extrapolated(report):
    """Gains 1 at drift 1 and 3 at 100: at 10, halfway in the logarithm, 2."""
    lines = [line(100, 3), line(1, 1)]
    assert report.at_drift(lines, "dark", 10) == pytest.approx(2)
    assert math.isnan(report.at_drift(lines, "dark", 0.5)) and math.isnan(report.at_drift(lines, "dark", 101))


def test_the_pareto_front_keeps_what_nothing_beats_and_its_area_is_that_of_its_steps(report):
    """(2, 1), (4, 0.5), (8, 3): the second is beaten. Steps: 1 over ln(8/2), 3 over ln(16/8)."""
    points = [(8, 3), (4, 0.5), (2, 1)]
    assert report.pareto(points) == [(2, 1), (8, 3)]
    assert report.hypervolume(points, 16) == pytest.approx(math.log(4) + 3 * math.log(2))


def test_the_report_has_a_row_a_method_and_an_interval_over_seeds(report, tmp_path):
    lines = [line(d, g + seed, m, seed) for m, g in (("tgo", 0), ("dpo", 5)) for seed in (0, 1) for d in (1, 20)]
    text = report.write_report([*lines, line(3, 1, regime="stars")], tmp_path)
    rows = [row for row in text.splitlines() if row.startswith("| dpo | 2 | 5.50 [5.00, 6.00]")]
    assert len(rows) == 1
    # Drifts 1 and 20 of each seed, gains 5 and 6: the mean of 5·ln 20 and 6·ln 20, each less its last step of 0.
    assert rows[0].endswith(f"| {5.5 * math.log(20):.2f} |")
    assert "| stars | tgo | 1 | 1.00 | 3.00 |" in text
    assert (tmp_path / "benchmarks_alignment.png").stat().st_size > 10_000


def test_a_mean_over_the_seeds_that_reached_a_drift_says_how_many_they_were(report, tmp_path):
    """One of two seeds stays below drift 5: a mean over the other one alone must not pass for both."""
    text = report.write_report([line(1, 1), line(20, 1), line(1, 3, seed=1), line(4, 3, seed=1)], tmp_path)
    assert "| 2.00 [1.00, 3.00] | 1.00 (1 of 2 seeds) |" in text
