"""`tgol generate`: prompts to images or videos, in shards, over any number of processes and restarts."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .console import add_hub_options, json_object, open_dataset, plain_errors, push_complete_dataset, set_up_logging


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol generate",
        description="Make images, or videos, of prompts with fixed seeds and write them as Parquet shards. The same "
        "command continues after a kill and gives the same images with any number of processes.",
    )
    parser.add_argument("--prompts", required=True, help="text file, table, dataset, or a named set (hpsv2, ...)")
    parser.add_argument("--prompt_column", help="column of a table (default: prompt, caption or text)")
    parser.add_argument("--split", default="train", help="split of a dataset (default: %(default)s)")
    parser.add_argument("--model_name_or_path", required=True, help="Hub id, folder, or `shapes`")
    parser.add_argument("--model_revision", help="revision of the model on the Hub")
    parser.add_argument("--dtype", help="torch dtype of the pipeline, such as bfloat16 (default: float32)")
    parser.add_argument(
        "--model_init_kwargs", type=json_object, help="JSON passed to `from_pretrained` of the pipeline"
    )
    parser.add_argument("--adapter_name_or_path", help="LoRA folder or Hub id to load (default: none)")
    parser.add_argument("--output_dir", required=True, type=Path, help="where the shards go")
    parser.add_argument(
        "--images_per_prompt", type=int, default=1, help="images or videos of each prompt (default: %(default)s)"
    )
    parser.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    parser.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    parser.add_argument("--height", type=int, help="pixels (default: the pipeline's)")
    parser.add_argument("--width", type=int, help="pixels (default: the pipeline's)")
    parser.add_argument("--num_frames", type=int, help="frames of a video (default: the pipeline's)")
    parser.add_argument("--fps", type=int, default=16, help="frames a second of a video (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--batch_size", type=int, help="images a call (default: 8; videos 1)")
    parser.add_argument("--shard_size", type=int, help="images a file (default: 256; videos 8)")
    parser.add_argument("--use_cpu", action="store_true", help="leave a GPU unused")
    add_hub_options(parser)
    return parser.parse_args(argv)


def load_generator(
    model: str,
    *,
    revision: str | None,
    dtype: str | None,
    adapter: str | None,
    use_cpu: bool,
    model_init_kwargs: dict[str, Any] | None = None,
    num_frames: int | None = None,
) -> tuple[Any, str | None]:
    """
    Load a pipeline with its adapter onto this process's device.

    Args:
        model (`str`):
            Hub id, folder, or the name of an embedded model.
        revision (`str`, *optional*):
            Revision on the Hub.
        dtype (`str`, *optional*):
            Name of a torch dtype.
        adapter (`str`, *optional*):
            LoRA folder or Hub id.
        use_cpu (`bool`):
            Leave a GPU unused.
        model_init_kwargs (`dict`, *optional*):
            Further options of [`load_family`].
        num_frames (`int`, *optional*):
            Frames of a video that will be asked for, so that a number the model does not take is refused now.

    Returns:
        `tuple`: the pipeline, and the revision that was loaded where it is known.

    Raises:
        ValueError: for an unsupported pipeline, an adapter that holds nothing for it, a number of frames that does not
            fit, options that an embedded model has not, or an option that is given twice.
    """
    from tgol_trainer import adapters
    from tgol_trainer.families import FamilySettings, load_family

    options = {name: value for name, value in (("revision", revision), ("dtype", dtype)) if value is not None}
    twice = options.keys() & (model_init_kwargs or {})
    if twice:
        raise ValueError(f"`model_init_kwargs`: {sorted(twice)[0]!r} is given beside it as well. Give it once.")
    options |= model_init_kwargs or {}
    family = load_family(model, options, FamilySettings(num_frames=num_frames))
    if adapter is not None:
        adapters.load_trained(family.pipeline, family.denoiser_name, adapter)
    return family.to(device_of(use_cpu)).pipeline, family.origin.revision


def device_of(use_cpu: bool) -> str:
    """
    Return the device of this process.

    Args:
        use_cpu (`bool`):
            Leave a GPU unused.
    """
    import torch

    if use_cpu or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def main(argv: Sequence[str] | None = None) -> int:
    """
    Make the images of this process's share.

    Args:
        argv (`Sequence[str]`, *optional*):
            Options; by default those of the process.

    Returns:
        `int`: 0, or 3 where all is made and a push failed.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.jobs import generate_dataset, note_source
    from tgol_trainer.sources import load_prompts

    with plain_errors():
        target = open_dataset(args)
        prompts = load_prompts(args.prompts, column=args.prompt_column, split=args.split)
        pipeline, revision = load_generator(
            args.model_name_or_path,
            revision=args.model_revision,
            dtype=args.dtype,
            adapter=args.adapter_name_or_path,
            use_cpu=args.use_cpu,
            model_init_kwargs=args.model_init_kwargs,
            num_frames=args.num_frames,
        )
        disable_progress_bar()  # one bar a file, over ours
        files = generate_dataset(
            pipeline,
            prompts.texts,
            args.output_dir,
            model=args.model_name_or_path,
            revision=revision,
            adapter=args.adapter_name_or_path,
            images_per_prompt=args.images_per_prompt,
            seed=args.seed,
            shard_size=args.shard_size,
            batch_size=args.batch_size,
            num_inference_steps=args.num_inference_steps,
            guidance_scale=args.guidance_scale,
            height=args.height,
            width=args.width,
            fps=args.fps,
            **({} if args.num_frames is None else {"num_frames": args.num_frames}),
        )
    print(f"This process's shards ({len(files)}) are complete in {args.output_dir / 'data'}.")
    note_source(args.output_dir, None if Path(args.prompts).exists() else args.prompts, prompts.revision)
    return push_complete_dataset(target, args.output_dir, "Images")
