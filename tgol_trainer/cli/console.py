"""What the commands share: the log on standard error, errors as one message, options of the Hub."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import os
import reprlib
import shutil
import sys
import traceback
import typing
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tgol_trainer.saving.hub import Repository

_PATH_ERRORS = (NotADirectoryError, FileExistsError, IsADirectoryError, PermissionError)

FOLDER_SCORES = "take scores from names of folders, numbers or words such as good and bad, where no table has any"
PUSH_FAILED = 3
"""Exit code of a command whose work is done and saved, but not on the Hub."""


def set_up_logging() -> None:
    """Print the log of this library from INFO up on standard error, beside other libraries' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("tgol_trainer")
    root.handlers = [handler]
    # All processes would say the same at INFO; a warning may concern the rows of one process.
    root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    root.propagate = False
    # A frozen reference policy is a second adapter.
    warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute in the model")
    warnings.filterwarnings("ignore", message=r".*'pin_memory' argument is set as true but no accelerator.*")
    # Pillow opens such an image. An image of twice that size is an error that names the row.
    warnings.filterwarnings("ignore", message=r"Image size \(\d+ pixels\) exceeds limit")


def hide_local_bars(source: str) -> None:
    """Hide the progress bars of `datasets` for a source on this machine. A download keeps its bar."""
    from datasets.utils.logging import disable_progress_bar

    if Path(source).expanduser().exists():
        disable_progress_bar()


def program() -> str:
    """Return how to call `tgol` from here: by name if the shell finds this environment's, else by its path."""
    own = Path(sys.executable).with_name("tgol")
    found = shutil.which("tgol")
    return "tgol" if (found and Path(found).resolve() == own.resolve()) or not own.exists() else os.path.relpath(own)


def counted(number: int | str, noun: str) -> str:
    """Return a number with its noun, such as 1 row, 2 rows."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def json_object(text: str) -> dict[str, Any]:
    """
    Read an option that is a JSON object, as `type=` of an argument.

    Args:
        text (`str`): JSON such as `{"variant": "fp16"}`.

    Returns:
        `dict`

    Raises:
        argparse.ArgumentTypeError: for anything else.
    """
    try:
        read = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from error
    if not isinstance(read, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object, such as " + """'{"variant": "fp16"}'""")
    return read


def read_settings(path: Path) -> dict[str, Any]:
    """
    Read a settings file.

    Args:
        path (`Path`): YAML, with one `name: value` a line.

    Returns:
        `dict`

    Raises:
        SystemExit: for a file that is not there or not YAML, and for a name that stands twice, with line and column.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            """Refuse a name that stands twice, of which YAML would take the last."""
            names: set[str] = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if key.value in names:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} stands twice", key.start_mark)
                names.add(key.value)
            return super().construct_mapping(node, deep)

    from tgol_trainer._files import NotTextError, read_text

    if not path.is_file():
        raise SystemExit(f"error: --config: there is no file {path}.")
    try:
        values = yaml.load(read_text(path), Loader)  # noqa: S506 - a SafeLoader
    except NotTextError as error:
        raise SystemExit(f"error: --config: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        cause = getattr(error, "problem", None) or str(error)
        tab = " Indent with blanks, not with tabs." if "\\t" in cause else ""
        raise SystemExit(f"error: --config: {path}{place}: {cause}.{tab}") from error
    if not isinstance(values, dict):
        raise SystemExit(f"error: --config: {path} holds no settings, one `name: value` a line.")
    return values


def check_kinds(values: dict[str, Any], path: Path, kinds: Sequence[type]) -> None:
    """
    Refuse values of a settings file that are of another kind than their field: mappings, lists, dates, nothing.

    Args:
        values (`dict[str, Any]`): What [`read_settings`] returns.
        path (`Path`): The file, for the message.
        kinds (`Sequence[type]`): Dataclasses of the fields; a name that none of them has is left to the parser.

    Raises:
        SystemExit: naming the field, its value and what it takes.
    """
    hints = {name: str(hint) for kind in kinds for name, hint in typing.get_type_hints(kind).items()}
    scalars = (str, int, float)
    for name, value in values.items():
        hint = hints.get(name, "None list")
        fits = (
            isinstance(value, scalars)
            or (value is None and ("None" in hint or "Optional" in hint))
            or (
                isinstance(value, list) and "list" in hint.lower() and all(isinstance(each, scalars) for each in value)
            )
            or (isinstance(value, dict) and ("dict" in hint.lower() or name == "env"))
        )
        if not fits:
            shown = reprlib.repr(value)
            raise SystemExit(f"error: --config: {path}: {name!r} takes no {type(value).__name__}, such as {shown}.")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Print an error that names its cause and remedy without a traceback, and exit with 1."""
    from tgol_trainer.data import DataError
    from tgol_trainer.saving.hub import PushError
    from tgol_trainer.thresholds import ThresholdError

    try:
        yield
    except (DataError, PushError, ThresholdError) as error:
        raise _plain(error) from error
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        # This library's own errors say what to change, and those about a path name it. Errors of other libraries need
        # their traceback.
        if not (_raised_here(error) or isinstance(error, _PATH_ERRORS)):
            raise
        raise _plain(error) from error


def _plain(error: Exception) -> SystemExit:
    print(f"error: {error}", file=sys.stderr)
    return SystemExit(1)


def _raised_here(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])


def add_hub_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that push a folder of shards when it is complete."""
    group = parser.add_argument_group("the Hub", "the token is that of HF_TOKEN or of `hf auth login`")
    group.add_argument("--push_to_hub", action="store_true", help="push the dataset with a card when it is complete")
    group.add_argument("--hub_dataset_id", help="repository, owner/name (default: yours, named like the folder)")
    group.add_argument("--hub_private_repo", action="store_true", default=None, help="hide a new repository")
    group.add_argument("--hub_revision", help="branch, made where missing (default: main)")


def open_dataset(args: argparse.Namespace) -> Repository | None:
    """Make the repository before the work, so that a wrong token does not cost it; None without `--push_to_hub`."""
    from tgol_trainer.saving.hub import Repository, open_repository, resume_command

    if args.hub_dataset_id and not args.push_to_hub:
        raise ValueError("`--hub_dataset_id` has no effect without `--push_to_hub`.")
    if not args.push_to_hub or os.environ.get("RANK", "0") != "0":
        return None
    name = args.hub_dataset_id or args.output_dir.resolve().name
    target = open_repository(Repository(name, "dataset", revision=args.hub_revision), private=args.hub_private_repo)
    resume = resume_command(args.output_dir, target.id, "dataset", target.revision)
    return dataclasses.replace(target, resume=resume)


def push_complete_dataset(target: Repository | None, folder: Path, message: str) -> int:
    """Push the shards of all processes once they are there; return the exit code."""
    from tgol_trainer.data import DataError
    from tgol_trainer.jobs import push_dataset, wait_for_shards
    from tgol_trainer.saving.hub import PushError

    if target is None:
        return 0
    try:
        wait_for_shards(folder)
        commit = push_dataset(target, folder, message)
    except (DataError, PushError) as error:
        print(f"error: {error}", file=sys.stderr)
        return PUSH_FAILED
    print(f"Pushed and compared: {commit.commit_url}")
    return 0
