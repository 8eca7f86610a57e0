"""`tgol push`: a run's folder, or a dataset of `tgol generate` and `tgol score`, to the Hub, also after a failure."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .console import set_up_logging

if TYPE_CHECKING:
    from tgol_trainer.saving.hub import Gate, Repository


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol push",
        description="Push what a run left in its folder, without training again, and compare every file on the Hub "
        "with the local one. Files that are there already are not sent again. The token is that of HF_TOKEN or of "
        "`hf auth login`.",
    )
    parser.add_argument("folder", type=Path, help="output folder of a run, or of `tgol generate` or `tgol score`")
    parser.add_argument("--hub_model_id", help="repository, owner/name (default: yours, named like the folder)")
    parser.add_argument("--hub_dataset_id", help="the same for a dataset")
    parser.add_argument("--private", action="store_true", default=None, help="hide a new repository from others")
    parser.add_argument("--gated", choices=("auto", "manual", "no"), help="ask for contact details before access")
    parser.add_argument("--revision", help="branch, made where missing (default: main)")
    parser.add_argument("--commit_message", help="default: one that says what was pushed")
    parser.add_argument(
        "--hub_strategy",
        choices=("end", "checkpoint", "all_checkpoints"),
        default="end",
        help="also push the newest checkpoint, or all of them, with optimizer states (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Push a folder.

    Args:
        argv (`Sequence[str]`, *optional*):
            Options; by default those of the process.

    Returns:
        `int`: 0, or 1 where the push failed.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    from tgol_trainer.saving.hub import PushError

    try:
        commit = _push(args)
    except PushError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Pushed and compared: {commit}")
    return 0


def _push(args: argparse.Namespace) -> str:
    from tgol_trainer.saving.hub import open_repository, point_card_at, push_run, run_files

    records = [args.folder / name for name in ("tgol_generate.json", "tgol_score.json")]
    if args.hub_dataset_id or (any(record.is_file() for record in records) and not args.hub_model_id):
        return _push_dataset(args)
    files = run_files(args.folder)
    target = open_repository(_target(args, "model"), private=args.private, gated=_gate(args.gated))
    point_card_at(args.folder, target.id)
    print(f"Pushing {len(files)} files of {args.folder} to {target.id}", flush=True)
    message = args.commit_message or f"Push {args.folder.resolve().name}"
    return push_run(target, args.folder, message, strategy=args.hub_strategy).commit_url


def _push_dataset(args: argparse.Namespace) -> str:
    from tgol_trainer.data import DataError
    from tgol_trainer.jobs import check_complete, push_dataset
    from tgol_trainer.saving.hub import PushError, open_repository

    try:
        check_complete(args.folder)  # before a repository is made
        target = open_repository(_target(args, "dataset"), private=args.private, gated=_gate(args.gated))
        print(f"Pushing {args.folder} to the dataset {target.id}", flush=True)
        message = args.commit_message or f"Push {args.folder.resolve().name}"
        return push_dataset(target, args.folder, message).commit_url
    except DataError as error:
        raise PushError(str(error)) from error


def _gate(choice: Any) -> Gate | None:
    return False if choice == "no" else choice


def _target(args: argparse.Namespace, kind: Literal["model", "dataset"]) -> Repository:
    from tgol_trainer.saving.hub import Repository, resume_command

    name = getattr(args, f"hub_{kind}_id") or args.folder.resolve().name
    resume = resume_command(args.folder, name, kind, args.revision)
    return Repository(name, kind, revision=args.revision, resume=resume)
