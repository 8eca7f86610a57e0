"""The `tgol` command: each subcommand is a module, imported when it is asked for."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

COMMANDS: dict[str, str] = {
    "quickstart": "align a small embedded model on this machine, from sampling to the model card, in minutes",
    "generate": "make images of prompts, in resumable shards, for scoring",
    "score": "add a column a reward to a dataset of images, in resumable shards",
    "evaluate": "compare adapters with their base model: scores, win rates, diversity, damage, one report",
    "rate": "rate images in the browser: 1 to 5, thumbs, or the better of two, ready for training",
    "convert": "make one row per image with a score from comparisons, ratings or thumbs",
    "export": "write a trained adapter for diffusers, PEFT or ComfyUI, or merged into its base, and prove it",
    "check": "say what training would refuse in a dataset, and what else may be wrong with it",
    "label": "show the labels and weights that training would see, without loading a model",
    "plan": "predict memory and cache of a run from configs alone, and name flags with which it fits a card",
    "push": "push a run or a dataset to the Hub, or continue a push that failed",
    "train": "train an adapter from a dataset with prompt, image and score columns",
}
"""Subcommand, which is also the name of its module here, to what it does."""


def usage() -> str:
    """Return the text of `tgol --help`."""
    width = max(map(len, COMMANDS))
    lines = [
        "usage: tgol <command> [options]",
        "",
        "Align visual generative models from unpaired scores.",
        "",
        "commands:",
        *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
        "",
        "`tgol <command> --help` lists a command's options, `tgol --version` prints the version.",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run a subcommand.

    Args:
        argv (`Sequence[str]`, *optional*): Arguments after the program's name; by default those of the process.

    Returns:
        `int`: exit code; 2 for a command line that is not understood.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command == "--version":
        from tgol_trainer import __version__

        print(f"tgol_trainer {__version__}")
        return 0
    if command not in COMMANDS:
        close = difflib.get_close_matches(command, COMMANDS, n=1)
        hint = f" Did you mean `{close[0]}`?" if close else ""
        print(f"tgol: unknown command {command!r}.{hint}\n\n{usage()}", file=sys.stderr)
        return 2
    return import_module(f".{command}", __name__).main(rest)
