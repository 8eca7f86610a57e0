"""Write the report of `alignment.py`: gains at equal drift and at equal gain, and differences seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

MARGIN = 0.05
"""Largest loss, in standard deviations of the base model's score, that still counts as no worse."""
RIVALS = ("dpo", "kto", "nft", "dspo", "sft", "csft")
Line = Mapping[str, Any]
INTRODUCTION = f"""# Alignment benchmark: tables

`python scripts/benchmarks/alignment.py --report docs` writes this page from the committed rows.
[benchmarks.md](benchmarks.md) says what was run and what follows.

* All values are changes against the base model's images of the same prompts and noise, in standard deviations of the
  base model's values. Higher is better for every column, but *nats*.
* A cell shows the mean over seeds ± half the width of its 95 % interval by Student's t. One seed has no interval.
* *nats* is the mean divergence of sampling paths at that drift.
* *held out* is the gain of the trained score on the prompts that no run trained on.
* In tables of differences, *better* means that the interval lies above 0, *no worse* that it lies above -{MARGIN:g},
  *worse* that it lies below -{MARGIN:g}, *lower* that it lies below 0 and none of these; otherwise the rows do not
  decide. The differences are taken seed by seed. Of many intervals one in twenty misses the true value.
* *At equal gain*, the runs of a seed are compared at the smaller of their gains at that drift. The other scores
  are interpolated between the measured drifts, linearly in the gain and from 0 on; those of the run with the smaller
  gain are measured. Seeds on which one of the two does not gain have no equal gain and are left out there."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of two or more values, by Student's t."""
    array = np.asarray(values, dtype=np.float64)
    half = stats.t.ppf(0.975, array.size - 1) * array.std(ddof=1) / np.sqrt(array.size)
    return float(array.mean() - half), float(array.mean() + half)


def cell(values: Sequence[float], *, judged: bool = False) -> str:
    """Return the mean ± half its interval; with a verdict for differences."""
    text = f"{np.mean(values):.2f}"
    if len(values) < 2:
        return text
    low, high = interval(values)
    text += f" ± {(high - low) / 2:.2f}"
    return f"{text} {verdict(low, high)}".rstrip() if judged else text


def verdict(low: float, high: float) -> str:
    """Say what the interval of a difference decides: better, no worse, worse, lower, or nothing."""
    if low > 0:
        return "better"
    if low > -MARGIN:
        return "no worse"
    if high < -MARGIN:
        return "worse"
    return "lower" if high < 0 else ""


def at(line: Line, drift: float) -> Mapping[str, Any]:
    """Return the point of a run that was measured at a drift."""
    for point in line["points"]:
        if abs(point["drift"] / drift - 1) < 0.02:
            return point
    raise ValueError(f"{line['method']}, seed {line['seed']}: nothing was measured at a drift of {drift:g}.")


def drifts_of(lines: Sequence[Line]) -> list[float]:
    """Return the drifts, rounded, at which every run was measured."""
    found = [{float(round(point["drift"])) for point in line["points"]} for line in lines]
    return sorted(set.intersection(*found)) if found else []


def at_gain(line: Line, gain: float, name: str) -> float:
    """Return a score of a run where its trained score has gained so much, from 0 through its measured points."""
    points = sorted(line["points"], key=lambda point: point["drift"])
    gains = np.maximum.accumulate([0.0, *(point["gains"][line["score"]]["gain"] for point in points)])
    return float(np.interp(gain, gains, [0.0, *(point["gains"][name]["gain"] for point in points)]))


def by_method(lines: Sequence[Line]) -> dict[str, dict[int, Line]]:
    """Return the runs by method, strength and seed; the name of a method holds its strength."""
    found: dict[str, dict[int, Line]] = {}
    for line in lines:
        found.setdefault(f"{line['method']} ({line['strength']:g})", {})[line["seed"]] = line
    return found


def tuning_table(lines: Sequence[Line]) -> str:
    """Return the gains on the tuning seed: one row per method and score, its strengths in the cells."""
    rows = ["| trained on | method | strength: gain |", "|---|---|---|"]
    groups: dict[tuple[str, str], dict[float, list[float]]] = {}
    for line in lines:
        gains = groups.setdefault((line["score"], line["method"]), {})
        gains.setdefault(line["strength"], []).append(line["points"][0]["gains"][line["score"]]["gain"])
    for (score, method), strengths in sorted(groups.items()):
        cells = [f"{strength:g}: {np.mean(gains):.2f} ({len(gains)})" for strength, gains in sorted(strengths.items())]
        rows.append(f"| {score} | {method} | {'; '.join(cells)} |")
    return "\n".join(rows)


def gain_table(lines: Sequence[Line], score: str, drift: float) -> str:
    """Return what each method gains and loses at a drift, most gain first."""
    others = sorted(name for name in at(lines[0], drift)["gains"] if name != score)
    rows = [f"| method | seeds | {' | '.join([score, 'held out', *others])} | nats |"]
    rows.append("|---" * (len(others) + 5) + "|")
    found = []
    for method, seeds in by_method(lines).items():
        points = [at(line, drift) for line in seeds.values()]
        gains = [[point["gains"][name]["gain"] for point in points] for name in (score, *others)]
        unseen = [point["gains"][score]["held_out"] for point in points]
        cells = [cell(gains[0]), cell(unseen), *map(cell, gains[1:]), f"{np.mean([p['nats'] for p in points]):.1f}"]
        found.append((-np.mean(gains[0]), f"| {method} | {len(points)} | {' | '.join(cells)} |"))
    return "\n".join([*rows, *(row for _, row in sorted(found))])


def difference_table(lines: Sequence[Line], score: str, ours: str, drift: float, *, equal_gain: bool) -> str:
    """Return one method minus each rival, seed by seed, at a drift or at the smaller of both gains there."""
    others = sorted(name for name in at(lines[0], drift)["gains"] if name != score)
    names = others if equal_gain else [score, *others]
    methods = by_method(lines)
    rows = [f"| {ours} minus | seeds | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    for rival, seeds in methods.items():
        common = sorted(set(seeds) & set(methods[ours]))
        if equal_gain:
            common = [seed for seed in common if smaller_gain(methods[ours][seed], seeds[seed], drift) > 0]
        if rival.split(" (")[0] not in RIVALS or not common:
            continue
        pairs = [(methods[ours][seed], seeds[seed]) for seed in common]
        cells = [cell([difference(*pair, name, drift, equal_gain) for pair in pairs], judged=True) for name in names]
        rows.append(f"| {rival} | {len(common)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def smaller_gain(mine: Line, theirs: Line, drift: float) -> float:
    """Return the smaller of the gains of two runs at a drift."""
    return float(min(at(line, drift)["gains"][line["score"]]["gain"] for line in (mine, theirs)))


def difference(mine: Line, theirs: Line, name: str, drift: float, equal_gain: bool) -> float:
    """Return a score of one run minus that of another."""
    if not equal_gain:
        return float(at(mine, drift)["gains"][name]["gain"] - at(theirs, drift)["gains"][name]["gain"])
    gain = smaller_gain(mine, theirs, drift)
    return at_gain(mine, gain, name) - at_gain(theirs, gain, name)


def write_report(lines: Sequence[Line], folder: Path, tuning: Sequence[int] = (0,), first: int = 2) -> str:
    """
    Write `benchmarks_alignment.md`.

    Args:
        lines (`Sequence[Mapping]`):
            The lines of a results file.
        folder (`Path`):
            The folder that it is written into.
        tuning (`Sequence[int]`):
            Seeds on which settings were chosen; they stand in a table of their own.
        first (`int`):
            Settings were chosen without the seeds from this one on. Those between are in no table.

    Returns:
        `str`: the page.
    """
    if not lines:
        raise SystemExit("There are no results yet: run without --report first.")
    parts = [INTRODUCTION]
    tuned = [line for line in lines if line["seed"] in tuning and line["regime"] == "dense"]
    for place, updates in dict.fromkeys((line["world"], line["updates"]) for line in tuned):
        chosen = [line for line in tuned if (line["world"], line["updates"]) == (place, updates)]
        kind = (
            f"{place}, {updates} updates: gain at a drift of {chosen[0]['points'][0]['drift']:.0f} (number of seeds)"
        )
        parts.append(f"## Settings tried on the tuning seed, {kind}\n\n{tuning_table(chosen)}")
    reported = [line for line in lines if line["seed"] >= first]
    names = ("world", "regime", "updates", "score")
    for key in dict.fromkeys(tuple(line[name] for name in names) for line in reported):
        chosen = [line for line in reported if tuple(line[name] for name in names) == key]
        parts.append(f"## {key[0]}, {key[1]} scores, {key[2]} updates, trained on {key[3]}")
        ours = [name for name in by_method(chosen) if name.split(" (")[0] not in RIVALS]
        for drift in drifts_of(chosen):
            parts.append(f"### Drift {drift:g}\n\n{gain_table(chosen, key[3], drift)}")
            for name in ours:
                for equal_gain, place in ((False, "at equal drift"), (True, "at equal gain")):
                    table = difference_table(chosen, key[3], name, drift, equal_gain=equal_gain)
                    if table.count("\n") > 1:
                        parts.append(f"{name}, {place}:\n\n{table}")
    text = "\n\n".join(parts) + "\n"
    (folder / "benchmarks_alignment.md").write_text(text)
    return text
