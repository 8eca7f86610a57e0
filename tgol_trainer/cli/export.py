"""`tgol export`: write trained weights in another format, read them back, and compare them with the trained ones."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .console import json_object, plain_errors, set_up_logging

_FORMATS = ("diffusers", "peft", "comfyui", "merged")
_DTYPES = ("float32", "float16", "bfloat16")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol export",
        description="Write trained weights in another format, load them into a fresh base model, compare its output "
        "with the trained model's, and write the result into the export's card. Nothing is written if they differ.",
    )
    parser.add_argument("directory", type=Path, help="output_dir of a run, or one of its checkpoints")
    parser.add_argument(
        "--format",
        required=True,
        choices=_FORMATS,
        help="diffusers: for pipe.load_lora_weights; peft: for PeftModel.from_pretrained; comfyui: one file for "
        "models/loras; merged: a complete pipeline that needs no PEFT",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        help="new folder for the export and its card, or for comfyui the directory itself (default: DIRECTORY-FORMAT)",
    )
    parser.add_argument("--model_name_or_path", help="base model (default: the one recorded in the directory's card)")
    parser.add_argument("--model_revision", help="revision of the base model on the Hub (default: the recorded one)")
    parser.add_argument(
        "--model_init_kwargs", type=json_object, default={}, help="JSON object for loading the base model"
    )
    parser.add_argument(
        "--weight", type=float, default=1.0, help="strength of the adapter in the export (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=_DTYPES, default="float32", help="dtype of the exported weights (default: %(default)s)"
    )
    parser.add_argument("--use_cpu", action="store_true", help="compare on the CPU even if there is a GPU")
    args = parser.parse_args(argv)
    if args.output_dir is None:
        resolved = args.directory.resolve()
        args.output_dir = args.directory.parent / f"{resolved.name}-{args.format}"
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """
    Export from a command line.

    Args:
        argv (`Sequence[str]`, *optional*): Options. The default is the options of the process.

    Returns:
        `int`: 0.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from tgol_trainer.exports import export

    diffusers_logging.set_verbosity_error()  # silences "No LoRA keys" of the untrained text encoders
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if args.model_revision is not None:
        args.model_init_kwargs["revision"] = args.model_revision
    with plain_errors():
        row = export(
            args.directory,
            args.output_dir,
            args.format,
            model_name_or_path=args.model_name_or_path,
            weight=args.weight,
            dtype=getattr(torch, args.dtype),
            model_init_kwargs=args.model_init_kwargs,
            device="cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu",
        )
    matched = f"{row.num_tensors} tensors matched, none left over. " if row.num_tensors is not None else ""
    equal = "Weights equal bit for bit. " if row.weights_equal else ""
    print(f"Saved to {args.output_dir}: {', '.join(row.files)}")
    print(
        f"Read back into a fresh model: {matched}{equal}Largest difference from the trained output: "
        f"{row.difference:.2g} (training moved it by {row.effect:.2g}). Mean difference of an image: "
        f"{row.image_difference:.2g} of 255."
    )
    if row.note:
        print(row.note[0].upper() + row.note[1:])
    return 0
