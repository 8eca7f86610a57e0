"""`tgol score`: a column a reward for images or videos, in shards, over any number of processes and restarts."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from .console import add_hub_options, json_object, open_dataset, plain_errors, push_complete_dataset, set_up_logging


def _weight(text: str) -> tuple[str, float]:
    name, separator, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not separator or not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"{text!r} is no column and weight, such as pickscore=0.5")
    return name, weight


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol score",
        description="Add one column a reward to a dataset of prompts and images, or videos, and write it as Parquet "
        "shards. The same command continues after a kill.",
    )
    parser.add_argument("source", help="Hub id, folder, or a CSV, JSON Lines or Parquet file")
    parser.add_argument("--rewards", required=True, nargs="+", help="names (docs/rewards.md) or your module:function")
    parser.add_argument(
        "--weights", nargs="+", type=_weight, metavar="COLUMN=WEIGHT", help="also write their sum, column weighted_sum"
    )
    parser.add_argument(
        "--reward_options", type=json_object, help="JSON, by reward, of what load_reward takes: source, revision, ..."
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="where the shards go")
    parser.add_argument(
        "--streaming", action="store_true", help="read Parquet files one by one, also of the Hub, without a copy"
    )
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--prompt_column", default="prompt", help="default: %(default)s")
    parser.add_argument("--image_column", default="image", help="default: %(default)s")
    parser.add_argument("--video_column", help="column of videos (default: video, where there are no images)")
    parser.add_argument(
        "--mean_over_frames", type=int, help="score videos with rewards of images: the mean over so many frames"
    )
    parser.add_argument("--dtype", help="torch dtype of the reward models, such as bfloat16 (default: float32)")
    parser.add_argument("--one_at_a_time", action="store_true", help="keep one reward in memory at a time")
    parser.add_argument("--batch_size", type=int, help="images a call (default: 32; videos 2)")
    parser.add_argument("--shard_size", type=int, default=1024, help="rows a file (default: %(default)s)")
    parser.add_argument("--use_cpu", action="store_true", help="leave a GPU unused")
    parser.add_argument("--num_workers", type=int, default=2, help="decoding threads (default: %(default)s)")
    add_hub_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Score this process's share.

    Args:
        argv (`Sequence[str]`, *optional*):
            Options; by default those of the process.

    Returns:
        `int`: 0, or 3 where all is scored and a push failed.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    # The program lies in the environment's folder, so the user's own module beside the data would not be found.
    sys.path.insert(0, os.getcwd())
    import torch
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.data import Columns, DataError
    from tgol_trainer.jobs import carry_rewards, check_source_complete, note_source, score_dataset, score_stream
    from tgol_trainer.rewards import load_reward
    from tgol_trainer.saving.facts import dataset_facts
    from tgol_trainer.sources import load_scored_dataset

    gpu = torch.cuda.is_available() and not args.use_cpu
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if gpu else "cpu"
    columns = Columns(prompt=args.prompt_column, image=args.image_column)
    dtype = None if args.dtype is None else getattr(torch, args.dtype, None)
    if args.dtype is not None and not isinstance(dtype, torch.dtype):
        raise SystemExit(f"error: `dtype` is {args.dtype!r}, which is no torch dtype, such as bfloat16.")
    with plain_errors():
        options = args.reward_options or {}
        unknown = sorted(options.keys() - set(args.rewards))
        if unknown:
            raise DataError(f"`reward_options`: {unknown[0]!r} is none of `rewards`: {', '.join(args.rewards)}.")
        check_source_complete(args.source)
        target = open_dataset(args)
        rewards = {
            spec.rpartition(":")[2]: partial(
                load_reward, spec, **{"device": device, "dtype": dtype, **options.get(spec, {})}
            )
            for spec in args.rewards
        }
        dataset = load_scored_dataset(args.source, split=args.split, streaming=args.streaming, columns=columns)
        disable_progress_bar()  # one bar a file, over ours
        score = partial(score_stream, name=f"{args.source} ({args.split})") if args.streaming else score_dataset
        missing = score(
            dataset,
            rewards,
            args.output_dir,
            columns=columns,
            one_at_a_time=args.one_at_a_time,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            video_column=args.video_column,
            mean_over_frames=args.mean_over_frames,
            weights=dict(args.weights or []),
        )
    counts = ", ".join(f"{name} {count}" for name, count in missing.items())
    print(f"Wrote this process's shards to {args.output_dir / 'data'}; rows without a score: {counts}.")
    source = dataset_facts(dataset, [])
    known = source.name or (None if Path(args.source).expanduser().exists() else args.source)
    note_source(args.output_dir, known, source.revision)
    carry_rewards(args.output_dir, args.source, source.revision, dataset.column_names)
    return push_complete_dataset(target, args.output_dir, f"Scores: {', '.join(missing)}")
