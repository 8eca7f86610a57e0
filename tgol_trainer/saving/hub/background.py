"""The pushes of a run: in the background at each save, in the foreground at the end. Every failure is reported."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo

from .errors import PushError, redacted
from .push import Repository, Strategy, open_repository, push_files, push_run
from .selection import STAGING, checkpoint_files, published, run_files

logger = logging.getLogger(__name__)


class RunPushes:
    """
    All pushes of one run.

    Args:
        target ([`Repository`]): The result of [`open_repository`].
        folder (`Path`): Output folder of the run. `_push` in it holds what is being uploaded.
        strategy (`str`): Trainer's `hub_strategy`.
        always (`bool`):
            Queue every save. Otherwise a save that comes during a push is left out, as in Trainer, and this is logged.
    """

    def __init__(self, target: Repository, folder: Path, strategy: Strategy, always: bool) -> None:
        self.target, self.folder, self.strategy, self.always = target, folder, strategy, always
        self.failed: list[str] = []
        self.missed: list[str] = []
        self._skipped: list[str] = []
        self._waiting: list[tuple[str, Future[Any]]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tgol-push")
        shutil.rmtree(folder / STAGING, ignore_errors=True)  # left by a run that was killed

    def _busy(self) -> bool:
        return any(not future.done() for _, future in self._waiting)

    def checkpoint(self, source: Path, message: str) -> None:
        """
        Push a checkpoint's weights with the run's card and images, and the whole checkpoint if the strategy says so.

        The files are linked or copied at once, so later saves and a deleted checkpoint do not affect the push.

        Args:
            source (`Path`): Folder of the checkpoint.
            message (`str`): Title of the commit.
        """
        if self.strategy == "end":
            return
        if self._busy() and not self.always:
            self.missed.append(source.name)
            self._skipped.append(source.name)
            logger.info("%s is not pushed: the push before it is still running.", source.name)
            return
        staged = self.folder / STAGING / source.name
        shutil.rmtree(staged, ignore_errors=True)
        _stage(staged / "run", run_files(source), _link)
        beside = {path: file for path, file in published(self.folder).items() if _goes_along(path)}
        _stage(staged / "run", beside, shutil.copy2)
        full = self.strategy in ("checkpoint", "all_checkpoints")
        if full:
            _stage(staged / "checkpoint", checkpoint_files(source), _link)
        name = "last-checkpoint" if self.strategy == "checkpoint" else source.name

        def push() -> None:
            try:
                push_files(self.target, staged / "run", run_files(staged / "run"), message)
                if full:
                    files = checkpoint_files(staged / "checkpoint")
                    push_files(self.target, staged / "checkpoint", files, f"{message}, checkpoint", path_in_repo=name)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        self._waiting.append((source.name, self._pool.submit(push)))

    def final(
        self, message: str, *, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | Future[CommitInfo]:
        """
        Push the run's folder as it is now, and the checkpoints that earlier pushes missed.

        Args:
            message (`str`): Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Wait until the push has ended.
            token (`str`, *optional*), revision (`str`, *optional*): Used instead of the run's own.

        Returns:
            `huggingface_hub.CommitInfo`, or a future of it.

        Raises:
            PushError: if the push fails and `blocking` is true.
        """
        target = self.target
        changed = dataclasses.replace(target, token=token or target.token, revision=revision or target.revision)
        if changed != target:
            target = open_repository(changed)
        strategy = self.strategy if self.missed else "end"
        if not blocking:
            future = self._pool.submit(push_run, target, self.folder, message, strategy=strategy)
            self._waiting.append(("the end", future))
            return future
        commit = push_run(target, self.folder, message, strategy=strategy)
        self.missed = []
        return commit

    def finish(self) -> None:
        """Wait for all pushes, and log each that failed or was left out since the last call."""
        if self._busy():
            logger.info("Waiting for the push in the background to end.")
        waiting, self._waiting = self._waiting, []
        for name, future in waiting:
            error = future.exception()
            if error is not None:
                self.failed.append(name)
                self.missed.append(name)
                text = str(error) if isinstance(error, PushError) else f"{type(error).__name__}: {error}"
                logger.error("The push of %s in the background failed. %s", name, redacted(text, self.target.token))
        if self._skipped:
            later = " `push_to_hub()` sends them later if they still exist."
            logger.warning(
                "Not pushed during training, because the push before was still running: %s. `hub_always_push=True` "
                "queues every save.%s",
                ", ".join(self._skipped),
                later if self.strategy in ("checkpoint", "all_checkpoints") else "",
            )
            self._skipped = []
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)


def _goes_along(path: str) -> bool:
    """Whether a file of the run's folder is pushed with a checkpoint's weights: the card, its images, and metrics."""
    return Path(path).suffix not in (".safetensors", ".json") or path in ("metrics.json", "card_facts.json")


def _stage(folder: Path, files: Mapping[str, Path], put: Callable[[Path, Path], Any]) -> None:
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink(missing_ok=True)
        put(source, folder / path)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file that will not be written again, or copy it where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
