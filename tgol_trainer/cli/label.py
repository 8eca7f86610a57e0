"""`tgol label`: show the labels and weights that training would use, without a model."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from .console import FOLDER_SCORES, plain_errors, read_settings, set_up_logging
from .label_text import report_lines

if TYPE_CHECKING:
    import numpy as np

    from tgol_trainer.labels.advice import Advice
    from tgol_trainer.labels.report import LabelReport

_NOT_FROM_A_FILE = {"output_dir", "config", "help"}


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
        raise argparse.ArgumentTypeError(f"must be true or false, got {text!r}")
    return text.lower() in ("true", "yes", "1")


def _parser() -> argparse.ArgumentParser:
    from tgol_trainer.config import MethodArguments

    from .recipes import RECIPE_HELP

    parser = argparse.ArgumentParser(
        prog="tgol label",
        description="Show the labels and weights that `tgol train` would make of a dataset with the same flags. No "
        "model is loaded and no image is read.",
    )
    parser.add_argument(
        "--config", type=Path, help="settings file of `tgol train`; settings that are not flags here are ignored"
    )
    parser.add_argument("--dataset_name", help="Hub id, folder, or a CSV, JSON Lines or Parquet file")
    parser.add_argument("--dataset_config", help="configuration of a dataset on the Hub")
    parser.add_argument("--dataset_train_split", default="train", help="default: %(default)s")
    parser.add_argument("--folder_scores", nargs="?", const=True, default=False, type=_boolean, help=FOLDER_SCORES)
    parser.add_argument(
        *("--dataset_streaming",), nargs="?", const=True, default=False, type=_boolean, help="default: %(default)s"
    )
    parser.add_argument(
        "--proxy_dataset_name", help="dataset whose scores set the threshold, instead of the training scores"
    )
    parser.add_argument("--prompt_column", default="prompt", help="default: %(default)s")
    parser.add_argument("--prompt_syntax", choices=("keep", "strip"), default="keep", help="default: %(default)s")
    parser.add_argument("--score_column", default="score", help="default: %(default)s")
    parser.add_argument("--on_bad_sample", choices=("raise", "skip"), default="raise", help="default: %(default)s")
    parser.add_argument(
        *("--output_dir",),
        type=Path,
        default=Path("label_output"),
        help="folder for label.json and score_histogram.png (default: %(default)s)",
    )
    parser.add_argument("--recipe", default="paper", help=f"{RECIPE_HELP} Default: %(default)s.")
    _add_fields(
        parser.add_argument_group("the method, as in `tgol train`; some of it says nothing about labels"),
        MethodArguments,
    )
    return parser


def _add_fields(group: argparse._ArgumentGroup, owner: type) -> None:
    """Add a flag for each field of a dataclass of settings, with its help and default."""
    types = get_type_hints(owner)
    for item in dataclasses.fields(owner):
        kind = types[item.name]
        if type(None) in get_args(kind):
            kind = next(part for part in get_args(kind) if part is not type(None))
        options: dict[str, Any] = {"type": kind}
        if get_origin(kind) is Literal:
            options = {"choices": get_args(kind)}
        elif get_origin(kind) is list:
            options = {"type": get_args(kind)[0], "nargs": "+"}
        elif kind is bool:
            options = {"type": _boolean, "nargs": "?", "const": True}
        factory = item.default_factory
        default = item.default if factory is dataclasses.MISSING else factory()
        text = item.metadata["help"].replace("%", "%%") + ("" if default is None else " Default: %(default)s.")
        group.add_argument(f"--{item.name}", default=default, help=text, **options)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    from .recipes import recipe_defaults

    parser = _parser()
    known = {action.dest for action in parser._actions}
    path = parser.parse_known_args(argv)[0].config
    settings = _settings(path, known - _NOT_FROM_A_FILE) if path is not None else {}
    parser.set_defaults(**recipe_defaults(argv, settings))
    parser.set_defaults(**settings)
    args = parser.parse_args(argv)
    if args.dataset_name is None:
        raise SystemExit("error: --dataset_name is needed: a Hub id, a folder, or a CSV, JSONL or Parquet file.")
    return args


def _settings(path: Path, known: set[str]) -> dict[str, Any]:
    """Return the values of a settings file of training for the flags of this command."""
    values = read_settings(path)
    for name in set(values) - known:
        close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.9)
        if close:
            raise SystemExit(
                f"error: --config: {path} has {name!r}, which is not a setting. Did you mean {close[0]!r}?"
            )
    return {
        name: str(value) if isinstance(value, int | float | bool) else value
        for name, value in values.items()
        if name in known and value is not None
    }


def main(argv: Sequence[str] | None = None) -> int:
    """
    Show and save the labels of a dataset.

    Args:
        argv (`Sequence[str]`, *optional*): Options; by default those of the process.

    Returns:
        `int`: 0.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    import logging

    # The report says the same, and more.
    logging.getLogger("tgol_trainer.labels.fitting").setLevel(logging.ERROR)
    logging.getLogger("tgol_trainer.labels.combining").setLevel(logging.WARNING)
    with plain_errors():
        report, scores = _report(args)
    from tgol_trainer.labels.advice import advise

    advice = advise(report, can_compare=_can_compare(args))
    for line in report_lines(report, advice):
        print(line)
    with plain_errors():
        save_report(args.output_dir, report, advice, scores, _chosen(args))
    print(f"\nWrote {args.output_dir / 'label.json'} and {args.output_dir / 'score_histogram.png'}.")
    return 0


def _can_compare(args: argparse.Namespace) -> bool:
    """Whether the recipe `anchored` is not used and would be accepted."""
    plain = args.loss_type == "tgol" and args.score_combination == "sum"
    return plain and not args.dataset_streaming and args.threshold_strategy == "global" and args.threshold is None


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in _NOT_FROM_A_FILE}


def _report(args: argparse.Namespace) -> tuple[LabelReport, np.ndarray]:
    from tgol_trainer.config import MethodArguments
    from tgol_trainer.data import Columns
    from tgol_trainer.data.scores import read_scores
    from tgol_trainer.labels.dry_run import dry_run
    from tgol_trainer.labels.training import check_sources
    from tgol_trainer.sources.loading import load_columns
    from tgol_trainer.thresholds import combined_name

    values = {item.name: getattr(args, item.name) for item in dataclasses.fields(MethodArguments)}
    counted = values.pop("group_column")  # labels are counted by it, also where training does not use groups
    method = MethodArguments(**values)
    if method.uses_groups:
        method.group_column = counted
    method.check_method(method.group_size or 1)
    check_sources(method, proxy_dataset=args.proxy_dataset_name, streamed=args.dataset_streaming)
    if method.score_columns and args.score_column != "score":
        raise ValueError("`score_column` and `score_columns` both name the scores: leave one out.")
    several = method.score_columns
    name = combined_name(several, method.score_combination) if several else args.score_column
    columns = Columns(prompt=args.prompt_column, score=name, prompt_syntax=args.prompt_syntax)
    scored = several or [args.score_column]
    grouped = method.threshold_strategy in ("group", "oracle")
    group = counted or (args.prompt_column if grouped else None)
    wanted = dict.fromkeys([args.prompt_column, *scored, *([group] if group else [])])
    where: dict[str, Any] = {"name": args.dataset_config, "streaming": args.dataset_streaming}
    dataset = load_columns(
        args.dataset_name,
        list(wanted),
        split=args.dataset_train_split,
        folder_scores=args.folder_scores,
        **where,
    )
    reading: dict[str, Any] = {"score_columns": several, "on_bad_sample": args.on_bad_sample}
    rows = read_scores(
        dataset,
        columns,
        group_column=group,
        scores_alone=args.dataset_streaming,  # as training makes the threshold of a stream
        limit=method.max_threshold_samples if args.dataset_streaming and not args.proxy_dataset_name else None,
        **reading,
    )
    proxy = None
    if args.proxy_dataset_name:
        source = load_columns(args.proxy_dataset_name, [*scored, *([group] if grouped and group else [])], **where)
        group_column = group if grouped else None
        alone: dict[str, Any] = {"group_column": group_column, "scores_alone": True, "name": "proxy_dataset"}
        proxy = read_scores(source, columns, **alone, **reading)
    return dry_run(rows, method, columns, group_column=group, proxy=proxy)


def save_report(
    folder: Path, report: LabelReport, advice: list[Advice], scores: np.ndarray, settings: dict[str, Any]
) -> None:
    """Write `label.json` and `score_histogram.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"settings": settings, **report.to_dict(), "advice": [dataclasses.asdict(item) for item in advice]}
    text = json.dumps(values, indent=2, ensure_ascii=False, default=str)
    (folder / "label.json").write_text(text + "\n", encoding="utf-8")
    save_label_histogram(folder / "score_histogram.png", report, scores)


def save_label_histogram(path: Path, report: LabelReport, scores: np.ndarray) -> None:
    """Draw the labels of the raw scores (N,) that were labelled, and their weights as an outline."""
    from tgol_trainer.evaluation import save_score_histogram

    labeler = report.labeler
    margins = None
    if labeler.rows is not None or labeler.normalization.method != "none":
        margins = labeler.normalization(scores) - (labeler.threshold.value if labeler.rows is None else labeler.rows)
    save_score_histogram(
        *(path, scores, report.raw_threshold),
        name=report.score_column,
        margins=margins,
        weighting=None if labeler.weighting.formula == "1" else labeler.weighting,
    )
