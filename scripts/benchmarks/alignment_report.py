"""Write the report of `alignment.py`: tables of gain at equal drift and of paired differences, and a plot."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

DRIFTS = (2.0, 5.0, 10.0)
WATCHED = ("colour_faithfulness", "jpeg_compressibility")
RIVALS = ("dpo", "kto", "nft", "sft", "csft")
Line = Mapping[str, Any]
Setting = tuple[str, float, float]
"""Method, T and learning rate."""
REGIMES = {"stars": "Star ratings", "single": "One image per prompt", "few": "192 images, 21 passes"}
"""Headings of the runs that train on other labels than the scores themselves."""
INTRODUCTION = f"""# Alignment of the shapes model

`python scripts/benchmarks/alignment.py --report docs` writes this page. [benchmarks.md](benchmarks.md) says what was
run, how gain and drift are measured, and what follows from the tables.

How to read the tables:

* *gain*, *colour* and *size* are the gains of the trained score, of colour faithfulness and of JPEG size, in standard
  deviations of the base model's score. "Gain at 2" is the gain at a drift of 2.
* A cell shows the mean over seeds ± half the width of its 95 % interval. "(3 of 5)" after it means that only three of
  five seeds reached the drift, and – means that none did.
* A method at its best T is shown at the T that gained most at that drift. A T is considered only if at least three
  seeds, and more than half of those that were run, reached the drift.
* A table of a method "minus" its rivals shows differences that are taken seed by seed.
* *updates to 2, 10* is the mean number of updates after which the runs were measured beyond a drift of 2 and of 10. It
  is – if one of the runs never was.
* *hypervolume* is the area under the Pareto front of gain over the logarithm of the drift, above a gain of 0, for
  drifts from 0.1 to {1.5 * max(DRIFTS):g}. It is the mean over seeds."""


def at_drift(line: Line, name: str, drift: float) -> float:
    """
    Return the gain of a run at a drift, interpolated linearly in the logarithm of the drift.

    Below the first measured drift, down to half of it, the gain is taken to grow with the square root of the drift. It
    does so while the output changes little: both are 0 at the start, the gain is linear in the change of the weights,
    and the drift is quadratic in it. Elsewhere outside the measured drifts the result is NaN.
    """
    points = sorted(line["points"], key=lambda point: point["drift"])
    drifts, gains = [point["drift"] for point in points], [point[name]["gain"] for point in points]
    if not drifts or not drifts[0] / 2 <= drift <= drifts[-1]:
        return float("nan")
    if drift < drifts[0]:
        return float(gains[0] * np.sqrt(drift / drifts[0]))
    return float(np.interp(np.log(drift), np.log(drifts), gains))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of two or more values, by Student's t."""
    array = np.asarray(values, dtype=np.float64)
    half = stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size)
    return float(array.mean() - half), float(array.mean() + half)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (drift, gain) that no other point beats with less drift and more gain, by increasing drift."""
    front: list[tuple[float, float]] = []
    for drift, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((drift, gain))
    return front


def hypervolume(points: Sequence[tuple[float, float]], largest_drift: float) -> float:
    """Return the area under the Pareto front in (log drift, gain), from drift 0.1 to the largest, above gain 0."""
    front = [(max(drift, 0.1), gain) for drift, gain in pareto(points) if drift <= largest_drift and gain > 0]
    if not front:
        return 0.0
    edges = [*(drift for drift, _ in front), largest_drift]
    widths = [np.log(b / a) for a, b in itertools.pairwise(edges)]
    return float(sum(width * gain for width, (_, gain) in zip(widths, front, strict=True)))


def cell(values: Sequence[float]) -> str:
    """Return the mean of the known values ± half its interval, and their number where some are not known."""
    known = [value for value in values if np.isfinite(value)]
    if not known:
        return "–"
    text = f"{np.mean(known):.2f}"
    if len(known) > 1:
        low, high = interval(known)
        text += f" ± {(high - low) / 2:.2f}"
    return text if len(known) == len(values) else f"{text} ({len(known)} of {len(values)})"


def by_setting(lines: Sequence[Line], score: str, regime: str = "dense") -> dict[Setting, dict[int, Line]]:
    """Return the runs on a score, by setting and seed."""
    found: dict[Setting, dict[int, Line]] = defaultdict(dict)
    for line in lines:
        if (line["score"], line["regime"]) == (score, regime):
            found[line["method"], line["temperature"], line["learning_rate"]][line["seed"]] = line
    return found


def table(settings: Mapping[Setting, Mapping[int, Line]], score: str) -> str:
    """Return a table with one row per setting: gains of the trained and of the other scores at each drift."""
    largest = max(DRIFTS)
    columns = [f"{name} at {drift:g}" for name in ("gain", "colour", "size") for drift in DRIFTS]
    rows = [
        f"| method | T | learning rate | seeds | {' | '.join(columns)} | updates to 2, 10 | hypervolume |",
        f"|---|---|---|{'---|' * (len(columns) + 3)}",
    ]
    for (method, temperature, rate), seeds in settings.items():
        cells = [
            cell([at_drift(run, name, drift) for run in seeds.values()])
            for name in (score, *WATCHED)
            for drift in DRIFTS
        ]
        # One front per seed: a front through the points of several seeds would grow with their number.
        points = [[(point["drift"], point[score]["gain"]) for point in run["points"]] for run in seeds.values()]
        volume = np.mean([hypervolume(each, largest * 1.5) for each in points])
        updates = ", ".join(updates_to(list(seeds.values()), drift) for drift in (DRIFTS[0], DRIFTS[-1]))
        setting = f"{method} | {temperature:g} | {rate:g}"
        rows.append(f"| {setting} | {len(seeds)} | {' | '.join(cells)} | {updates} | {volume:.2f} |")
    return "\n".join(rows)


def summary(lines: Sequence[Line]) -> str:
    """Return a table with one row per score and method: its gain at its best T for each drift, highest gain first."""
    rows = [f"| trained on | method | {' | '.join(f'gain at {drift:g} (T, seeds)' for drift in DRIFTS)} |"]
    rows.append("|---|---|" + "---|" * len(DRIFTS))
    for score in dict.fromkeys(line["score"] for line in lines if line["regime"] == "dense"):
        settings, found = by_setting(lines, score), []
        for method in dict.fromkeys(setting[0] for setting in settings):
            shown, first = [], -np.inf
            for drift in DRIFTS:
                best = best_setting(lines, score, method, drift)
                gains = [at_drift(run, score, drift) for run in settings[best].values()] if best else []
                known = [gain for gain in gains if np.isfinite(gain)]
                shown.append(f"{cell(known)} ({best[1]:g}, {len(known)})" if best else "–")
                first = max(first, np.mean(known) if known and drift == DRIFTS[0] else -np.inf)
            if np.isfinite(first):
                found.append((first, f"| {score} | {method} | {' | '.join(shown)} |"))
        rows += [row for _, row in sorted(found, key=lambda item: -item[0])]
    return "\n".join(rows)


def updates_to(runs: Sequence[Line], drift: float) -> str:
    """Return the mean number of updates after which runs were beyond a drift; – if one run never was."""
    steps = [min((point["step"] for point in run["points"] if point["drift"] >= drift), default=None) for run in runs]
    return "–" if None in steps else f"{np.mean(steps):.0f}"


def differences(
    lines: Sequence[Line], score: str, ours: Setting, drift: float, name: str
) -> dict[Setting, list[float]]:
    """Return the gain of one setting minus that of each other, by seed; NaN where a run did not reach the drift."""
    settings = by_setting(lines, score)
    mine = settings[ours]
    return {
        setting: [
            at_drift(mine[seed], name, drift) - at_drift(runs[seed], name, drift) for seed in mine if seed in runs
        ]
        for setting, runs in settings.items()
        if setting != ours
    }


def paired_table(lines: Sequence[Line], score: str, ours: Setting) -> str:
    """Return a table with one row per rival: how much more a setting of ours gains at each drift, seed by seed."""
    columns = [f"{name} at {drift:g}" for name in ("gain", "colour", "size") for drift in DRIFTS]
    rows = [f"| {ours[0]} (T {ours[1]:g}) minus | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    found = {
        (name, drift): differences(lines, score, ours, drift, name) for name in (score, *WATCHED) for drift in DRIFTS
    }
    for setting, first in found[score, DRIFTS[0]].items():
        if setting[0].split(",")[0] in RIVALS and len(first) > 1:
            cells = [cell(found[name, drift][setting]) for name in (score, *WATCHED) for drift in DRIFTS]
            rows.append(f"| {setting[0]} (T {setting[1]:g}) | {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def best_setting(lines: Sequence[Line], score: str, method: str, drift: float) -> Setting | None:
    """Return the setting of a method that gains most at a drift, if three seeds and more than half reached it."""
    means, settings = {}, by_setting(lines, score)
    wanted = min(3, max(len(runs) for runs in settings.values()))
    for setting, runs in settings.items():
        gains = np.array([at_drift(run, score, drift) for run in runs.values()])
        known = np.isfinite(gains)
        if setting[0] == method and known.sum() >= wanted and known.mean() > 0.5:
            means[setting] = gains[known].mean()
    return max(means, key=means.__getitem__, default=None)


def best_table(lines: Sequence[Line], method: str) -> str:
    """Return a table of a method minus each rival, both at their best T for that drift, seed by seed."""
    columns = ["trained on", "drift", "T", "rival", "rival's T", "seeds", "gain", "colour", "size"]
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for score in dict.fromkeys(line["score"] for line in lines if line["regime"] == "dense"):
        for drift, rival in itertools.product(DRIFTS, RIVALS):
            ours, theirs = (best_setting(lines, score, name, drift) for name in (method, rival))
            if ours is None or theirs is None:
                continue
            found = [differences(lines, score, ours, drift, name)[theirs] for name in (score, *WATCHED)]
            known = [[value for value in each if np.isfinite(value)] for each in found]
            cells = [
                score,
                f"{drift:g}",
                f"{ours[1]:g}",
                rival,
                f"{theirs[1]:g}",
                str(len(known[0])),
                *map(cell, known),
            ]
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) if len(rows) > 2 else ""


def plot(lines: Sequence[Line], file: Path) -> None:
    """Plot the mean gain of each method against drift: the trained score above, colour faithfulness below."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    scores = list(dict.fromkeys(line["score"] for line in lines if line["regime"] == "dense"))
    figure, panels = pyplot.subplots(2, len(scores), figsize=(5 * len(scores), 7.5), squeeze=False, sharex=True)
    grid = np.geomspace(1.5, 10, 30)
    shown = [setting[0] for score in scores for setting in several_seeds(by_setting(lines, score))]
    methods = list(dict.fromkeys(shown))
    drawn: dict[str, Any] = {}
    for column, score in enumerate(scores):
        compared = several_seeds(by_setting(lines, score))
        for row, name in enumerate((score, WATCHED[0])):
            panel = panels[row][column]
            for (method, temperature, _), runs in compared.items():
                curves = np.array([[at_drift(run, name, drift) for drift in grid] for run in runs.values()])
                number = methods.index(method)
                style = {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else "--"}
                known = np.isfinite(curves).all(axis=0)
                if known.any():
                    (drawn[method],) = panel.plot(grid[known], curves.mean(axis=0)[known], label=method, **style)
                    panel.annotate(f"T {temperature:g}", (grid[known][-1], curves.mean(axis=0)[known][-1]), fontsize=6)
            panel.set_xscale("log")
            panel.set_xticks(DRIFTS, [f"{drift:g}" for drift in DRIFTS])
            panel.minorticks_off()
            panel.set_title(f"{name}, trained on" if row == 0 else f"{name}, trained on {score}", fontsize=10)
            panel.axhline(0, color="0.7", linewidth=0.8)
        panels[1][column].set_xlabel("drift: mean squared change of the output × 1000")
    for row in (0, 1):
        panels[row][0].set_ylabel("gain (standard deviations)")
    figure.legend(drawn.values(), drawn.keys(), loc="lower center", ncols=6, fontsize=9, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def several_seeds(settings: Mapping[Setting, dict[int, Line]]) -> dict[Setting, dict[int, Line]]:
    """Return the settings with two or more seeds, or all settings if there are none."""
    found = {setting: runs for setting, runs in settings.items() if len(runs) > 1}
    return found or dict(settings)


def write_report(lines: Sequence[Line], folder: Path) -> str:
    """
    Write `benchmarks_alignment.md` and `benchmarks_alignment.png`.

    Args:
        lines (`Sequence[Mapping]`):
            The lines of a results file.
        folder (`Path`):
            The folder that both are written into.

    Returns:
        `str`: the tables.
    """
    if not lines:
        raise SystemExit("There are no results yet: run without --report first.")
    parts = [INTRODUCTION, f"## Gain of each method at its best T\n\n{summary(lines)}"]
    for method in dict.fromkeys(line["method"] for line in lines if line["method"].split(",")[0] not in RIVALS):
        if best := best_table(lines, method):
            parts.append(f"## {method} minus each rival, both at their best T\n\n{best}")
    for score in dict.fromkeys(line["score"] for line in lines if line["regime"] == "dense"):
        settings = by_setting(lines, score)
        compared = several_seeds(settings)
        parts.append(f"## Trained on {score}\n\n{table(compared, score)}")
        for setting in compared:
            if setting[0].split(",")[0] not in RIVALS and (paired := paired_table(lines, score, setting)):
                parts.append(paired)
        if once := {setting: runs for setting, runs in settings.items() if setting not in compared}:
            parts.append(f"Settings with one seed:\n\n{table(once, score)}")
    for regime in dict.fromkeys(line["regime"] for line in lines if line["regime"] != "dense"):
        score = next(line["score"] for line in lines if line["regime"] == regime)
        settings = by_setting(lines, score, regime)
        parts.append(f"## {REGIMES.get(regime, regime)}, trained on {score}\n\n{table(settings, score)}")
    text = "\n\n".join(parts) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmarks_alignment.md").write_text(text)
    plot(lines, folder / "benchmarks_alignment.png")
    return text
