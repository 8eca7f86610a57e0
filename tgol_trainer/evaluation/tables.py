"""Write the tables of an evaluation in Markdown, laid out as in the paper: one row per score, one column per model."""

from __future__ import annotations

from collections.abc import Sequence

from .comparison import Comparison
from .measures import MEASURES, SPREADS
from .results import AdapterResult, Evaluation, MeasureChange, verdict

_ESCAPED = str.maketrans({"|": "\\|", "\n": " ", "\r": " ", "<": "&lt;", ">": "&gt;", "`": "'"})


def interval_text(comparison: Comparison) -> str:
    """Return a win rate with its interval, such as `56.2 % [49.5, 63.5]`."""
    low, high = comparison.interval
    return f"{100 * comparison.win_rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


def level_text(evaluation: Evaluation) -> str:
    """Return the level of the intervals, such as `95 %`."""
    return f"{100 * evaluation.adapters[0].scores[0].confidence:.4g} %"


def format_measures(measures: Sequence[MeasureChange]) -> str:
    """Return the measures of one adapter for a terminal, one per line, without a newline at the end."""
    width = max((len(measure.name) for measure in measures), default=0)
    lines = []
    for measure in measures:
        before, after = significant(measure.mean_before, measure.mean_after)
        lines.append(f"{measure.name.ljust(width)}  {before} -> {after}  {measure.text()}")
    return "\n".join(lines)


def significant(*values: float) -> list[str]:
    """Return numbers of one unit with as many decimals as show four digits of the largest."""
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


def average_rows(evaluation: Evaluation, average: str) -> list[tuple[str, list[tuple[str, bool]]]]:
    """
    Return, for each score, its name and the `"mean"` or `"median"` of each model, the base model first, with whether
    the model was trained on the score.
    """
    rows = []
    for compared in zip(*(adapter.scores for adapter in evaluation.adapters), strict=True):
        after = [getattr(comparison, f"{average}_after") for comparison in compared]
        numbers = significant(getattr(compared[0], f"{average}_before"), *after)
        trained = [False, *(comparison.trained for comparison in compared)]
        rows.append((compared[0].name, list(zip(numbers, trained, strict=True))))
    return rows


def measure_texts(evaluation: Evaluation) -> dict[str, str]:
    """Return the names and descriptions of the measures in an evaluation."""
    names = dict.fromkeys(measure.name for adapter in evaluation.adapters for measure in adapter.measures)
    return {name: {**SPREADS, **MEASURES}[name] for name in names}


def format_markdown(evaluation: Evaluation, *, prompt_set: str = "") -> str:
    """
    Return the tables of an evaluation: mean and median of each model, win rates, measures, and adapters in pairs.

    Args:
        evaluation ([`Evaluation`]): All numbers.
        prompt_set (`str`, *optional*, defaults to `""`): Name of the prompts, for the first column.

    Returns:
        `str`: Markdown, ending with a newline.
    """
    adapters, base = evaluation.adapters, evaluation.base
    introduction = (
        f"{evaluation.num_prompts} prompts, {evaluation.num_rows} {evaluation.medium}s of each model, equal prompts "
        f"and seeds. Intervals: {level_text(evaluation)}, bootstrap over prompts. † the model was trained on this "
        "score."
    )
    parts = [introduction, *(f"> {_cell(notice)}" for notice in evaluation.notices)]
    for average in ("mean", "median"):
        rows = [
            [prompt_set, name, *(number + " †" * trained for number, trained in cells)]
            for name, cells in average_rows(evaluation, average)
        ]
        names = [adapter.name for adapter in adapters]
        parts.append(_table(["Prompts", f"Score, {average}", base, *names], rows))
    for adapter in adapters:
        rows = [_comparison_row(adapter, comparison) for comparison in adapter.scores]
        rows += [
            [f"{comparison.name}, {category}", *_comparison_row(adapter, comparison)[1:]]
            for category, found in adapter.categories.items()
            for comparison in found
        ]
        head = [f"{adapter.name} against {base}", "Trained on", "Win rate", "Wins", "Ties", "Losses"]
        parts.append(_table([*head, "Sign test p", "Verdict"], rows))
    texts = measure_texts(evaluation)
    if texts:
        rows = [
            [adapter.name, measure.name, *significant(measure.mean_before, measure.mean_after), measure.text()]
            for adapter in adapters
            for measure in adapter.measures
        ]
        parts.append(_table(["Model", "Measure", base, "Model's", "Change"], rows))
        parts.append("\n".join(f"* `{name}`: {text}" for name, text in texts.items()))
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
