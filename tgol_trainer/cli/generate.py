"""Run `tgol generate`: make images or videos from prompts, in shards, over any number of processes and restarts."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import add_hub_options, json_object, open_dataset, plain_errors, push_complete_dataset, set_up_logging

if TYPE_CHECKING:
    from tgol_trainer.jobs import GenerationSettings


def add_generation_options(parser: argparse._ActionsContainer) -> None:
    """Add the options that [`generation_settings`] and [`pipeline_options`] read."""
    parser.add_argument("--model_revision", help="revision of the model on the Hub")
    parser.add_argument("--dtype", help="torch dtype of the pipeline, such as bfloat16 (default: float32)")
    parser.add_argument(
        "--model_init_kwargs", type=json_object, help="JSON passed to `from_pretrained` of the pipeline"
    )
    text = "`strip`: take what other programs read as instructions out of the prompts (default: %(default)s)"
    parser.add_argument("--prompt_syntax", choices=("keep", "strip"), default="keep", help=text)
    parser.add_argument("--num_inference_steps", type=int, help="denoising steps (default: the pipeline's own)")
    parser.add_argument("--guidance_scale", type=float, help="strength of guidance (default: the pipeline's own)")
    parser.add_argument("--negative_prompt", help="what guidance leads away from (default: the pipeline's own)")
    parser.add_argument("--height", type=int, help="pixels (default: the pipeline's own)")
    parser.add_argument("--width", type=int, help="pixels (default: the pipeline's own)")
    parser.add_argument("--num_frames", type=int, help="frames of a video (default: the pipeline's own)")
    parser.add_argument("--fps", type=int, help="frames per second of a video (default: the model's own)")
    parser.add_argument("--seed", type=_seed, default=0, help="seed of the run (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, help="images per call of the pipeline (default: 8; videos 1)")
    parser.add_argument("--use_cpu", action="store_true", help="leave a GPU unused")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"must be a whole number of at least 0, got {text!r}; other programs take -1 for a random seed, and here "
            "the same command makes the same images"
        )
    return int(text)


def generation_settings(args: argparse.Namespace, **facts: Any) -> GenerationSettings:
    """Return the settings of generation that the options give; `facts` are the revision and the adapter."""
    from tgol_trainer.jobs import GenerationSettings

    known = {field.name for field in dataclasses.fields(GenerationSettings)}
    given = {name: value for name, value in vars(args).items() if name in known}
    return GenerationSettings(model=args.model_name_or_path, **given, **facts)


def pipeline_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of [`load_adapted_pipeline`] that were given as options."""
    names = ("dtype", "model_init_kwargs", "num_frames", "use_cpu")
    sizes = {"height": args.height, "width": args.width}
    return {"revision": args.model_revision, "sizes": sizes, **{name: getattr(args, name) for name in names}}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol generate",
        description="Make images or videos from prompts with fixed seeds and write them as Parquet shards. The same "
        "command continues after a kill and gives the same images with any number of processes.",
    )
    parser.add_argument("--prompts", required=True, help="text file, table, dataset, or a named set (hpsv2, ...)")
    parser.add_argument("--prompt_column", help="column of a table (default: prompt, caption or text)")
    parser.add_argument("--split", default="train", help="split of a dataset (default: %(default)s)")
    parser.add_argument("--model_name_or_path", required=True, help="Hub id, folder, or `shapes`")
    parser.add_argument("--adapter_name_or_path", help="LoRA folder or Hub id to load (default: none)")
    parser.add_argument("--output_dir", required=True, type=Path, help="folder that the shards are written to")
    parser.add_argument(
        "--images_per_prompt", type=int, default=1, help="images or videos per prompt (default: %(default)s)"
    )
    parser.add_argument("--shard_size", type=int, help="images per file (default: 256; videos 8)")
    add_generation_options(parser)
    add_hub_options(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Generate the images of this process's share.

    Args:
        argv (`Sequence[str]`, *optional*): Options; by default those of the process.

    Returns:
        `int`: 0, or 3 if all images are made and a push failed.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.evaluation import makes_videos
    from tgol_trainer.jobs import generate_dataset, load_adapted_pipeline, note_source
    from tgol_trainer.sources import load_prompts

    with plain_errors():
        target = open_dataset(args)
        prompts = load_prompts(
            args.prompts, column=args.prompt_column, split=args.split, prompt_syntax=args.prompt_syntax
        )
        adapter = args.adapter_name_or_path
        pipeline, revision = load_adapted_pipeline(args.model_name_or_path, adapter, **pipeline_options(args))
        disable_progress_bar()  # `datasets` shows one bar per file over ours
        settings = generation_settings(args, revision=revision, adapter=adapter)
        files = generate_dataset(pipeline, prompts.texts, args.output_dir, settings)
    print(f"This process's shards ({len(files)}) are complete in {args.output_dir / 'data'}.")
    note_source(args.output_dir, None if Path(args.prompts).exists() else args.prompts, prompts.revision)
    return push_complete_dataset(target, args.output_dir, "Videos" if makes_videos(pipeline) else "Images")
