"""Lines of `alignment.py` to a table and a plot: gain at equal drift, intervals over seeds, and the Pareto front."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

DRIFTS = (2.0, 5.0, 10.0)
WATCHED = ("colour_faithfulness", "jpeg_compressibility")
RESAMPLES = 2000


def curve(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Drifts in increasing order, and the gain of a score at each, of the runs of one method and seed."""
    ordered = sorted(lines, key=lambda line: line["drift"])
    return np.array([line["drift"] for line in ordered]), np.array([line[name]["gain"] for line in ordered])


def at_drift(lines: Sequence[Mapping[str, Any]], name: str, drift: float) -> float:
    """Gain at a drift by linear interpolation in its logarithm; NaN outside the drifts that were reached."""
    drifts, gains = curve(lines, name)
    if not drifts.size or not drifts[0] <= drift <= drifts[-1]:
        return float("nan")
    return float(np.interp(np.log(drift), np.log(drifts), gains))


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """95 % percentile interval of a mean over seeds; the value itself for one seed."""
    array = np.asarray(values)
    draws = np.random.default_rng(0).integers(array.size, size=(RESAMPLES, array.size))
    low, high = np.quantile(array[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points (drift, gain) that no other one beats by less drift and more gain, by increasing drift."""
    front: list[tuple[float, float]] = []
    for drift, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((drift, gain))
    return front


def hypervolume(points: Sequence[tuple[float, float]], largest_drift: float) -> float:
    """Area under the front in (log drift, gain) from drift 0.1 to the largest drift, above a gain of 0."""
    front = [(max(drift, 0.1), gain) for drift, gain in pareto(points) if drift <= largest_drift and gain > 0]
    edges = [*(drift for drift, _ in front), largest_drift]
    widths = [np.log(b / a) for a, b in itertools.pairwise(edges)]
    return float(sum(width * gain for width, (_, gain) in zip(widths, front, strict=True)))


def _cell(values: Sequence[float]) -> str:
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "–"
    mean = f"{np.mean(known):.2f}"
    reached = "" if len(known) == len(values) else f" ({len(known)} of {len(values)} seeds)"
    if len(known) == 1:
        return mean + reached
    low, high = bootstrap(known)
    return f"{mean} [{low:.2f}, {high:.2f}]{reached}"


def table(lines: Sequence[Mapping[str, Any]], score: str) -> str:
    """Markdown: a row a method, gain of the trained and the watched scores at each drift; dense labels only."""
    chosen = [line for line in lines if line["score"] == score and line["regime"] == "dense"]
    by_method: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for line in chosen:
        by_method[line["method"]][line["seed"]].append(line)
    largest = max(line["drift"] for line in chosen)
    columns = [f"{name} at {drift:g}" for name in (score, *WATCHED) for drift in DRIFTS]
    rows = [
        f"| method | seeds | {' | '.join(columns)} | drifts | hypervolume |",
        f"|---|{'---|' * (len(columns) + 3)}",
    ]
    for method, seeds in by_method.items():
        cells = [
            _cell([at_drift(runs, name, drift) for runs in seeds.values()])
            for name in (score, *WATCHED)
            for drift in DRIFTS
        ]
        reached = [line["drift"] for runs in seeds.values() for line in runs]
        # Of each seed by itself: a front through the best of several would grow with their number.
        points = [[(line["drift"], line[score]["gain"]) for line in runs] for runs in seeds.values()]
        rows.append(
            f"| {method} | {len(seeds)} | {' | '.join(cells)} | {min(reached):.2g} to {max(reached):.2g} | "
            f"{np.mean([hypervolume(each, largest) for each in points]):.2f} |"
        )
    return "\n".join(rows)


def regime_table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: gain where labels are stars, or one noisy picture a prompt; mean and interval over seeds."""
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for line in lines:
        if line["regime"] != "dense":
            found[line["regime"], line["method"]].append(line)
    if not found:
        return ""
    rows = ["| labels | method | seeds | gain | drift |", "|---|---|---|---|---|"]
    for (regime, method), runs in sorted(found.items()):
        gains, drifts = [run[run["score"]]["gain"] for run in runs], [run["drift"] for run in runs]
        rows.append(f"| {regime} | {method} | {len(runs)} | {_cell(gains)} | {_cell(drifts)} |")
    return "\n".join(rows)


def plot(lines: Sequence[Mapping[str, Any]], file: Path) -> None:
    """Gain against drift, a panel a score, a line a method through the means of its strengths over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dense = [line for line in lines if line["regime"] == "dense"]
    scores = list(dict.fromkeys(line["score"] for line in dense))
    methods = list(dict.fromkeys(line["method"] for line in dense))
    figure, panels = pyplot.subplots(1, len(scores), figsize=(6.5 * len(scores), 5), squeeze=False)
    colours = pyplot.get_cmap("tab20")
    for panel, score in zip(panels[0], scores, strict=True):
        for number, method in enumerate(methods):
            strengths: dict[float, list[tuple[float, float]]] = defaultdict(list)
            for line in dense:
                if (line["score"], line["method"]) == (score, method):
                    strengths[line["learning_rate"]].append((line["drift"], line[score]["gain"]))
            if not strengths:
                continue
            means = np.array([np.mean(points, axis=0) for _, points in sorted(strengths.items())])
            panel.plot(means[:, 0], means[:, 1], marker="o", markersize=4, color=colours(number % 20), label=method)
        panel.set_xscale("log")
        panel.set_title(score)
        panel.set_xlabel("drift: mean squared change of the output × 1000")
        panel.set_ylabel("gain, in standard deviations of the base's score")
        panel.axhline(0, color="0.7", linewidth=0.8)
    panels[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def write_report(lines: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """
    Write `benchmarks_alignment.md` and `benchmarks_alignment.png`.

    Args:
        lines (`Sequence[Mapping]`):
            Of a results file.
        folder (`Path`):
            Where both go.

    Returns:
        `str`: the tables.
    """
    if not lines:
        raise SystemExit("There are no results yet: run without --report first.")
    scores = list(dict.fromkeys(line["score"] for line in lines if line["regime"] == "dense"))
    parts = [f"## Trained on {score}\n\n{table(lines, score)}" for score in scores]
    if regimes := regime_table(lines):
        parts.append(f"## Other labels\n\n{regimes}")
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks_alignment.md").write_text(text)
    plot(lines, folder / "benchmarks_alignment.png")
    return text
