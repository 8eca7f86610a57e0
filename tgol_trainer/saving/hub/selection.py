"""Choose the files of a run's folder that are published, and refuse a file that holds a token."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tgol_trainer._secrets import TOKEN
from tgol_trainer.saving.card import FACTS_NAME, read_facts, update_card

from .errors import PushError

logger = logging.getLogger(__name__)

STAGING = "_push"
"""Folder in a run's folder with the files that pushes in the background upload."""

WEIGHTS = ".safetensors"
_PUBLISHED = {WEIGHTS, ".json", ".md", ".txt", ".png", ".jpg", ".jpeg", ".webp", ".gif", ".mp4"}
_TEXT = {".json", ".md", ".txt", ".yaml", ".yml", ".csv", ".jsonl"}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Trainer's state, which names folders of this machine, and the list of a checkpoint's files.
_LOCAL = {"trainer_state.json", "checkpoint.json"}
_SHOWN = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)|^\s*url: *([^\s]+)", re.MULTILINE)


def _is_component(folder: Path) -> bool:
    """Whether `save_pretrained` of a model's component wrote the folder."""
    return any(file.suffix == WEIGHTS or file.name.endswith("config.json") for file in folder.iterdir())


def _shown_by_card(folder: Path) -> set[str]:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return {found for match in _SHOWN.findall(text) for found in match if found}


def _is_private(name: str) -> bool:
    return name.startswith((".", "_")) or name in _LOCAL


def published(folder: str | Path) -> dict[str, Path]:
    """
    Return the files of a run's folder, or of a checkpoint, that are published, by path in the repository.

    These are the weights, JSON, Markdown, text, image and video files at its top, the folders that are components of
    a model, and the images that its card shows. Checkpoints, logs, datasets, pickles, and names that begin with `_`
    or `.` are not published.
    """
    folder = Path(folder)
    shown, chosen, left = _shown_by_card(folder), {}, []
    for entry in sorted(folder.iterdir()):
        if _is_private(entry.name) or _CHECKPOINT.fullmatch(entry.name):
            continue
        files = [entry] if entry.is_file() else sorted(file for file in entry.rglob("*") if file.is_file())
        part = entry.is_dir() and _is_component(entry)
        for file in files:
            path = file.relative_to(folder).as_posix()
            wanted = path in shown or ((file == entry or part) and file.suffix.lower() in _PUBLISHED)
            if wanted and not any(_is_private(name) for name in path.split("/")):
                chosen[path] = file
        if not any(path.split("/")[0] == entry.name for path in chosen):
            left.append(entry.name)
    if left:
        logger.debug("Not pushed from %s: %s.", folder, ", ".join(left))
    return chosen


def run_files(folder: str | Path) -> dict[str, Path]:
    """Return what [`published`] chooses. Raise a [`PushError`] for a folder that does not hold trained weights."""
    if not Path(folder).is_dir():
        raise PushError(f"{folder} is not a folder. Give the output folder of a run.")
    chosen = published(folder)
    if not any(path.endswith(WEIGHTS) for path in chosen):
        raise PushError(f"{folder} has no {WEIGHTS} file, so it is not the output folder of a run. Give that folder.")
    return chosen


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """Return every file of a checkpoint, optimizer and random states included, by its path in the folder."""
    folder = Path(folder)
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith((".", "_"))
    }


def checkpoints(folder: str | Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    entries = Path(folder).iterdir() if Path(folder).is_dir() else ()
    found = [(match, path) for path in entries if (match := _CHECKPOINT.fullmatch(path.name))]
    return [path for match, path in sorted(found, key=lambda pair: int(pair[0][1])) if path.is_dir()]


def refuse_secrets(files: Mapping[str, Path], secrets: Iterable[str | None]) -> None:
    """Raise a [`PushError`] if a text file holds an access token of the Hub's form or one of the secrets in use."""
    known = [secret.strip() for secret in secrets if secret and secret.strip()]
    for path, file in files.items():
        if file.suffix.lower() not in _TEXT:
            continue
        with file.open(encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                if TOKEN.search(line) or any(secret in line for secret in known):
                    raise PushError(
                        f"{file}, line {number}, holds what looks like an access token, and would become public as "
                        f"{path}. Nothing was uploaded. Remove it and revoke the token."
                    )


def point_card_at(folder: str | Path, repository: str) -> None:
    """Make the snippet of a card load from a repository of the Hub instead of the folder or another repository."""
    if not (Path(folder) / FACTS_NAME).is_file():
        return
    facts = read_facts(folder)
    # The argument of every call that loads. `pipe(".")` stays: there the dot is a prompt.
    old = re.escape(repr(facts.hub_model_id or "."))
    usage = re.sub(rf"(?<!pipe)\((\s*){old}", rf"(\1{repository!r}", facts.usage)
    if facts.hub_model_id != repository or usage != facts.usage:
        name = facts.model_name if facts.hub_model_id else repository.rpartition("/")[2]
        update_card(folder, usage=usage, hub_model_id=repository, model_name=name)
