"""`tgol rate`: rate the images of a folder or dataset in the browser, for training."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import (
    PUSH_FAILED,
    add_hub_options,
    counted,
    hide_local_bars,
    open_dataset,
    plain_errors,
    program,
    set_up_logging,
)

if TYPE_CHECKING:
    import datasets

    from tgol_trainer.rating.server import Session
    from tgol_trainer.rating.tasks import Pictures
    from tgol_trainer.saving.hub import Repository
    from tgol_trainer.sources.ratings import RateSettings

LOOPBACK = ("127.0.0.1", "localhost")
_SHOWN = 3
_TRAINED = ("--recipe", "anchored", "--max_steps", "200")
"""Of the commands at the end: a pass over a hundred ratings is twelve updates, of which nothing can be seen."""


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol rate",
        description="Rate images or videos in the browser. Every rating is on the disk before the next one comes, and "
        "the same command goes on later. `tgol label` and `tgol train` read the output folder.",
    )
    add = parser.add_argument
    add("source", help="folder, file or Hub id with prompts and images or videos, as `tgol check` takes it")
    add("--split", default="train", help="split to read (default: %(default)s)")
    add("--dataset_config", help="configuration, for a dataset on the Hub that has several")
    for role in ("prompt", "image", "video"):
        text = ", which are rated where there is no column of images" if role == "video" else ""
        add(f"--{role}_column", default=role, help=f"column of {role}s{text} (default: %(default)s)")
    text = "ratings: 1 to 5; thumbs: up or down; pairs: the better of two images of a prompt (default: %(default)s)"
    add("--kind", choices=("ratings", "thumbs", "pairs"), default="ratings", help=text)
    add("--by_prompt", action="store_true", help="show the images of one prompt one after the other, and together")
    add(
        "--seed", type=int, default=0, help="seed of the order, which also depends on the rater (default: %(default)s)"
    )
    add("--output_dir", type=Path, help="folder of the ratings (default: the source's name and `_ratings`, here)")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=int, default=7860, help="port; 0 for a free one (default: %(default)s)")
    add("--model_name_or_path", help="model that you will train: put into the commands that are shown at the end")
    add_hub_options(parser)
    text = (
        "make a Space of this name, owner/name, that serves the page of a dataset on the Hub, instead of serving it "
    )
    add("--space", metavar="ID", help=f"{text}here; its token, which may write the ratings, is that of SPACE_TOKEN")
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65536:
        parser.error("--port must lie between 0 and 65535")
    if args.output_dir is None:
        path = Path(args.source).expanduser().resolve()
        args.output_dir = Path(f"{(path.stem if path.is_file() else path.name) or 'images'}_ratings")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """
    Serve the page until it is interrupted.

    Args:
        argv (`Sequence[str]`, *optional*): Options; by default those of the process.

    Returns:
        `int`: 0, or 3 if all is saved but not on the Hub.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    with plain_errors():
        return _make_space(args) if args.space else _rate(args)


def _rate(args: argparse.Namespace) -> int:
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.data import Columns
    from tgol_trainer.rating.publish import fetch_ratings, pushing
    from tgol_trainer.rating.server import make_app, serve
    from tgol_trainer.sources import load_scored_dataset
    from tgol_trainer.sources.ratings import Journal

    target = open_dataset(args)
    if target is not None:
        fetch_ratings(target, args.output_dir)
    hide_local_bars(args.source)
    video = None if args.video_column == "video" else args.video_column
    columns = Columns(args.prompt_column, args.image_column, video=video, num_frames=1 if video else None)
    dataset: Any = load_scored_dataset(args.source, name=args.dataset_config, split=args.split, columns=columns)
    disable_progress_bar()
    session = _session(args, dataset, None if target is None else target.id)
    journal = Journal(args.output_dir)
    app = make_app(session, journal, ("*",) if _is_open(args.host) else LOOPBACK)
    # A terminal that closes and a container that stops end it as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    pushes = contextlib.nullcontext() if target is None else pushing(target, args.output_dir, journal)
    with pushes, contextlib.suppress(KeyboardInterrupt):
        serve(app, args.host, args.port, lambda address: _say_where(args, session, address))
    rated = journal.rated()
    people = len({entry["rater"] for entry in rated})
    noun = {"ratings": "rating", "thumbs": "thumb", "pairs": "comparison"}[args.kind]
    print(f"\n{args.output_dir}: {counted(len(rated), noun)} by {'1 person' if people == 1 else f'{people} people'}.")
    if rated:
        print("Next:\n" + "\n".join(f"  {line}" for line in session.commands), flush=True)
    return _push(target, args.output_dir, len(rated)) if target is not None and rated else 0


def _push(target: Repository, folder: Path, number: int) -> int:
    from tgol_trainer.rating.publish import push_ratings
    from tgol_trainer.saving.hub import PushError

    try:
        commit = push_ratings(target, folder, f"{number} ratings")
    except PushError as error:
        _say(f"error: {error}")
        return PUSH_FAILED
    print(f"Pushed and compared: {commit.commit_url}")
    return 0


def _make_space(args: argparse.Namespace) -> int:
    from tgol_trainer._hub_ids import is_hub_id
    from tgol_trainer.rating.space import push_space
    from tgol_trainer.saving.hub import Repository, open_repository

    if Path(args.source).expanduser().exists() or not is_hub_id(args.source):
        raise ValueError(
            f"`--space`: a Space reads a dataset on the Hub, and {args.source!r} is not the id of one. Push it first."
        )
    ratings = args.hub_dataset_id or f"{args.source.rpartition('/')[2]}_ratings"
    private = args.hub_private_repo
    dataset = open_repository(Repository(ratings, "dataset", revision=args.hub_revision), private=private)
    space = open_repository(Repository(args.space, "space"), private=private)
    names = ("split", "prompt_column", "image_column", "video_column", "kind", "seed")
    options = [f"--{name}={getattr(args, name)}" for name in names]
    options += ["--by_prompt"] if args.by_prompt else []
    for name in ("dataset_config", "model_name_or_path", "hub_revision"):
        options += [f"--{name}={getattr(args, name)}"] if getattr(args, name) else []
    secret = os.environ.get("SPACE_TOKEN")
    commit = push_space(space, args.source, dataset.id, options, secret)
    print(f"Pushed and compared: {commit.commit_url}\nRatings will go to the dataset {dataset.id}.")
    if secret is None:
        print(
            f"One step is left: in the settings of {space.id}, add a secret HF_TOKEN, a token that may read "
            f"{args.source} and write to {dataset.id}. (With SPACE_TOKEN set, this command adds it.)"
        )
    return 0


def _session(args: argparse.Namespace, dataset: datasets.Dataset, ratings: str | None) -> Session:
    from tgol_trainer.rating.server import Session
    from tgol_trainer.rating.tasks import Pictures, make_tasks
    from tgol_trainer.sources.loading import hub_commit
    from tgol_trainer.sources.ratings import RateSettings

    path = Path(args.source).expanduser()
    local = path.exists()
    folder = (path if path.is_dir() else path.parent).resolve() if local else None
    pictures = Pictures(dataset, args.prompt_column, args.image_column, folder, args.video_column)
    if pictures.num_left_out:
        rows = counted(pictures.num_left_out, "row")
        _say(f"{rows} without a prompt or {pictures.medium}: not shown. `tgol check` says why.")
    if pictures.lacking:
        shown = "; ".join(pictures.lacking[:_SHOWN]) + ("; ..." if len(pictures.lacking) > _SHOWN else "")
        _say(f"{counted(len(pictures.lacking), 'image')} not shown: {shown}.")
    tasks = make_tasks(list(pictures.by_id.values()), args.kind, args.seed)
    # A path of this machine would be pushed with the ratings.
    source = os.path.relpath(path.resolve(), args.output_dir.resolve()) if local else args.source
    num_rows = len(dataset) if pictures.numbered else None
    settings = RateSettings(args.kind, source, args.split, hub_commit(dataset), num_rows, pictures.medium)
    _open_folder(args.output_dir, settings)
    commands = _commands(args, dataset, pictures, ratings or str(args.output_dir))
    return Session(pictures, tasks, args.output_dir, args.kind, args.seed, args.by_prompt, commands)


def _open_folder(folder: Path, settings: RateSettings) -> None:
    """Make the output folder, or go on in one that holds ratings of the same images and kind."""
    from tgol_trainer.sources.ratings import is_rated, read_settings, write_settings

    if not is_rated(folder):
        if folder.exists() and any(folder.iterdir()):
            raise ValueError(f"`--output_dir`: {folder} exists and holds something else. Give another folder.")
        folder.mkdir(parents=True, exist_ok=True)
        write_settings(folder, settings)
        return
    found = read_settings(folder)
    for name, value in dataclasses.asdict(settings).items():
        before = getattr(found, name)
        if before != value:
            raise ValueError(
                f"`--output_dir`: {folder} holds ratings with {name} {before!r}, now it is {value!r}. Give another "
                "folder for these."
            )


def _commands(
    args: argparse.Namespace, dataset: datasets.Dataset, pictures: Pictures, ratings: str
) -> tuple[str, str]:
    """Return what to run when all is rated; the model is the one that made the images, where the rows say so."""
    from tgol_trainer.data.prompts import foreign_syntax
    from tgol_trainer.shapes import embedded_model

    model = args.model_name_or_path
    if model is None and "model" in dataset.column_names:
        made = dataset.unique("model")
        model = made[0] if len(made) == 1 and isinstance(made[0], str) else None
    prompts = {picture.prompt for picture in pictures.by_id.values()}
    plain = ["--prompt_syntax", "strip"] if any(map(foreign_syntax, prompts)) else []
    embedded = embedded_model(model) if model else None
    rate = embedded.training_flags if embedded else ()
    adapter = args.output_dir.with_name(f"{args.output_dir.name.removesuffix('_ratings')}_adapter")
    label = [program(), "label", "--dataset_name", ratings, *_TRAINED[:2], *plain]
    train = [program(), "train", "--model_name_or_path", model or "MODEL", "--dataset_name", ratings]
    return shlex.join(label), shlex.join([*train, *_TRAINED, *rate, *plain, "--output_dir", str(adapter)])


def _is_open(host: str) -> bool:
    return host not in LOOPBACK


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _say_where(args: argparse.Namespace, session: Session, address: str) -> None:
    what = "pair" if args.kind == "pairs" else {"image": "picture"}.get(session.pictures.medium, "video")
    print(f"{counted(len(session.tasks), what)} to rate at {address}")
    print(
        f"Each rating is saved in {args.output_dir / 'ratings.jsonl'} at once. Ctrl-C ends; the same command goes on."
    )
    if _is_open(args.host):
        _say(f"Everyone who reaches {args.host} on this port can see the images and rate.")
    sys.stdout.flush()
