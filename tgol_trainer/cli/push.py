"""`tgol push`: push a run's folder, or a dataset of `tgol generate` and `tgol score`, to the Hub."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .console import plain_errors, set_up_logging

if TYPE_CHECKING:
    from tgol_trainer.saving.hub import Gate, Repository


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol push",
        description="Push the output folder of a run or a dataset, without training again, and compare every file on "
        "the Hub with the local one. Use it also after a failed push: a file that is already there is not sent again. "
        "The token is that of HF_TOKEN or of `hf auth login`.",
    )
    text = "output folder of a run, or of `tgol generate`, `tgol score` or `tgol rate`"
    parser.add_argument("folder", type=Path, help=text)
    parser.add_argument("--hub_model_id", help="repository, owner/name (default: yours, named like the folder)")
    parser.add_argument("--hub_dataset_id", help="repository of a dataset, owner/name (default: as above)")
    parser.add_argument("--private", action="store_true", default=None, help="hide a new repository from others")
    parser.add_argument("--gated", choices=("auto", "manual", "no"), help="ask for contact details before access")
    parser.add_argument("--revision", help="branch, which is made if it does not exist (default: main)")
    parser.add_argument("--commit_message", help="title of the commit (default: names the folder)")
    parser.add_argument(
        "--hub_strategy",
        choices=("end", "checkpoint", "all_checkpoints"),
        default="end",
        help="also push the newest checkpoint, or all checkpoints, with optimizer states (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Push a folder.

    Args:
        argv (`Sequence[str]`, *optional*): Options. The default is the options of the process.

    Returns:
        `int`: 0. A push that fails exits with 1.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    with plain_errors():
        commit = _push(args)
    print(f"Pushed and compared: {commit}")
    return 0


def _push(args: argparse.Namespace) -> str:
    """Push the folder and return the address of the commit."""
    from tgol_trainer.saving.hub import point_card_at, push_run, run_files

    folder: Path = args.folder
    message = args.commit_message or f"Push {folder.resolve().name}"
    made = any((folder / name).is_file() for name in ("tgol_generate.json", "tgol_score.json"))
    from tgol_trainer.sources.ratings import is_rated

    if is_rated(folder) and not args.hub_model_id:
        from tgol_trainer.rating.publish import push_ratings

        target = _open(args, "dataset")
        print(f"Pushing {folder} to the dataset {target.id}", flush=True)
        return push_ratings(target, folder, message).commit_url
    if args.hub_dataset_id or (made and not args.hub_model_id):
        from tgol_trainer.jobs import check_complete, push_dataset

        check_complete(folder)  # before a repository is made
        target = _open(args, "dataset")
        print(f"Pushing {folder} to the dataset {target.id}", flush=True)
        return push_dataset(target, folder, message).commit_url
    files = run_files(folder)
    target = _open(args, "model")
    point_card_at(folder, target.id)
    print(f"Pushing {len(files)} files of {folder} to {target.id}", flush=True)
    return push_run(target, folder, message, strategy=args.hub_strategy).commit_url


def _open(args: argparse.Namespace, kind: Literal["model", "dataset"]) -> Repository:
    from tgol_trainer.saving.hub import Repository, open_repository, resume_command

    name = getattr(args, f"hub_{kind}_id") or args.folder.resolve().name
    resume = resume_command(args.folder, name, kind, args.revision)
    gated: Gate | None = False if args.gated == "no" else args.gated
    target = Repository(name, kind, revision=args.revision, resume=resume)
    return open_repository(target, private=args.private, gated=gated)
