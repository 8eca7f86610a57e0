"""Write the report of `tgol label` as lines for a terminal; also for the quickstart and the converters."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tgol_trainer.labels.advice import Advice
    from tgol_trainer.labels.report import GroupReport, LabelReport

_BAR = 40


def report_lines(report: LabelReport, advice: list[Advice] | None = None) -> list[str]:
    """
    Return the report as lines for a terminal.

    Args:
        report ([`LabelReport`]): The dry run.
        advice (`list[Advice]`, *optional*): Printed last.
    """
    threshold, weights = report.labeler.threshold, report.labeler.weights
    total, scores = threshold.num_scores, report.scores
    causes = dict(report.dropped)
    if report.labeler.strategy.get("num_in_dead_zone"):
        causes["in the dead zone"] = report.labeler.strategy["num_in_dead_zone"]
    left_out = report.num_rows - total
    lines = [f"Rows       {total:,} labelled" + (f", {left_out:,} left out: {_counts(causes)}" if left_out else "")]
    low, high, mean = (_shown(value, scores.std) for value in (scores.min, scores.max, scores.mean))
    lines.append(
        f"Scores     {report.score_column}: {low:.6g} to {high:.6g}, mean {mean:.6g}, standard "
        f"deviation {scores.std:.4g}, {scores.num_distinct:,} different values"
    )
    if report.labeler.combination is not None:
        from tgol_trainer.labels.combining import combination_lines

        lines += [f"           {line}" for line in combination_lines(report.labeler.combination)]
    lines += _threshold_lines(report)
    lines.append(
        f"Labels     {threshold.num_positive:,} positive, {threshold.num_negative:,} negative "
        f"({threshold.num_positive / total:.1%} positive); {threshold.num_ties:,} tied with τ, which count as positive"
    )
    if weights is not None:
        weighting = report.labeler.weighting
        spread = ", ".join(f"{weight:.3g}" for weight in report.weight_percentiles.values())
        scale = f", c = {weighting.scale:g}" if "c·" in weighting.formula else ""
        lines.append(
            f"Weights    {weighting.formula}{scale}: mean {weights.mean:.4g}, max {weights.max:.4g}; the largest 1 % "
            f"carry {weights.top_1_percent_share:.1%} of the weight"
        )
        lines.append(f"           percentiles {', '.join(report.weight_percentiles)}: {spread}")
    lines += _group_lines("Prompts", report.prompts)
    if report.groups is not None:
        lines += _group_lines("Groups", report.groups, scores.std)
    one = report.raw_threshold if report.labeler.rows is None else None
    lines += ["", *histogram_lines(report.histogram, one), "", *_example_lines(report)]
    for item in advice or []:
        wrapped = textwrap.wrap(f"{item.text}", 112, initial_indent="  * ", subsequent_indent="    ")
        lines += ["", "Advice"] if item is (advice or [])[0] else []
        lines += [*wrapped, *textwrap.wrap(f"→ {item.flag}", 112, initial_indent="    ", subsequent_indent="      ")]
    return lines


def _shown(value: float, spread: float) -> float:
    from tgol_trainer.thresholds import shown  # not for `--help`: NumPy

    return shown(value, spread)


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count:,}" for cause, count in dropped.items())


def _threshold_lines(report: LabelReport) -> list[str]:
    threshold, unit, unsure = report.labeler.threshold, report.labeler.normalization, report.uncertainty
    facts, total = report.labeler.strategy, threshold.num_scores
    spread = report.labeler.score_std
    raw = _shown(report.raw_threshold, report.scores.std)
    normalised = "" if unit.method == "none" else f" in {unit.method} units, {raw:.6g} in the column's"
    lines = [f"Threshold  τ = {_shown(threshold.value, spread):.6g}{normalised} ({_origin(report)})"]
    if facts["name"] == "group":
        lines.append(
            f"           each of {facts['num_groups']:,} groups has its own, of which its {facts['statistic']} counts "
            f"{facts['mean_reliability']:.0%} on average and the τ above the rest"
        )
    elif facts["name"] == "oracle":
        lines.append(
            f"           each row has its own: β_r·log mean exp(score/β_r) of the others of its prompt, β_r = "
            f"{facts['beta']:.4g}, {facts['num_groups']:,} prompts; τ above where there is one sample"
        )
    if unsure is None:
        return lines
    flips = f"{unsure.num_flips:,} labels ({unsure.num_flips / total:.1%})"
    if unsure.interval is None:
        about = "" if facts["num_groups"] <= 2000 else "about "
        lines.append(
            f"           95% bootstrap intervals of the groups' own τ, resampled within groups: median width "
            f"{unsure.median_width:.4g}; {about}{flips} change inside theirs"
        )
        return lines
    ends = " to ".join(f"{_shown(end, spread):.6g}" for end in (unsure.interval.low, unsure.interval.high))
    if unsure.of == "running":
        lines += [
            "           training starts at that of the last scores read; 95% of the τ that the first rows then meet",
            f"           lie in {ends}, {flips} between; what follows is by the percentile of all",
        ]
    else:
        lines.append(f"           {unsure.interval.level:.0%} bootstrap interval {ends}; {flips} change inside")
    return lines


def _origin(report: LabelReport) -> str:
    threshold = report.labeler.threshold
    combination = report.labeler.combination
    if combination is not None and combination.method == "min":
        return "reached where every column reaches its own"
    if threshold.percentile is None:
        return "fixed"
    which = "median" if threshold.percentile == 50 else f"{threshold.percentile:g}th percentile"
    if report.labeler.strategy.get("statistic") == "mean":
        which = "mean"
    source = " of the proxy scores" if threshold.source == "proxy" else ""
    return which + source + (", moved off the smallest score" if threshold.moved_from is not None else "")


def _group_lines(title: str, part: GroupReport, spread: float | None = None) -> list[str]:
    """Return what is said of groups; with the standard deviation of the scores also a table of the largest."""
    label = f"{title:<11}"
    lines = [f"{label}{part.num_groups:,} different, {part.num_several:,} of them with several rows"]
    if part.num_several:
        lines.append(
            f"           of those, {part.num_positive_only:,} have positive labels alone, {part.num_negative_only:,} "
            f"negative alone: {part.one_sided_share:.0%}, by chance {part.one_sided_by_chance:.0%}"
        )
    if part.between_share is not None and part.num_groups > 1:
        lines.append(f"           {part.between_share:.0%} of the variance of the scores lies between them")
    if spread is not None:
        width = min(40, max(len(_short(group.name)) for group in part.largest))
        lines.append(f"           {'':<{width}}  {'rows':>10}  {'positive':>8}  {'mean':>10}  {'τ':>10}")
        for group in part.largest:
            lines.append(
                f"           {_short(group.name):<{width}}  {group.num_rows:>10,}  "
                f"{group.num_positive / group.num_rows:>8.1%}  {_shown(group.mean, spread):>10.4g}  "
                f"{_shown(group.threshold, spread):>10.4g}"
            )
        if part.num_groups > len(part.largest):
            lines.append(f"           ... and {part.num_groups - len(part.largest):,} more")
    return lines


def histogram_lines(bars: Sequence[tuple[float, float, int]], threshold: float | None = None) -> list[str]:
    """
    Return scores as bars of text.

    Args:
        bars (`Sequence[tuple[float, float, int]]`): (low, high, count), see [`score_bars`].
        threshold (`float`, *optional*): τ, whose place is marked.
    """
    spread = bars[-1][1] - bars[0][0]
    pairs = [(_shown(low, spread), _shown(high, spread)) for low, high, _ in bars]
    labels = [f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}" for low, high in pairs]
    width, largest = max(map(len, labels)), max(count for *_, count in bars)
    marked = None
    if threshold is not None:  # the bar that τ lies in, or the first one above it
        marked = next((index for index, (_, high, _) in enumerate(bars) if threshold <= high), len(bars) - 1)
    return [
        f"  {label:>{width}}  {'█' * math.ceil(_BAR * count / largest):<{_BAR}} {count:>10,}"
        + ("  ← τ" if index == marked else "")
        for index, (label, (*_, count)) in enumerate(zip(labels, bars, strict=True))
    ]


def _example_lines(report: LabelReport) -> list[str]:
    width = max(len(f"{example.row}") for example in report.examples)
    return [
        f"  {example.place:<14} row {example.row:>{width}}  {_shown(example.score, report.scores.std):>10.5g}  "
        f"{'positive' if example.positive else 'negative'}  weight {example.weight:<7.4g} {_short(example.prompt, 60)}"
        for example in report.examples
    ]


def _short(text: str | None, length: int = 40) -> str:
    if text is None:
        return "(missing)"
    text = " ".join(text.split())
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= length else text[: length - 1] + "…"
