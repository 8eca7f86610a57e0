"""Where a run starts: anew, at a checkpoint, or not at all because it is finished."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .checkpoints import CONTENTS_NAME, flaws, newest_complete
from .hub import checkpoints

if TYPE_CHECKING:
    from transformers import TrainerState

    from tgol_trainer.config import TGOLConfig

logger = logging.getLogger(__name__)

_PROBE_BYTES = 65536
_SECONDS = 20
"""After a kill, processes that load data end within 5 of them."""


def starting_point(folder: str | Path, asked: str | bool | None) -> Path | None:
    """
    Return the checkpoint that a run starts at; `None` to start anew.

    Args:
        folder (`str` or `Path`): Output folder of the run.
        asked (`str` or `bool`, *optional*):
            A checkpoint; `True` for the newest complete one, or none where there is none; `None` or `False` for a new
            run.

    Raises:
        FileExistsError: for a new run in a folder that holds checkpoints.
        FileNotFoundError: if the checkpoint that was named is not complete.
    """
    there = [checkpoint.name for checkpoint in checkpoints(folder)]
    if asked is True:
        found = newest_complete(folder, warn=True)
        if found is None:
            logger.warning("%s holds no %scheckpoint: training starts anew.", folder, "complete " if there else "")
        return found
    if asked:
        return _named(Path(asked))
    if there:
        raise FileExistsError(
            f"`output_dir` {folder} holds {', '.join(there[:3])}{' and others' if there[3:] else ''} of an earlier "
            "run, which a new run would mix with its own. To go on with that run set `resume_from_checkpoint=True` "
            "(`--resume_from_checkpoint true`). For a new run give another `output_dir`, or remove its checkpoints."
        )
    return None


def _named(checkpoint: Path) -> Path:
    found = flaws(checkpoint)
    if not found:
        later = [other.name for other in checkpoints(checkpoint.parent) if _step(other) > _step(checkpoint)]
        if later:
            logger.warning(
                "%s also holds %s, which later starts with `resume_from_checkpoint=True` may take. Remove what is not "
                "wanted any more.",
                *(checkpoint.parent, ", ".join(later)),
            )
        return checkpoint
    whole = newest_complete(checkpoint) or newest_complete(checkpoint.parent)
    remedy = f"Name {whole}, or" if whole else "Start anew: give another `output_dir`, or"
    raise FileNotFoundError(
        f"`resume_from_checkpoint` {checkpoint} is not a complete checkpoint: {'; '.join(found)}. {remedy} leave "
        "the choice to `resume_from_checkpoint=True`, which takes the newest complete one in `output_dir`."
    )


def _step(checkpoint: Path) -> int:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() else -1


def is_finished(state: TrainerState, args: TGOLConfig, checkpoint: Path) -> bool:
    """
    Return whether a checkpoint is the end of the run that is asked for.

    Args:
        state (`transformers.TrainerState`): That of the checkpoint.
        args ([`TGOLConfig`]): The run that is asked for.
        checkpoint (`Path`): The checkpoint, for the message.

    Raises:
        ValueError: if the run that is asked for ends before the checkpoint.
    """
    step, epoch = state.global_step, state.epoch or 0.0
    name, wanted = ("max_steps", args.max_steps) if args.max_steps > 0 else ("num_train_epochs", args.num_train_epochs)
    last = wanted
    if args.max_steps <= 0:
        if epoch < args.num_train_epochs - 1e-6:
            return False
        last = math.ceil(args.num_train_epochs * step / epoch - 1e-6)
    if step > last:
        raise ValueError(
            f"`{name}` is {wanted:g}, and {checkpoint} is already at step {step} (epoch {epoch:.6g}). Give a larger "
            f"`{name}`, or resume from an earlier checkpoint."
        )
    return step >= last


@contextlib.contextmanager
def alone_in(folder: str | Path) -> Iterator[None]:
    """
    Train in an output folder that no other run trains in; the system lets go of it however this process ends.

    Args:
        folder (`str` or `Path`): Output folder of a run; made where missing. Where a disk has no locks, none is taken.

    Raises:
        FileExistsError: if another run still has the folder after 20 seconds.
    """
    if fcntl is None:
        yield
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        for _ in range(_SECONDS):
            if _lock(handle):
                break
            time.sleep(1)
        else:
            raise FileExistsError(
                f"Another run trains in `output_dir` {folder} at this moment, and the two would replace each other's "
                "checkpoints. Wait for its end, or give another `output_dir`."
            )
        yield
    finally:
        with contextlib.suppress(OSError):  # processes that load data may have the folder open longer
            fcntl.flock(handle, fcntl.LOCK_UN)
        os.close(handle)


def _lock(handle: int) -> bool:
    """Return whether nobody else has a folder, which is now locked if its disk has locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # as on some network disks
        return True
    return True


def open_output(folder: str | Path, needed: int = 0) -> None:
    """
    Make the output folder and write to it, so that a disk that takes nothing does not cost a run.

    Args:
        folder (`str` or `Path`): Output folder of a run. What a killed save left in it is removed.
        needed (`int`, *optional*, defaults to 0): Bytes that a checkpoint takes.

    Raises:
        OSError: if the folder cannot be made, written to, or has too little room.
    """
    root = Path(folder)
    probe = root / f".{CONTENTS_NAME}.probe"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with probe.open("wb") as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())
        probe.unlink()
    except OSError as error:
        raise OSError(
            f"`output_dir` {folder} cannot be written to: {error}. Nothing was trained. Give a folder on a disk with "
            "room that you may write to."
        ) from error
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(
            f"`output_dir` {folder} lies on a disk with {free / 1e6:.0f} MB free, and a checkpoint takes about "
            f"{needed / 1e6:.0f} MB. Nothing was trained. Make room, or give a folder on another disk."
        )
