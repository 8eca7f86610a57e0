"""Checkpoints that are whole or not there: what one must hold, which one is the newest, which may go."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import shutil
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME

from tgol_trainer._files import write_json
from tgol_trainer.adapters import WEIGHTS_NAME

from .card import FACTS_NAME
from .files import ARGUMENTS_NAME, STATE_NAME
from .hub import checkpoints

logger = logging.getLogger(__name__)

CONTENTS_NAME = "checkpoint.json"
"""File of a checkpoint that lists the others with their sizes and hashes; written last."""

DRAFTS = "_saving"
"""Folder in a run's folder where checkpoints and weights are written before they are moved to their place."""

_HASHED_AT_ONCE = 2**20
# The card and the list of settings are for people, who may change them.
_NOT_NEEDED = {"README.md", FACTS_NAME, ARGUMENTS_NAME}
_EXPECTED = (WEIGHTS_NAME, OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME, STATE_NAME, CONTENTS_NAME)


class SaveError(OSError):
    """What was to be saved could not be written; the message names the cause, the remedy and what is left."""


def seal(folder: Path, *, resumable: bool) -> None:
    """
    Write down what a checkpoint holds, when all of it is written.

    Args:
        folder (`Path`): The checkpoint.
        resumable (`bool`): Whether optimizer and scheduler are among it.
    """
    files = {
        path.relative_to(folder).as_posix(): [path.stat().st_size, _hash(path)]
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _NOT_NEEDED
    }
    write_json(folder / CONTENTS_NAME, {"resumable": resumable, "files": files})


def flaws(folder: Path) -> list[str]:
    """Return why training cannot go on from a checkpoint; an empty list if it can."""
    if not folder.is_dir():
        return ["there is no such folder"]
    if not (folder / CONTENTS_NAME).is_file():
        return [f"it holds no {', '.join(name for name in _EXPECTED if not (folder / name).exists())}"]
    try:
        contents = json.loads((folder / CONTENTS_NAME).read_text(encoding="utf-8"))
    except ValueError:
        return [f"its {CONTENTS_NAME} cannot be read"]
    missing = [name for name in contents["files"] if not (folder / name).is_file()]
    found = [f"it holds no {', '.join(missing)}"] if missing else []
    for name, (size, digest) in contents["files"].items():
        file = folder / name
        if name not in missing and file.stat().st_size != size:
            found.append(f"its {name} has {file.stat().st_size} bytes instead of {size}")
        elif name not in missing and _hash(file) != digest:
            found.append(f"its {name} holds other bytes than were written")
    if not contents["resumable"]:
        found.append("it was saved with `save_only_model=True`, without optimizer and scheduler")
    if not found:
        try:
            broken = not_finite(folder)
        except SafetensorError as error:
            return [f"its weights cannot be read ({error})"]
        found += [f"its weights are not finite (such as {broken})"] if broken else []
    return found


def _hash(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with file.open("rb") as opened:
        while part := opened.read(_HASHED_AT_ONCE):
            digest.update(part)
    return digest.hexdigest()


def newest_complete(folder: str | Path, *, warn: bool = False) -> Path | None:
    """
    Return the newest checkpoint that training can go on from; `None` if there is none.

    Args:
        folder (`str` or `Path`): Output folder of a run.
        warn (`bool`, *optional*, defaults to `False`): Log each newer one that is passed over, and why.
    """
    for checkpoint in reversed(checkpoints(folder)):
        found = flaws(checkpoint)
        if not found:
            return checkpoint
        if warn:
            logger.warning("%s is passed over: %s.", checkpoint, "; ".join(found))
    return None


def optimizer_state(checkpoint: str, name: str) -> Path:
    """Return where a checkpoint holds the optimizer's state; without it Trainer would begin with a fresh optimizer."""
    place = Path(checkpoint, name)
    if not place.exists():
        raise FileNotFoundError(
            f"{checkpoint} holds no {name}: its run was divided in another way (`fsdp`, `deepspeed`). Go on in "
            "the way it began, or start a new run with `adapter_name_or_path` at the checkpoint."
        )
    return place


def last_good(folder: str | Path) -> str:
    """Return the sentence of an error message that names the checkpoint to go on from."""
    checkpoint = newest_complete(folder)
    if checkpoint is None:
        return "No checkpoint had been written."
    return f"The last finite checkpoint is {checkpoint}."


def rotate(newest: Path, limit: int | None, best: str | None) -> None:
    """
    Delete the oldest checkpoints beyond a limit, as Trainer counts them; the newest and the best stay.

    Args:
        newest (`Path`): The checkpoint that was just read back.
        limit (`int`, *optional*): Trainer's `save_total_limit`. `None` or less than 1 keeps all.
        best (`str`, *optional*): Path of the best checkpoint.
    """
    if limit is None or limit < 1:
        return
    # By time: those of an attempt that was given up may have higher numbers.
    found = sorted(checkpoints(newest.parent), key=lambda path: path.stat().st_mtime)
    kept = {newest.name, *([Path(best).name] if best else [])}
    surplus = len(found) - max(limit, len(kept))
    for old in [path for path in found if path.name not in kept][: max(surplus, 0)]:
        aside = old.parent / DRAFTS / old.name  # what a kill leaves of it there is no checkpoint
        try:
            aside.parent.mkdir(exist_ok=True)
            os.replace(old, aside)
            shutil.rmtree(aside.parent)
        except OSError as error:
            logger.warning("%s is beyond `save_total_limit` and could not be removed: %s.", old, error)


# ---- Weights ----


def _weight_files(place: Path) -> list[Path]:
    return [place] if place.is_file() else sorted(place.rglob("*.safetensors"))


def not_finite(folder: Path) -> str | None:
    """Return the name of a tensor below a folder that holds NaN or infinity; `None` if there is none."""
    for path in _weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                tensor = file.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    return name
    return None


def read_back(place: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """
    Compare the weights that were written with what was to be written.

    Args:
        place (`Path`): A safetensors file, or a folder of them.
        wanted (`Mapping[str, tuple]`): Shape of each tensor by its name.

    Raises:
        SaveError: if a tensor is missing, unknown or of another shape.
    """
    held: dict[str, tuple[int, ...]] = {}
    for path in _weight_files(place):
        with safe_open(path, framework="pt") as file:
            held |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    wrong = sorted(name for name in {*held, *wanted} if held.get(name) != wanted.get(name))
    if wrong:
        raise SaveError(
            f"The weights in {place} were read back, and {len(wrong)} of {len(wanted)} tensors are missing, unknown "
            f"or of another shape (such as {wrong[0]}). Nothing was replaced."
        )


# ---- Failures ----


@contextlib.contextmanager
def explained_reads(checkpoint: str | None) -> Iterator[None]:
    """Say what it means where a file of tensors and numbers holds something else, which is never run."""
    try:
        yield
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{checkpoint} holds a file that is not one of this library: {str(error).splitlines()[0]} Files such as "
            "optimizer.pt and rng_state.pth could run code, and nothing but tensors and numbers is read from them. "
            "Use a checkpoint that you trust."
        ) from error


@contextlib.contextmanager
def explained_writes(folder: Path, step: int) -> Iterator[None]:
    """Turn what a disk, torch and safetensors say of a failed write into a [`SaveError`]; `folder` is the run's."""
    try:
        yield
    except SaveError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        # On a full disk torch.save says "unexpected pos 158912 vs 158800" or "basic_ios::clear: iostream error".
        if isinstance(error, RuntimeError) and not _raised_by_torch_save(error):
            raise
        free = f", where {shutil.disk_usage(folder).free // 2**20} MB are free" if folder.is_dir() else ""
        raise SaveError(
            f"Step {step} could not be saved in {folder}{free}: {error}. {last_good(folder)} Make room or mend the "
            "disk, then go on with `--resume_from_checkpoint true`."
        ) from error


def _raised_by_torch_save(error: RuntimeError) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename == torch.serialization.__file__
