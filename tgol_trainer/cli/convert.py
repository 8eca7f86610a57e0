"""`tgol convert`: comparisons, ratings or thumbs to a folder of Parquet files with one row per image and a score."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import counted, hide_local_bars, plain_errors, set_up_logging
from .label_text import histogram_lines

if TYPE_CHECKING:
    import datasets

    from tgol_trainer.converters.base import Conversion

_SHARD_BYTES = 500_000_000
_METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("source", help="Hub id, folder, or a CSV, JSON Lines or Parquet file")
    common.add_argument("--output_dir", required=True, type=Path, help="where `data/train-*.parquet` go")
    common.add_argument("--split", default="train", help="default: %(default)s")
    common.add_argument("--dataset_config", help="configuration of a dataset on the Hub")
    common.add_argument("--on_bad_sample", choices=("raise", "skip"), default="raise", help="default: %(default)s")
    common.add_argument("--rows_per_shard", type=int, help="images a file (default: about 500 MB)")
    parser = argparse.ArgumentParser(prog="tgol convert", description="Make one row per image, with a score.")
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="pairs|ratings|thumbs")
    pairs = kinds.add_parser("pairs", parents=[common], help="comparisons of two images")
    methods = ("wins", "win_rate", "bradley_terry")
    pairs.add_argument("--method", choices=methods, default="wins", help="the score (default: %(default)s)")
    for role in ("prompt", "first", "second", "choice"):
        pairs.add_argument(f"--{role}_column", help="default: the usual names, docs/converting.md")
    pairs.add_argument("--uid_columns", nargs=2, metavar=("FIRST", "SECOND"), help="ids of the images")
    pairs.add_argument("--choice_numbers", choices=("share", "index"), help="what 1 means: first or second image won")
    pairs.add_argument("--regularization", type=float, default=0.1, help="of bradley_terry (default: %(default)s)")
    for kind, column, text in (("ratings", "rating", "ratings"), ("thumbs", "thumbs", "thumbs up or down")):
        sub = kinds.add_parser(kind, parents=[common], help=text)
        sub.add_argument(f"--{column}_column", dest="rating_column", required=True, help=f"column of {text}")
        sub.add_argument("--image_column", default="image", help="default: %(default)s")
        sub.add_argument("--prompt_column", default="prompt", help="default: %(default)s")
        sub.add_argument("--annotator_column", help="who rated; one annotator counts once an image")
        sub.add_argument("--uid_column", help="ids of the images")
    args = parser.parse_args(argv)
    if args.rows_per_shard is not None and args.rows_per_shard < 1:
        parser.error("--rows_per_shard must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """
    Convert a dataset.

    Args:
        argv (`Sequence[str]`, *optional*):
            Options; by default those of the process.

    Returns:
        `int`: 0.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    from tgol_trainer.data import DataError

    with plain_errors():
        data = args.output_dir / "data"
        if data.is_dir() and any(data.iterdir()):
            raise DataError(f"`output_dir`: {data} holds files already. Give another `--output_dir`.")
        try:
            conversion = _convert(args)
        except ImportError as error:
            if args.kind == "pairs" and args.method == "bradley_terry":
                raise SystemExit(f"error: {error}") from error
            raise
        num_files = _write(conversion.dataset, data, args.rows_per_shard)
    for line in _report(args.kind, conversion):
        print(line)
    print(f"Wrote {counted(num_files, 'file')} to {data}. Train: `--dataset_name {args.output_dir}`.")
    return 0


def _convert(args: argparse.Namespace) -> Conversion:
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.converters.pairs import pairs_conversion
    from tgol_trainer.converters.ratings import convert_ratings
    from tgol_trainer.data import Columns
    from tgol_trainer.sources import load_scored_dataset

    hide_local_bars(args.source)
    columns = Columns(image=args.image_column) if args.kind != "pairs" and args.image_column != "prompt" else Columns()
    dataset = load_scored_dataset(args.source, name=args.dataset_config, split=args.split, columns=columns)
    disable_progress_bar()  # ours follow, one after the other
    root = _image_root(Path(args.source).expanduser(), args.split)
    if args.kind == "pairs":
        roles = ("prompt_column", "first_column", "second_column", "choice_column", "choice_numbers")
        options: dict[str, Any] = {role: getattr(args, role) for role in (*roles, "method", "regularization")}
        uids = tuple(args.uid_columns) if args.uid_columns else None
        return pairs_conversion(
            dataset, **options, uid_columns=uids, image_root=root, on_bad_sample=args.on_bad_sample, name="source"
        )
    names = (args.rating_column, args.image_column, args.prompt_column, args.annotator_column, args.uid_column)
    return convert_ratings(dataset, names, root, args.on_bad_sample, "source", thumbs=args.kind == "thumbs")


def _image_root(source: Path, split: str) -> Path | None:
    """Return the folder that the paths in a table are relative to: where the table lies."""
    if source.is_file():
        return source.parent
    if not source.is_dir():
        return None
    folders = (source / split, source)
    return next((folder for folder in folders if any((folder / name).is_file() for name in _METADATA)), source)


def _write(dataset: datasets.Dataset, folder: Path, rows_per_shard: int | None) -> int:
    """Write the shards, images embedded, and return how many there are."""
    import pyarrow as pa
    from datasets import Dataset
    from datasets.table import embed_table_storage
    from tqdm.auto import tqdm

    rows = rows_per_shard or _rows_per_shard(dataset)
    num_shards = -(-len(dataset) // rows)
    folder.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(dataset), desc="Writing", unit="image") as bar:
        for shard in range(num_shards):
            part = dataset.select(range(shard * rows, min((shard + 1) * rows, len(dataset))))
            embedded = []
            for table in part.with_format("arrow").iter(16):
                embedded.append(embed_table_storage(table.cast(part.features.arrow_schema)))
                bar.update(table.num_rows)
            path = folder / f"train-{shard:05d}-of-{num_shards:05d}.parquet"
            draft = path.with_name(f".{path.name}.{os.getpid()}")
            Dataset(pa.concat_tables(embedded)).to_parquet(draft)
            os.replace(draft, path)  # a file appears whole
    return num_shards


def _rows_per_shard(dataset: datasets.Dataset) -> int:
    import numpy as np
    from datasets import Image

    sample = np.unique(np.linspace(0, len(dataset) - 1, 64).astype(int))
    sizes = []
    for index in sample:
        image = dataset.select([index]).cast_column("image", Image(decode=False))[0]["image"]
        path = image["path"] or ""
        sizes.append(len(image["bytes"]) if image["bytes"] else os.path.getsize(path) if os.path.isfile(path) else 0)
    return max(1, int(_SHARD_BYTES / max(1.0, float(np.mean(sizes)))))


def _report(kind: str, conversion: Conversion) -> list[str]:
    import numpy as np

    from tgol_trainer.labels.report import score_bars
    from tgol_trainer.thresholds import ThresholdError, estimate_threshold

    scores = np.array(conversion.dataset["score"], dtype=np.float64)
    used = counted(conversion.num_used, {"pairs": "comparison", "ratings": "rating", "thumbs": "vote"}[kind])
    ties = f" ({counted(conversion.num_ties, 'tie')})" if kind == "pairs" else ""
    skipped = sum(conversion.dropped.values())
    ordered = np.sort(scores)
    lines = [
        f"{counted(conversion.num_rows, 'row')}, {skipped} left out; {used}{ties} of {counted(len(scores), 'image')}.",
        "Scores:",
        *histogram_lines(score_bars(ordered)),
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
