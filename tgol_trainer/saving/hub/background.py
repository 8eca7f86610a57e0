"""The pushes of a run: in the background at each save, in the foreground at the end, none failing in silence."""

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

from .errors import PushError
from .push import Repository, Strategy, open_repository, push_files, push_run
from .selection import STAGING, checkpoint_files, published, run_files

logger = logging.getLogger(__name__)


class RunPushes:
    """
    Everything that one run pushes.

    Args:
        target ([`Repository`]):
            As [`open_repository`] returned it.
        folder (`Path`):
            Output folder of the run; `_push` in it keeps what is being uploaded.
        strategy (`str`):
            Trainer's `hub_strategy`.
        always (`bool`):
            Queue every save. Otherwise one that comes while a push runs is left out, as in Trainer, and said to be.
    """

    def __init__(self, target: Repository, folder: Path, strategy: Strategy, always: bool) -> None:
        self.target, self.folder, self.strategy, self.always = target, folder, strategy, always
        self.failed: list[str] = []
        self.missed: list[str] = []
        self._skipped: list[str] = []
        self._waiting: list[tuple[str, Future[Any]]] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="tgol-push")
        shutil.rmtree(folder / STAGING, ignore_errors=True)  # of a run that was killed

    @property
    def busy(self) -> bool:
        """Whether a push is running or waiting."""
        return any(not future.done() for _, future in self._waiting)

    def checkpoint(self, source: Path, message: str) -> None:
        """
        Push a checkpoint's weights with the run's card and images, and the checkpoint itself where so configured.

        The files are linked or copied at once, so that later saves and a deleted checkpoint do no harm.

        Args:
            source (`Path`):
                Folder of the checkpoint.
            message (`str`):
                Title of the commit.
        """
        if self.strategy == "end":
            return
        if self.busy and not self.always:
            self.missed.append(source.name)
            self._skipped.append(source.name)
            logger.info("%s is not pushed: the push before it is still running.", source.name)
            return
        staged = self.folder / STAGING / source.name
        shutil.rmtree(staged, ignore_errors=True)
        _stage(staged / "run", run_files(source), _link)
        _stage(staged / "run", {path: file for path, file in published(self.folder).items() if _beside(path)}, _copy)
        full = self.strategy in ("checkpoint", "all_checkpoints")
        if full:
            _stage(staged / "checkpoint", checkpoint_files(source), _link)
        name = "last-checkpoint" if self.strategy == "checkpoint" else source.name

        def work() -> None:
            try:
                push_files(self.target, staged / "run", run_files(staged / "run"), message)
                if full:
                    files = checkpoint_files(staged / "checkpoint")
                    push_files(self.target, staged / "checkpoint", files, f"{message}, checkpoint", path_in_repo=name)
            finally:
                shutil.rmtree(staged, ignore_errors=True)

        self._submit(source.name, work)

    def _submit(self, name: str, work: Callable[[], Any]) -> Future[Any]:
        future = self._pool.submit(work)
        self._waiting.append((name, future))
        return future

    def final(
        self, message: str, *, blocking: bool = True, token: str | None = None, revision: str | None = None
    ) -> CommitInfo | Future[CommitInfo]:
        """
        Push the run's folder as it is.

        Args:
            message (`str`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Return when the push has ended.
            token (`str`, *optional*), revision (`str`, *optional*):
                Instead of those of the run.

        Returns:
            `huggingface_hub.CommitInfo`, or a future of it.

        Raises:
            PushError: if it fails and `blocking`.
        """
        target = self.target
        if token is not None or revision is not None:
            changed = dataclasses.replace(target, token=token or target.token, revision=revision or target.revision)
            target = open_repository(changed) if changed != target else target
        # Checkpoints that a push missed go now; what is there already is not sent again.
        strategy = self.strategy if self.missed else "end"
        if not blocking:
            return self._submit("the end", lambda: push_run(target, self.folder, message, strategy=strategy))
        commit = push_run(target, self.folder, message, strategy=strategy)
        self.missed = []
        return commit

    def finish(self) -> None:
        """Wait for all, and log each that failed or was left out since the last call."""
        if self.busy:
            logger.info("Waiting for the push in the background to end.")
        waiting, self._waiting = self._waiting, []
        for name, future in waiting:
            error = future.exception()
            if error is not None:
                self.failed.append(name)
                self.missed.append(name)
                text = error if isinstance(error, PushError) else f"{type(error).__name__}: {error}"
                logger.error("The push of %s in the background failed. %s", name, text)
        if self._skipped:
            logger.warning(
                "Not pushed during training, because the push before was still running: %s. `hub_always_push=True` "
                "lets every save wait in line.%s",
                ", ".join(self._skipped),
                " `push_to_hub()` sends them later, where they are still there."
                if self.strategy in ("checkpoint", "all_checkpoints")
                else "",
            )
            self._skipped = []
        shutil.rmtree(self.folder / STAGING, ignore_errors=True)


def _beside(path: str) -> bool:
    """Whether a file of the run's folder goes with a checkpoint's weights: the card, what it shows, and metrics."""
    return Path(path).suffix not in (".safetensors", ".json") or path in ("metrics.json", "card_facts.json")


def _stage(folder: Path, files: Mapping[str, Path], put: Callable[[Path, Path], Any]) -> None:
    for path, source in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).unlink(missing_ok=True)
        put(source, folder / path)


def _copy(source: Path, target: Path) -> None:
    shutil.copy2(source, target)


def _link(source: Path, target: Path) -> None:
    """Give a file that nobody writes to again a second name; a copy where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        _copy(source, target)
