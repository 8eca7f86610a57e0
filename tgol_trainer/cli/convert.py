"""`tgol convert`: convert comparisons, ratings or thumbs to Parquet files with one scored row per image."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .console import counted, hide_local_bars, plain_errors, set_up_logging
from .label_text import histogram_lines

if TYPE_CHECKING:
    from tgol_trainer.converters.base import Conversion


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("source", help="Hub id, folder, or a CSV, JSON Lines or Parquet file")
    common.add_argument("--output_dir", required=True, type=Path, help="folder for `data/train-*.parquet`")
    common.add_argument("--split", default="train", help="split to read (default: %(default)s)")
    common.add_argument("--dataset_config", help="configuration, for a dataset on the Hub that has several")
    text = "rows that cannot be used: list them and stop, or leave them out (default: %(default)s)"
    common.add_argument("--on_bad_sample", choices=("raise", "skip"), default="raise", help=text)
    common.add_argument("--rows_per_shard", type=int, help="images per file (default: about 500 MB per file)")
    parser = argparse.ArgumentParser(prog="tgol convert", description="Make one scored row per image.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="pairs|ratings|thumbs")
    pairs = kinds.add_parser("pairs", parents=[common], help="comparisons of two images")
    methods = ("wins", "win_rate", "bradley_terry")
    pairs.add_argument(
        "--method", choices=methods, default="wins", help="how to score an image (default: %(default)s)"
    )
    for role in ("prompt", "first", "second", "choice"):
        pairs.add_argument(f"--{role}_column", help="default: the usual names in docs/converting.md")
    pairs.add_argument("--uid_columns", nargs=2, metavar=("FIRST", "SECOND"), help="ids of the images")
    text = "set it if choices are numbers: 1 means that the first image won (share) or the second (index)"
    pairs.add_argument("--choice_numbers", choices=("share", "index"), help=text)
    text = "λ of bradley_terry; a larger value pulls strengths to 0 (default: %(default)s)"
    pairs.add_argument("--regularization", type=float, default=0.1, help=text)
    for kind, column, text in (("ratings", "rating", "ratings"), ("thumbs", "thumbs", "thumbs up or down")):
        sub = kinds.add_parser(kind, parents=[common], help=text)
        sub.add_argument(f"--{column}_column", dest="rating_column", required=True, help=f"column of {text}")
        sub.add_argument("--image_column", default="image", help="default: %(default)s")
        sub.add_argument("--prompt_column", default="prompt", help="default: %(default)s")
        sub.add_argument("--annotator_column", help="who rated; an annotator counts once per image")
        sub.add_argument("--uid_column", help="ids of the images")
    args = parser.parse_args(argv)
    if args.rows_per_shard is not None and args.rows_per_shard < 1:
        parser.error("--rows_per_shard must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """
    Convert a dataset.

    Args:
        argv (`Sequence[str]`, *optional*): Options; by default those of the process.

    Returns:
        `int`: 0.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    from tgol_trainer.converters.files import write_shards
    from tgol_trainer.data import DataError

    with plain_errors():
        if Path(args.source).expanduser().resolve() == args.output_dir.expanduser().resolve():
            raise DataError(
                f"`output_dir`: {args.output_dir} is the source, which the result would then be a part of. Give "
                "another `--output_dir`."
            )
        data = args.output_dir / "data"
        if data.is_dir() and any(data.iterdir()):
            raise DataError(f"`output_dir`: {data} holds files already. Give another `--output_dir`.")
        try:
            conversion = _convert(args)
        except ImportError as error:
            if args.kind == "pairs" and args.method == "bradley_terry":
                raise SystemExit(f"error: {error}") from error
            raise
        num_files = write_shards(conversion.dataset, data, args.rows_per_shard)
    for line in _report(args.kind, conversion):
        print(line)
    print(f"Wrote {counted(num_files, 'file')} to {data}. Train: `--dataset_name {args.output_dir}`.")
    return 0


def _convert(args: argparse.Namespace) -> Conversion:
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.converters.base import Source
    from tgol_trainer.converters.files import image_root
    from tgol_trainer.converters.pairs import PairColumns, convert_pairs
    from tgol_trainer.converters.ratings import RatingColumns, convert_ratings
    from tgol_trainer.data import Columns
    from tgol_trainer.sources import load_scored_dataset

    hide_local_bars(args.source)
    resolved = (
        Columns(image=args.image_column) if args.kind != "pairs" and args.image_column != "prompt" else Columns()
    )
    dataset = load_scored_dataset(args.source, name=args.dataset_config, split=args.split, columns=resolved)
    disable_progress_bar()  # ours follow, one after the other
    source = Source(dataset, image_root(args.source, args.split), args.on_bad_sample, "source")
    if args.kind == "pairs":
        uids = tuple(args.uid_columns) if args.uid_columns else None
        pairs = PairColumns(args.prompt_column, args.first_column, args.second_column, args.choice_column, uids)
        return convert_pairs(source, pairs, args.method, args.choice_numbers, args.regularization)
    names = (args.rating_column, args.image_column, args.prompt_column, args.annotator_column, args.uid_column)
    return convert_ratings(source, RatingColumns(*names), thumbs=args.kind == "thumbs")


def _report(kind: str, conversion: Conversion) -> list[str]:
    import numpy as np

    from tgol_trainer.labels.report import score_bars
    from tgol_trainer.thresholds import ThresholdError, estimate_threshold

    scores = np.array(conversion.dataset["score"], dtype=np.float64)
    used = counted(conversion.num_used, {"pairs": "comparison", "ratings": "rating", "thumbs": "vote"}[kind])
    ties = f" ({counted(conversion.num_ties, 'tie')})" if kind == "pairs" else ""
    rows = f"{counted(conversion.num_rows, 'row')}, {conversion.num_dropped} left out"
    lines = [
        f"{rows}; {used}{ties} of {counted(len(scores), 'image')}.",
        "Scores:",
        *histogram_lines(score_bars(np.sort(scores))),
    ]
    try:
        threshold = estimate_threshold(scores)
    except ThresholdError as error:
        return [*lines, f"No threshold divides these scores: {error}"]
    median = float(np.median(scores))
    if threshold.moved_from is None:
        return [*lines, f"The median is {median:.6g}, above the minimum {scores.min():.6g}: training takes it as τ."]
    return [
        *lines,
        f"The median equals the minimum, {median:.6g}. Training moves τ to {threshold.value:.6g}, the midpoint:",
        f"  {threshold.num_positive} positive, {threshold.num_negative} negative.",
    ]
