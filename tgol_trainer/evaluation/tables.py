"""Tables of an evaluation in Markdown, laid out as in the paper: a row a score, a column a model."""

from __future__ import annotations

from collections.abc import Sequence

from .comparison import Comparison
from .measures import MEASURES, SPREADS
from .results import AdapterResult, Evaluation, MeasureChange, verdict

_ESCAPED = str.maketrans({"|": "\\|", "\n": " ", "\r": " ", "<": "&lt;", ">": "&gt;", "`": "'"})


def interval_text(comparison: Comparison) -> str:
    """Return `56.2 % [49.5, 63.5]`."""
    low, high = comparison.interval
    return f"{100 * comparison.win_rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def format_measures(measures: Sequence[MeasureChange]) -> str:
    """
    Return what an adapter did to spread, saturation and the like, a line each, for a terminal.

    Args:
        measures (`Sequence[MeasureChange]`):
            Of one adapter.

    Returns:
        `str`: no newline at the end.
    """
    width = max((len(measure.name) for measure in measures), default=0)
    lines = []
    for measure in measures:
        before, after = significant(measure.mean_before, measure.mean_after)
        lines.append(f"{measure.name.ljust(width)}  {before} -> {after}  {measure.text()}")
    return "\n".join(lines)


def significant(*values: float) -> list[str]:
    """Return numbers of one unit with the decimals that show four digits of the largest."""
    largest = max(map(abs, values), default=0)
    if largest and not 1e-4 <= largest < 1e7:
        return [f"{value:.4g}" for value in values]
    decimals = 4
    while decimals and 10 ** (4 - decimals) <= largest:
        decimals -= 1
    return [f"{value:.{decimals}f}" for value in values]


def p_text(value: float) -> str:
    """Return a p-value for reading."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def format_markdown(evaluation: Evaluation, *, prompt_set: str = "") -> str:
    """
    Return the tables of an evaluation: mean and median of each model, win rates, measures, and adapters in pairs.

    Args:
        evaluation ([`Evaluation`]):
            All numbers.
        prompt_set (`str`, *optional*, defaults to `""`):
            Name of the prompts, for the first column.

    Returns:
        `str`: Markdown, ending with a newline.
    """
    adapters, names = evaluation.adapters, [adapter.name for adapter in evaluation.adapters]
    level = f"{100 * adapters[0].scores[0].confidence:.4g} %"
    introduction = (
        f"{evaluation.num_prompts} prompts, {evaluation.num_rows} images of each model, equal prompts and seeds. "
        f"Intervals: {level}, bootstrap over prompts. † the model was trained on this score."
    )
    parts = [introduction]
    parts += [f"> {_cell(notice)}" for notice in evaluation.notices]
    for title in ("mean", "median"):
        rows = []
        for i, first in enumerate(adapters[0].scores):
            values = [adapter.scores[i] for adapter in adapters]
            numbers = significant(
                getattr(first, f"{title}_before"), *(getattr(value, f"{title}_after") for value in values)
            )
            stars = ["", *(" †" if value.trained else "" for value in values)]
            rows.append([prompt_set, first.name, *(n + star for n, star in zip(numbers, stars, strict=True))])
        parts.append(_table(["Prompts", f"Score, {title}", evaluation.base, *names], rows))
    for adapter in adapters:
        rows = [_comparison_row(adapter, comparison) for comparison in adapter.scores]
        rows += [
            [f"{comparison.name}, {category}", *_comparison_row(adapter, comparison)[1:]]
            for category, found in adapter.categories.items()
            for comparison in found
        ]
        head = [f"{adapter.name} against {evaluation.base}", "Trained on", "Win rate", "Wins", "Ties", "Losses"]
        parts.append(_table([*head, "Sign test p", "Verdict"], rows))
    if any(adapter.measures for adapter in adapters):
        rows = []
        for adapter in adapters:
            for measure in adapter.measures:
                before, after = significant(measure.mean_before, measure.mean_after)
                rows.append([adapter.name, measure.name, before, after, measure.text()])
        parts.append(_table(["Model", "Measure", evaluation.base, "Model's", "Change"], rows))
        used = dict.fromkeys(measure.name for adapter in adapters for measure in adapter.measures)
        parts.append("\n".join(f"* `{name}`: {({**SPREADS, **MEASURES})[name]}" for name in used))
    if evaluation.head_to_head:
        rows = [
            [f"{two} against {one}", comparison.name, interval_text(comparison), str(comparison.ties)]
            for one, two, found in evaluation.head_to_head
            for comparison in found
        ]
        parts.append(_table(["Adapters", "Score", "Win rate", "Ties"], rows))
    return "\n\n".join(parts) + "\n"


def trained_text(adapter: AdapterResult, comparison: Comparison) -> str:
    """Return whether an adapter was trained on a score: yes, no, or not known."""
    if not adapter.trained_known:
        return "not known"
    return "yes" if comparison.trained else "no"


def _comparison_row(adapter: AdapterResult, comparison: Comparison) -> list[str]:
    return [
        comparison.name,
        trained_text(adapter, comparison),
        interval_text(comparison),
        *(str(count) for count in (comparison.wins, comparison.ties, comparison.losses)),
        p_text(comparison.sign_test),
        verdict(comparison),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.translate(_ESCAPED).split()) or "–"
