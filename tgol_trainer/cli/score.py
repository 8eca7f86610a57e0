"""Run `tgol score`: add one column per reward to images or videos, in shards, over any number of processes."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .console import add_hub_options, json_object, open_dataset, plain_errors, push_complete_dataset, set_up_logging


def _weight(text: str) -> tuple[str, float]:
    name, separator, number = text.rpartition("=")
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not separator or not math.isfinite(weight):
        raise argparse.ArgumentTypeError(f"{text!r} is not a column and a weight, such as pickscore=0.5")
    return name, weight


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol score",
        description="Add one column per reward to a dataset of prompts and images, or videos, and write it as Parquet "
        "shards. The same command continues after a kill.",
    )
    parser.add_argument("source", help="Hub id, folder, or a CSV, JSON Lines or Parquet file")
    parser.add_argument("--rewards", required=True, nargs="+", help="names (docs/rewards.md) or your module:function")
    parser.add_argument(
        "--weights",
        nargs="+",
        type=_weight,
        metavar="COLUMN=WEIGHT",
        help="also write the weighted sum of these columns, as the column weighted_sum",
    )
    parser.add_argument(
        "--reward_options",
        type=json_object,
        help="JSON: each reward with its arguments of load_reward, such as source and revision",
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="folder that the shards are written to")
    parser.add_argument(
        "--streaming", action="store_true", help="read Parquet files one by one, local or on the Hub, without a copy"
    )
    parser.add_argument("--split", default="train", help="split of a dataset (default: %(default)s)")
    parser.add_argument("--prompt_column", default="prompt", help="column of prompts (default: %(default)s)")
    parser.add_argument("--image_column", default="image", help="column of images (default: %(default)s)")
    parser.add_argument("--video_column", help="column of videos (default: video, if there are no images)")
    parser.add_argument(
        "--mean_over_frames",
        type=int,
        help="score videos with rewards of images: the mean over this number of frames",
    )
    parser.add_argument("--dtype", help="torch dtype of the reward models, such as bfloat16 (default: float32)")
    parser.add_argument("--one_at_a_time", action="store_true", help="keep one reward in memory at a time")
    parser.add_argument("--batch_size", type=int, help="images per call of a reward (default: 32; videos 2)")
    parser.add_argument("--shard_size", type=int, default=1024, help="rows per file (default: %(default)s)")
    parser.add_argument("--use_cpu", action="store_true", help="leave a GPU unused")
    parser.add_argument("--num_workers", type=int, default=2, help="decoding threads (default: %(default)s)")
    add_hub_options(parser)
    return parser.parse_args(argv)


_OF_REQUESTS = ("api_key_env", "cache", "num_parallel", "retries", "timeout")  # how a server is asked, not what


def _fingerprint(spec: str, dtype: str | None, options: Mapping[str, Any]) -> str:
    """Hash what decides the scores of a reward; options may hold what nobody else is to read."""
    of_requests = (*_OF_REQUESTS, "url") if spec == "judge" else _OF_REQUESTS  # a judge's `model` answers, anywhere
    decides = {name: _content(value) for name, value in options.items() if name not in of_requests}
    return hashlib.blake2b(json.dumps([spec, dtype, decides], sort_keys=True).encode(), digest_size=16).hexdigest()


def _content(value: Any) -> Any:
    """Return the hash of a file that an option names, such as a judge's question, and any other value as it is."""
    if not isinstance(value, str) or "\n" in value or len(value) > 500 or not Path(value).is_file():
        return value
    from huggingface_hub.utils.sha import sha_fileobj

    with Path(value).open("rb") as file:
        return sha_fileobj(file).hex()


def main(argv: Sequence[str] | None = None) -> int:
    """
    Score this process's share.

    Args:
        argv (`Sequence[str]`, *optional*): Options; by default those of the process.

    Returns:
        `int`: 0, or 3 if all rows are scored and a push failed.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    # The program lies in the environment's folder, so a module of the user beside the data would not be found.
    sys.path.insert(0, os.getcwd())
    import torch
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer import jobs
    from tgol_trainer.data import Columns, DataError
    from tgol_trainer.rewards import RewardLoader
    from tgol_trainer.saving.facts import dataset_facts
    from tgol_trainer.sources import load_scored_dataset

    columns = Columns(prompt=args.prompt_column, image=args.image_column)
    dtype = None if args.dtype is None else getattr(torch, args.dtype, None)
    if args.dtype is not None and not isinstance(dtype, torch.dtype):
        raise SystemExit(f"error: `dtype` is {args.dtype!r}, which is not a torch dtype, such as bfloat16.")
    with plain_errors():
        options = args.reward_options or {}
        unknown = sorted(options.keys() - set(args.rewards))
        if unknown:
            raise DataError(f"`reward_options`: {unknown[0]!r} is not one of `rewards`: {', '.join(args.rewards)}.")
        jobs.check_source_complete(args.source)
        target = open_dataset(args)
        general = {"device": jobs.process_device(args.use_cpu), "dtype": dtype}
        rewards = {
            spec.rpartition(":")[2]: RewardLoader(spec, **{**general, **options.get(spec, {})})
            for spec in args.rewards
        }
        dataset = load_scored_dataset(args.source, split=args.split, streaming=args.streaming, columns=columns)
        disable_progress_bar()  # `datasets` shows one bar per file over ours
        settings = jobs.ScoringSettings(
            columns=columns,
            video_column=args.video_column,
            mean_over_frames=args.mean_over_frames,
            weights=dict(args.weights or []),
            one_at_a_time=args.one_at_a_time,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            made_of={
                spec.rpartition(":")[2]: _fingerprint(spec, args.dtype, options.get(spec, {})) for spec in args.rewards
            },
        )
        if args.streaming:
            name = f"{args.source} ({args.split})"
            missing = jobs.score_stream(dataset, rewards, args.output_dir, settings, name=name)
        else:
            missing = jobs.score_dataset(dataset, rewards, args.output_dir, settings)
    counts = ", ".join(f"{name} {count}" for name, count in missing.items())
    print(f"Wrote this process's shards to {args.output_dir / 'data'}; rows without a score: {counts}.")
    source = dataset_facts(dataset, [])
    known = source.name or (None if Path(args.source).expanduser().exists() else args.source)
    jobs.note_source(args.output_dir, known, source.revision)
    jobs.carry_rewards(args.output_dir, args.source, source.revision, dataset.column_names)
    return push_complete_dataset(target, args.output_dir, f"Scores: {', '.join(missing)}")
