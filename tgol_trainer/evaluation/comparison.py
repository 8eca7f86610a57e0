"""Compare scores before and after on the same prompts and seeds: win rate, means and their bootstrap intervals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tgol_trainer._files import write_file

_BLOCK = 1_000_000
"""Resampled prompts that are held in memory at a time: 8 MB per array."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """
    One score before and after, over pairs of images made from the same prompt and seed.

    Args:
        name (`str`): Name of the score.
        trained (`bool`): Whether this score was trained on; a rise of such a score is weaker evidence.
        num_images (`int`): Pairs compared.
        num_prompts (`int`): Distinct prompts among them.
        win_rate (`float`): Share of pairs in which after beats before, a tie counting one half; in 0..1.
        interval (`tuple[float, float]`): Bootstrap interval of the win rate.
        wins (`int`): Pairs in which after beats before.
        losses (`int`): Pairs in which before beats after.
        ties (`int`): Pairs with equal scores.
        sign_test (`float`):
            Two-sided p-value of the sign test over prompts: the chance that at least as many prompts agree, if each
            were as likely to gain as to lose. A prompt gains if it has more wins than losses; with as many of both it
            is left out.
        mean_before (`float`): Mean score before, in the unit of the score; the next five are too.
        mean_after (`float`): Mean score after.
        median_before (`float`): Median score before.
        median_after (`float`): Median score after.
        mean_change (`float`): Mean of after − before.
        mean_change_interval (`tuple[float, float]`): Bootstrap interval of that mean.
        num_missing (`int`): Pairs left out because one of the two could not be scored.
        confidence (`float`, *optional*, defaults to 0.95): Level of both intervals.
    """

    name: str
    trained: bool
    num_images: int
    num_prompts: int
    win_rate: float
    interval: tuple[float, float]
    wins: int
    losses: int
    ties: int
    sign_test: float
    mean_before: float
    mean_after: float
    median_before: float
    median_after: float
    mean_change: float
    mean_change_interval: tuple[float, float]
    num_missing: int
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-serialisable dictionary; intervals become lists."""
        fields = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def compare_scores(
    name: str,
    before: Sequence[float | None],
    after: Sequence[float | None],
    prompts: Sequence[str],
    *,
    trained: bool,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Comparison:
    """
    Compare paired scores.

    The win rate is `mean(1[after > before] + ½·1[after = before])`. Intervals are percentile bootstrap intervals over
    prompts: whole prompts are drawn with all their images, since images of one prompt are not independent
    evidence; the sign test counts prompts for the same reason. With a single prompt, images are drawn instead. Such
    intervals are too narrow for a handful of prompts, and a single point where all pairs agree. Exchanging before and
    after mirrors every number.

    Args:
        name (`str`): Name of the score.
        before (`Sequence[float | None]`): Scores before; `None` where an image could not be scored.
        after (`Sequence[float | None]`): Scores after, of images with the same prompts and seeds.
        prompts (`Sequence[str]`): The prompt of each pair; equal prompts form one group.
        trained (`bool`): Whether this score was trained on.
        num_resamples (`int`, *optional*, defaults to 2000): Bootstrap resamples.
        confidence (`float`, *optional*, defaults to 0.95): Level of the intervals, in 0..1.
        seed (`int`, *optional*, defaults to 0): Seed of the resampling.

    Returns:
        `Comparison`: all numbers over the pairs in which both were scored.

    Raises:
        ValueError: if the lengths differ, a score is NaN or infinite, no pair is left, or an argument is out of range.
    """
    _check(name, (len(before), len(after), len(prompts)), num_resamples, confidence)
    old, new = _as_array(before, name, "before"), _as_array(after, name, "after")
    kept = ~(np.isnan(old) | np.isnan(new))
    if not kept.any():
        raise ValueError(f"The score {name!r} has no pair with both values: nothing is left of {len(before)} pairs.")
    old, new = old[kept], new[kept]
    kept_prompts = [prompts[i] for i in np.flatnonzero(kept).tolist()]
    clusters = clusters_of(kept_prompts)
    wins = (new > old) + 0.5 * (new == old)
    change = new - old
    means = bootstrap_means((wins, change), clusters, num_resamples, seed)
    tail = (1 - confidence) / 2
    intervals = [(float(low), float(high)) for low, high in np.quantile(means, [tail, 1 - tail], axis=1).T]
    return Comparison(
        name=name,
        trained=trained,
        num_images=int(old.size),
        num_prompts=len(set(kept_prompts)),
        win_rate=float(wins.mean()),
        interval=intervals[0],
        wins=int((new > old).sum()),
        losses=int((new < old).sum()),
        ties=int((new == old).sum()),
        sign_test=_sign_test(np.bincount(clusters, weights=np.sign(change))),
        mean_before=float(old.mean()),
        mean_after=float(new.mean()),
        median_before=float(np.median(old)),
        median_after=float(np.median(new)),
        mean_change=float(change.mean()),
        mean_change_interval=intervals[1],
        num_missing=int((~kept).sum()),
        confidence=confidence,
    )


def write_metrics(
    path: str | os.PathLike[str],
    comparisons: Sequence[Comparison],
    *,
    seconds: Mapping[str, float] | None = None,
    **facts: Any,
) -> None:
    """
    Write comparisons as JSON: `{"scores": {name: {"trained": ..., "win_rate": ..., ...}}, "seconds": {...}, ...}`.

    The file appears whole or not at all. NaN and infinity, which JSON does not have, become null.

    Args:
        path (`str` or `os.PathLike`): The file; missing folders are made.
        comparisons (`Sequence[Comparison]`): One per score, with distinct names.
        seconds (`Mapping[str, float]`, *optional*): Wall-clock seconds of each part of the run.
        facts (`Any`): Further top-level entries: numbers, strings, lists and dictionaries of them.

    Raises:
        ValueError: if two comparisons share a name, or a fact is called `scores`.
        TypeError: if a fact cannot be written as JSON.
    """
    names = [comparison.name for comparison in comparisons]
    if len(set(names)) < len(names):
        raise ValueError(f"Two comparisons share a name ({', '.join(sorted(names))}); the file holds one per name.")
    if "scores" in facts:
        raise ValueError("`scores` is filled from `comparisons`; give the fact another name.")
    content = {"scores": by_name(comparisons), "seconds": dict(seconds or {}), **facts}
    write_file(path, json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def by_name(comparisons: Sequence[Comparison]) -> dict[str, dict[str, Any]]:
    """Return the name of each score and its other numbers, as metrics.json holds them."""
    fields = [comparison.to_dict() for comparison in comparisons]
    return {values.pop("name"): values for values in fields}


def format_table(comparisons: Sequence[Comparison]) -> str:
    """
    Return an aligned table of plain ASCII (score names apart), at most 100 columns wide.

    Args:
        comparisons (`Sequence[Comparison]`): One per row, in the order given.

    Returns:
        `str`: a header, a rule, one line per score and, where pairs are missing, a note; no newline at the end.
    """
    levels = {comparison.confidence for comparison in comparisons}
    level = f"{100 * levels.pop():.4g} % " if len(levels) == 1 else ""
    rows = [("score", "trained on", "pairs", f"win rate [{level}interval]", "mean before -> after")]
    for comparison in comparisons:
        low, high = comparison.interval
        rows.append(
            (
                _shortened(comparison.name),
                "yes" if comparison.trained else "no",
                f"{comparison.num_images:5d}",
                f"{100 * comparison.win_rate:5.1f} % [{100 * low:.1f}, {100 * high:.1f}]",
                _before_after(comparison.mean_before, comparison.mean_after),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines += [
        f"{_shortened(comparison.name)}: pairs left out because a score is missing: {comparison.num_missing}"
        for comparison in comparisons
        if comparison.num_missing
    ]
    return "\n".join(lines)


def _check(name: str, lengths: tuple[int, int, int], num_resamples: int, confidence: float) -> None:
    if len(set(lengths)) > 1:
        raise ValueError(
            f"The score {name!r} has {lengths[0]} values before, {lengths[1]} after and {lengths[2]} prompts; "
            "all three must belong to the same pairs."
        )
    if num_resamples < 1:
        raise ValueError(f"`num_resamples` is {num_resamples}; it must be at least 1.")
    if not 0 < confidence < 1:
        raise ValueError(f"`confidence` is {confidence}; it must lie between 0 and 1, for example 0.95.")


def _as_array(values: Sequence[float | None], name: str, side: str) -> np.ndarray:
    """Return float64 values (N,) with NaN for None; a NaN or infinity among the values themselves is an error."""
    array = np.array(values, dtype=np.float64)
    bad = [i for i in np.flatnonzero(~np.isfinite(array)).tolist() if values[i] is not None]
    if bad:
        rows = ", ".join(f"row {i}: {values[i]}" for i in bad[:3])
        raise ValueError(
            f"The score {name!r} is NaN or infinite in {len(bad)} of {array.size} values {side} ({rows}). "
            "Use None for one that could not be scored."
        )
    return array


def clusters_of(prompts: Sequence[str]) -> np.ndarray:
    """Return the cluster of each image, (N,) from 0 without gaps: its prompt, or itself if all have one prompt."""
    groups: dict[str, int] = {}
    numbers = np.array([groups.setdefault(prompt, len(groups)) for prompt in prompts])
    return numbers if len(groups) > 1 else np.arange(len(prompts))


def bootstrap_means(
    quantities: Sequence[np.ndarray], clusters: np.ndarray, num_resamples: int, seed: int
) -> np.ndarray:
    """
    Return the means (K, R) of K quantities (N,) over the same R resamples, in which whole clusters are drawn with
    replacement; `clusters` (N,) are those of [`clusters_of`].
    """
    sizes = np.bincount(clusters).astype(np.float64)
    sums = [np.bincount(clusters, weights=values) for values in quantities]
    rng = np.random.default_rng(seed)
    means = np.empty((len(sums), num_resamples))
    rows = max(1, _BLOCK // sizes.size)
    for start in range(0, num_resamples, rows):
        # The draws depend on the number of clusters alone, so that exchanging before and after mirrors the result.
        drawn = rng.integers(sizes.size, size=(min(rows, num_resamples - start), sizes.size))
        drawn_sizes = sizes[drawn].sum(axis=1)
        for k, values in enumerate(sums):
            means[k, start : start + len(drawn)] = values[drawn].sum(axis=1) / drawn_sizes
    return means


def _sign_test(balances: np.ndarray) -> float:
    """Return the exact two-sided p-value of the signs of (N,) numbers, zeros left out."""
    gains, falls = int((balances > 0).sum()), int((balances < 0).sum())
    term = tail = 1
    for k in range(min(gains, falls)):
        term = term * (gains + falls - k) // (k + 1)
        tail += term
    # Integers, because 2 ** 3200 is more than a float holds.
    return min(1.0, 2 * tail / 2 ** (gains + falls)) if gains + falls else 1.0


def _plain(value: Any) -> Any:
    """Return the value with NumPy numbers and paths as plain Python, and None in place of NaN and infinity."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _shortened(text: str) -> str:
    return text if len(text) <= 26 else text[:23] + "..."


def _before_after(before: float, after: float) -> str:
    """Return both numbers with as many decimals as show four digits of the larger and two of the change."""
    largest, change = max(abs(before), abs(after)), abs(after - before)
    if not 1e-4 <= largest < 1e7:
        return f"{before:.4g} -> {after:.4g}"
    leading = math.floor(math.log10(largest))
    decimals = 3 - leading
    if change > 0:
        decimals = max(decimals, 1 - math.floor(math.log10(change)))
    decimals = min(max(decimals, 0), 7 - max(leading, 1))
    return f"{before:.{decimals}f} -> {after:.{decimals}f}"
