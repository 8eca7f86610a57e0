"""Run `tgol evaluate`: compare a base model with adapters on the same prompts and seeds, and report every pair."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .console import plain_errors, set_up_logging
from .generate import add_generation_options, generation_settings, pipeline_options

if TYPE_CHECKING:
    from tgol_trainer.jobs import EvaluationJob
    from tgol_trainer.sources import Prompts


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol evaluate",
        description="Make images or videos with a base model and with adapters from the same prompts and seeds, score "
        "them, and write metrics.json, tables.md, plots and report.html. The same command continues after a kill.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="base model: Hub id, folder, or `shapes`")
    parser.add_argument(
        "--adapters",
        required=True,
        nargs="+",
        metavar="[NAME=]ADAPTER",
        help="folders or Hub ids of adapters, or folders of fully fine-tuned weights; NAME is used in the tables",
    )
    parser.add_argument("--prompts", required=True, help="text file, table, dataset, or a named set (hpsv2, ...)")
    parser.add_argument("--rewards", required=True, nargs="+", help="names (docs/rewards.md) or your module:function")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder of what is made, results and report")
    parser.add_argument(
        "--trained_rewards",
        nargs="+",
        metavar="REWARD",
        help="rewards that the adapters were trained on, or `none` (default: read from the adapters' folders)",
    )
    prompts = parser.add_argument_group("prompts")
    prompts.add_argument("--prompt_column", help="column of a table (default: prompt, caption or text)")
    prompts.add_argument("--category_column", help="column of a table with the category of each prompt")
    prompts.add_argument("--split", default="train", help="split of a dataset (default: %(default)s)")
    prompts.add_argument(
        "--num_prompts", type=int, help="number of prompts, spread evenly over the set (default: all)"
    )
    prompts.add_argument(
        "--images_per_prompt", type=int, default=1, help="2 or more also measure diversity (default: %(default)s)"
    )
    add_generation_options(parser.add_argument_group("images and videos"))
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument("--features", help="reward with image features (clip, ...) or module:function, for diversity")
    scoring.add_argument(
        "--scoring_batch_size", type=int, help="images or videos per call of a reward (default: 32 or 2)"
    )
    scoring.add_argument(
        "--mean_over_frames",
        type=int,
        help="score videos with rewards of images: the mean over this number of frames",
    )
    scoring.add_argument("--one_at_a_time", action="store_true", help="keep one reward in memory at a time")
    scoring.add_argument("--shard_size", type=int, default=64, help="images or videos per file (default: %(default)s)")
    text = "delete images or videos once scored; small copies stay"
    scoring.add_argument("--drop_images", action="store_true", help=text)
    result = parser.add_argument_group("result")
    result.add_argument("--report_megabytes", type=float, default=50, help="limit of report.html (default: 50)")
    result.add_argument("--confidence", type=float, default=0.95, help="level of the intervals (default: 0.95)")
    result.add_argument(
        "--update_card", action="store_true", help="write the result into the model cards in the adapters' folders"
    )
    return parser.parse_args(argv)


def _finish(args: argparse.Namespace, job: EvaluationJob, rewards: list[str], prompts: Prompts, start: float) -> None:
    """Compare, write the files, and print the tables."""
    from tgol_trainer.evaluation import format_measures, format_table
    from tgol_trainer.jobs.evaluate_adapters import compare_adapters, update_cards

    evaluation, settings = compare_adapters(
        job,
        rewards,
        args.trained_rewards,
        prompts,
        prompt_set=args.prompts,
        confidence=args.confidence,
        megabytes=args.report_megabytes,
        seconds=time.time() - start,
    )
    for adapter in evaluation.adapters:
        print(f"\n{adapter.name} against the base model\n{format_table(adapter.scores)}")
        print(f"\n{format_measures(adapter.measures)}")
    if evaluation.notices:
        print("\nNote:\n" + "\n".join(f"  {notice}" for notice in evaluation.notices))
    print(f"\n  {args.output_dir / 'report.html'}  tables, plots, and the {evaluation.medium}s by change of score")
    print(f"  {args.output_dir / 'tables.md'}  the tables; metrics.json has the numbers")
    if args.update_card:
        for card in update_cards(job, evaluation, settings):
            print(f"  {card}  its evaluation is up to date")


def main(argv: Sequence[str] | None = None) -> int:
    """
    Do this process's share, and write the report if it is the last to finish.

    Args:
        argv (`Sequence[str]`, *optional*): Options; by default those of the process.

    Returns:
        `int`: 0.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    start = time.time()
    set_up_logging()
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer import jobs
    from tgol_trainer.jobs.evaluate_adapters import BASE, check_adapters, named_adapters, spread_prompts
    from tgol_trainer.jobs.loading import load_image_features
    from tgol_trainer.rewards import RewardLoader, find_reward
    from tgol_trainer.sources import load_prompts

    with plain_errors():
        disable_progress_bar()  # `datasets` shows one bar per file over ours
        adapters = named_adapters(args.adapters)
        if args.features is not None:
            find_reward(args.features)
        device = jobs.process_device(args.use_cpu)
        rewards = {spec.rpartition(":")[2]: RewardLoader(spec, device=device) for spec in args.rewards}
        check_adapters(adapters, list(rewards), args.trained_rewards, update_cards=args.update_card)
        prompts = load_prompts(
            args.prompts,
            column=args.prompt_column,
            category_column=args.category_column,
            split=args.split,
            prompt_syntax=args.prompt_syntax,
        )
        prompts = spread_prompts(prompts, args.num_prompts)
        job = jobs.EvaluationJob(
            args.output_dir,
            {BASE: None, **adapters},
            prompts.texts,
            generation_settings(args, revision=args.model_revision),
        )
        missing = jobs.run_evaluation(
            job,
            partial(jobs.load_adapted_pipeline, args.model_name_or_path, **pipeline_options(args)),
            rewards,
            jobs.ScoringSettings(
                one_at_a_time=args.one_at_a_time,
                batch_size=args.scoring_batch_size,
                mean_over_frames=args.mean_over_frames,
            ),
            features=None if args.features is None else partial(load_image_features, args.features, device),
            keep_images=not args.drop_images,
        )
        if missing:
            print(f"This process is done; {missing} shards are with others. The last to finish writes the report.")
            return 0
        _finish(args, job, list(rewards), prompts, start)
    return 0
