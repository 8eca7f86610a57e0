"""`tgol label`, the dry run: what labels and weights training would see, without a model."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import plain_errors, set_up_logging

if TYPE_CHECKING:
    from tgol_trainer.data.advice import Advice
    from tgol_trainer.data.report import GroupReport, LabelReport
    from tgol_trainer.data.scores import ScoredRows

_NOT_FROM_A_FILE = {"output_dir", "config", "help"}
_BAR = 40
# Settings of training that change labels or weights, to the values whose effect is shown here.
_ALONE: dict[str, tuple[Any, ...]] = {
    "threshold_strategy": ("global", "fixed"),
    "weight_form": ("linear",),
    "normalize_weights": (False,),
    "desirable_weight": (1, 1.0),
    "undesirable_weight": (1, 1.0),
    "dead_zone": (0, 0.0),
}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in ("true", "yes", "1")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tgol label",
        description="Show the labels and weights that `tgol train` would make of a dataset with the same flags. No "
        "model is loaded and no image is read.",
    )
    parser.add_argument("--config", type=Path, help="settings file of `tgol train`; what is no flag here is ignored")
    parser.add_argument("--dataset_name", help="Hub id, folder, or a CSV, JSON Lines or Parquet file")
    parser.add_argument("--dataset_config", help="configuration of a dataset on the Hub")
    parser.add_argument("--dataset_train_split", default="train", help="default: %(default)s")
    parser.add_argument(
        *("--dataset_streaming",), nargs="?", const=True, default=False, type=_boolean, help="default: %(default)s"
    )
    parser.add_argument("--proxy_dataset_name", help="dataset whose scores give the threshold instead")
    parser.add_argument("--prompt_column", default="prompt", help="default: %(default)s")
    parser.add_argument("--score_column", default="score", help="default: %(default)s")
    parser.add_argument("--score_columns", nargs="+", help="two or more columns that make one score, instead")
    parser.add_argument("--score_weights", nargs="+", type=float, help="weight of each of them (default: 1)")
    parser.add_argument("--score_combination", choices=("sum", "min"), default="sum", help="default: %(default)s")
    parser.add_argument("--group_column", help="column by which labels are counted as well, such as a style")
    parser.add_argument("--threshold", type=float, help="a fixed τ, in normalised score units")
    parser.add_argument("--threshold_percentile", type=float, default=50.0, help="default: %(default)s, the median")
    parser.add_argument(
        "--score_normalization", choices=("none", "zscore", "robust"), default="none", help="default: %(default)s"
    )
    parser.add_argument(
        "--confidence_scale", type=float, default=5.0, help="c in 1 + c·|s - τ| (default: %(default)s)"
    )
    parser.add_argument("--max_threshold_samples", type=int, help="streams only: rows read; default: all")
    parser.add_argument("--on_bad_sample", choices=("raise", "skip"), default="raise", help="default: %(default)s")
    parser.add_argument(
        *("--output_dir",), type=Path, default=Path("label_output"), help="for label.json and score_histogram.png"
    )
    return parser


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    known = {action.dest for action in parser._actions}
    path = parser.parse_known_args(argv)[0].config
    if path is not None:
        parser.set_defaults(**_settings(path, known - _NOT_FROM_A_FILE))
    args = parser.parse_args(argv)
    if args.dataset_name is None:
        raise SystemExit("error: --dataset_name is needed: a Hub id, a folder, or a CSV, JSONL or Parquet file.")
    if not 0 <= args.threshold_percentile <= 100:
        raise SystemExit(f"error: --threshold_percentile must lie between 0 and 100, got {args.threshold_percentile}.")
    if not (math.isfinite(args.confidence_scale) and args.confidence_scale >= 0):
        raise SystemExit(f"error: --confidence_scale must be at least 0 and finite, got {args.confidence_scale}.")
    if args.threshold is not None and not math.isfinite(args.threshold):
        raise SystemExit(f"error: --threshold must be finite, got {args.threshold}.")
    if args.threshold is not None and args.proxy_dataset_name:
        raise SystemExit("error: --proxy_dataset_name and a fixed --threshold both set τ: leave one out.")
    if args.max_threshold_samples is not None and args.max_threshold_samples < 1:
        raise SystemExit(f"error: --max_threshold_samples must be at least 1, got {args.max_threshold_samples}.")
    _check_columns(args)
    return args


def _check_columns(args: argparse.Namespace) -> None:
    from tgol_trainer.thresholds import check_combination

    try:
        check_combination(args.score_columns, args.score_weights, args.score_combination)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if args.score_columns and args.score_column != "score":
        raise SystemExit("error: --score_column and --score_columns both name the scores: leave one out.")
    if args.score_combination == "min" and (args.threshold is not None or args.score_normalization != "none"):
        name = "score_normalization" if args.threshold is None else "threshold"
        raise SystemExit(
            f"error: --{name} and --score_combination min cannot both decide on labels: leave --{name} out, or use "
            "--score_combination sum."
        )


def _settings(path: Path, known: set[str]) -> dict[str, Any]:
    """Return what a settings file of training says about our flags."""
    import yaml

    if not path.is_file():
        raise SystemExit(f"error: --config: there is no file {path}.")
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(values, dict):
        raise SystemExit(f"error: --config: {path} holds no settings, one `name: value` a line.")
    for name, shown in _ALONE.items():
        if values.get(name, shown[0]) not in shown:
            raise SystemExit(
                f"error: --config: {path} has `{name}: {values[name]}`, whose labels this command does not show; it "
                f"shows {' and '.join(map(repr, shown))}."
            )
    for name in set(values) - known:
        close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.9)
        if close:
            raise SystemExit(f"error: --config: {path} has {name!r}, which is no setting. Did you mean {close[0]!r}?")
    return {
        name: str(value) if isinstance(value, int | float | bool) else value
        for name, value in values.items()
        if name in known and value is not None
    }


def main(argv: Sequence[str] | None = None) -> int:
    """
    Show and save the labels of a dataset.

    Args:
        argv (`Sequence[str]`, *optional*):
            Options; by default those of the process.

    Returns:
        `int`: 0.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    import logging

    # The report says the same, and more.
    logging.getLogger("tgol_trainer.data.labels").setLevel(logging.ERROR)
    logging.getLogger("tgol_trainer.data.combining").setLevel(logging.WARNING)
    with plain_errors():
        report, rows = _report(args)
    from tgol_trainer.data.advice import advise

    advice = advise(report)
    for line in report_lines(report, advice):
        print(line)
    save_report(args.output_dir, report, advice, rows, _chosen(args))
    print(f"\nWrote {args.output_dir / 'label.json'} and {args.output_dir / 'score_histogram.png'}.")
    return 0


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in _NOT_FROM_A_FILE}


def _report(args: argparse.Namespace) -> tuple[LabelReport, ScoredRows]:
    import dataclasses

    from tgol_trainer.data import Columns, LabelSettings, fit_labelling, load_scored_dataset
    from tgol_trainer.data.combining import STREAMED_COLUMNS, check_combined, combine_columns
    from tgol_trainer.data.report import label_report
    from tgol_trainer.data.scores import read_scores
    from tgol_trainer.thresholds import ThresholdError, Weighting, combined_name

    if args.score_columns and args.dataset_streaming:
        raise ValueError(STREAMED_COLUMNS)
    several = args.score_columns
    name = combined_name(several, args.score_combination) if several else args.score_column
    columns = Columns(prompt=args.prompt_column, score=name)
    scored = several or [args.score_column]
    wanted = [args.prompt_column, *scored, *([args.group_column] if args.group_column else [])]
    dataset = load_scored_dataset(
        args.dataset_name,
        name=args.dataset_config,
        split=args.dataset_train_split,
        streaming=args.dataset_streaming,
        columns=columns,
        only=list(dict.fromkeys(wanted)),
    )
    rows = read_scores(
        dataset,
        columns,
        score_columns=several,
        group_column=args.group_column,
        on_bad_sample=args.on_bad_sample,
        scores_alone=args.dataset_streaming,  # as training makes the threshold of a stream
        limit=args.max_threshold_samples if args.dataset_streaming and not args.proxy_dataset_name else None,
    )
    proxy = None
    if args.proxy_dataset_name:
        source = load_scored_dataset(
            *(args.proxy_dataset_name,),
            name=args.dataset_config,
            streaming=args.dataset_streaming,
            columns=columns,
            only=scored,
        )
        options: dict[str, Any] = {"on_bad_sample": args.on_bad_sample, "scores_alone": True, "name": "proxy_dataset"}
        options["score_columns"] = several
        proxy = read_scores(source, columns, **options).scores
    combination = None
    if several:
        rule = (several, args.score_weights, args.score_combination, args.threshold_percentile)
        combination = combine_columns(rows.scores if proxy is None else proxy, *rule)
        rows = dataclasses.replace(rows, scores=combination(rows.scores))
        proxy = None if proxy is None else combination(proxy)
    smallest = args.score_combination == "min"
    try:
        if combination is not None:
            check_combined(rows.scores, combination)
        labelling = fit_labelling(
            rows.scores if proxy is None else proxy,
            rows.scores,
            LabelSettings(
                percentile=args.threshold_percentile,
                fixed=0.0 if smallest else args.threshold,
                normalization=args.score_normalization,
                strategy="fixed" if smallest or args.threshold is not None else "global",
                weighting=Weighting(scale=args.confidence_scale),
            ),
            proxy=proxy is not None,
        )
    except ThresholdError as error:
        raise ThresholdError(f"Column {name!r}: {error}") from None
    report = label_report(
        rows,
        dataclasses.replace(labelling, combination=combination),
        prompt_column=args.prompt_column,
        score_column=name,
        group_column=args.group_column,
        confidence_scale=args.confidence_scale,
        source=proxy,
    )
    return report, rows


def save_report(
    folder: Path, report: LabelReport, advice: list[Advice], rows: ScoredRows, settings: dict[str, Any]
) -> None:
    """Write `label.json` and `score_histogram.png`."""
    import dataclasses

    from tgol_trainer.evaluation import save_score_histogram

    folder.mkdir(parents=True, exist_ok=True)
    values = {"settings": settings, **report.to_dict(), "advice": [dataclasses.asdict(item) for item in advice]}
    text = json.dumps(values, indent=2, ensure_ascii=False, default=str)
    (folder / "label.json").write_text(text + "\n", encoding="utf-8")
    save_score_histogram(
        *(folder / "score_histogram.png", rows.scores, report.raw_threshold),
        name=report.score_column,
        confidence_scale=report.confidence_scale / report.labelling.normalization.scale,
    )


def report_lines(report: LabelReport, advice: list[Advice] | None = None) -> list[str]:
    """
    Return the report as lines for a terminal.

    Args:
        report ([`LabelReport`]):
            The dry run.
        advice (`list[Advice]`, *optional*):
            Printed last.
    """
    threshold, weights, unit = report.labelling.threshold, report.labelling.weights, report.labelling.normalization
    total, scores, left_out = threshold.num_scores, report.scores, report.num_rows - threshold.num_scores
    normalised = (
        "" if unit.method == "none" else f" in {unit.method} units, {report.raw_threshold:.6g} in the column's"
    )
    lines = [
        f"Rows       {total:,} labelled" + (f", {left_out:,} left out: {_counts(report.dropped)}" if left_out else "")
    ]
    lines.append(
        f"Scores     {report.score_column}: {scores.min:.6g} to {scores.max:.6g}, mean {scores.mean:.6g}, standard "
        f"deviation {scores.std:.4g}, {scores.num_distinct:,} different values"
    )
    if report.labelling.combination is not None:
        from tgol_trainer.data.combining import combination_lines

        lines += [f"           {line}" for line in combination_lines(report.labelling.combination)]
    lines.append(f"Threshold  τ = {threshold.value:.6g}{normalised} ({_origin(report)})")
    if report.interval is not None:
        lines.append(
            f"           {report.interval.level:.0%} bootstrap interval {report.interval.low:.6g} to "
            f"{report.interval.high:.6g}; {report.num_flips:,} labels ({report.num_flips / total:.1%}) change inside"
        )
    lines.append(
        f"Labels     {threshold.num_positive:,} positive ({threshold.num_positive / total:.1%}), "
        f"{threshold.num_negative:,} negative; {threshold.num_ties:,} tied with τ, which count as positive"
    )
    if weights is not None:
        spread = ", ".join(f"{weight:.3g}" for weight in report.weight_percentiles.values())
        lines.append(
            f"Weights    1 + {report.confidence_scale:g}·|s - τ|: mean {weights.mean:.4g}, max {weights.max:.4g}; the "
            f"largest 1 % carry {weights.top_1_percent_share:.1%} of the weight"
        )
        lines.append(f"           percentiles {', '.join(report.weight_percentiles)}: {spread}")
    lines += _group_lines("Prompts", report.prompts, names=False)
    if report.groups is not None:
        lines += _group_lines("Groups", report.groups, names=True)
    lines += ["", *histogram_lines(report), "", *_example_lines(report)]
    for item in advice or []:
        wrapped = textwrap.wrap(f"{item.text}", 112, initial_indent="  * ", subsequent_indent="    ")
        lines += ["", "Advice"] if item is (advice or [])[0] else []
        lines += [*wrapped, *textwrap.wrap(f"→ {item.flag}", 112, initial_indent="    ", subsequent_indent="      ")]
    return lines


def _counts(dropped: dict[str, int]) -> str:
    return ", ".join(f"{cause} {count:,}" for cause, count in dropped.items())


def _origin(report: LabelReport) -> str:
    threshold = report.labelling.threshold
    combination = report.labelling.combination
    if combination is not None and combination.method == "min":
        return "reached where every column reaches its own"
    if threshold.percentile is None:
        return "fixed"
    which = "median" if threshold.percentile == 50 else f"{threshold.percentile:g}th percentile"
    source = " of the proxy scores" if threshold.source == "proxy" else ""
    return which + source + (", moved off the smallest score" if threshold.moved_from is not None else "")


def _group_lines(title: str, part: GroupReport, *, names: bool) -> list[str]:
    label = f"{title:<11}"
    lines = [f"{label}{part.num_groups:,} different, {part.num_several:,} of them with several rows"]
    if part.num_several:
        lines.append(
            f"           of those, {part.num_positive_only:,} have positive labels alone, {part.num_negative_only:,} "
            f"negative alone: {part.one_sided_share:.0%}, by chance {part.one_sided_by_chance:.0%}"
        )
    if part.between_share is not None and part.num_groups > 1:
        lines.append(f"           {part.between_share:.0%} of the variance of the scores lies between them")
    if names:
        width = min(40, max(len(_short(group.name)) for group in part.largest))
        lines.append(f"           {'':<{width}}  {'rows':>10}  {'positive':>8}  {'mean':>10}  {'τ':>10}")
        for group in part.largest:
            lines.append(
                f"           {_short(group.name):<{width}}  {group.num_rows:>10,}  "
                f"{group.num_positive / group.num_rows:>8.1%}  {group.mean:>10.4g}  {group.threshold:>10.4g}"
            )
        if part.num_groups > len(part.largest):
            lines.append(f"           ... and {part.num_groups - len(part.largest):,} more")
    return lines


def histogram_lines(report: LabelReport) -> list[str]:
    """Return the scores as bars of text, with the place of τ."""
    tau, bars = report.raw_threshold, report.histogram
    labels = [f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}" for low, high, _ in bars]
    width, largest = max(map(len, labels)), max(count for *_, count in bars)
    # The bar that τ lies in, or the first one above it.
    marked = next((index for index, (_, high, _) in enumerate(bars) if tau <= high), len(bars) - 1)
    return [
        f"  {label:>{width}}  {'█' * math.ceil(_BAR * count / largest):<{_BAR}} {count:>10,}"
        + ("  ← τ" if index == marked else "")
        for index, (label, (*_, count)) in enumerate(zip(labels, bars, strict=True))
    ]


def _example_lines(report: LabelReport) -> list[str]:
    width = max(len(f"{example.row}") for example in report.examples)
    return [
        f"  {example.place:<14} row {example.row:>{width}}  {example.score:>10.5g}  "
        f"{'positive' if example.positive else 'negative'}  weight {example.weight:<7.4g} {_short(example.prompt, 60)}"
        for example in report.examples
    ]


def _short(text: str | None, length: int = 40) -> str:
    if text is None:
        return "(missing)"
    text = " ".join(text.split())
    text = "".join(character if character.isprintable() else "\ufffd" for character in text)
    return text if len(text) <= length else text[: length - 1] + "…"
