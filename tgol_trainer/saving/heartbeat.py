"""Report a process that stops answering, since the others of a run wait for it without a word."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

PERIOD = 5.0
"""Seconds between two signs of life of a process."""

SILENCE = 40.0
"""Seconds without one, or of a process being behind, after which it is reported."""


class Store(Protocol):
    """What processes share, such as `torch.distributed.TCPStore`."""

    def set(self, key: str, value: str) -> None:
        """Write a value."""

    def get(self, key: str) -> bytes:
        """Read a value; it waits for one that nobody has written yet."""


class Watch:
    """
    Signs of life of the processes of a run.

    Args:
        store ([`Store`]): Where each process writes its own.
        rank (`int`): This process.
        world_size (`int`): Number of processes.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store, self.rank = store, rank
        # The first process watches all others, and the second one watches the first.
        self.watched = [
            other for other in range(world_size) if other != rank and (rank == 0 or (rank, other) == (1, 0))
        ]
        self.begun = self._beats = 0
        self._place = f"{socket.gethostname()}, pid {os.getpid()}"
        self._seen: dict[int, tuple[str, float]] = {}
        self._behind: dict[int, float] = {}
        self._reported: set[int] = set()
        self.beat()

    def beat(self) -> None:
        """Write a sign of life of this process, with the number of batches that it has begun."""
        self._beats += 1
        self.store.set(_key(self.rank), f"{self._beats}|{self.begun}|{self._place}")

    def look(self, now: float) -> list[str]:
        """
        Return what is to be said of the other processes.

        Args:
            now (`float`): Seconds of a clock.
        """
        said = []
        for other in self.watched:
            text = self.store.get(_key(other)).decode()
            begun, place = text.split("|", 2)[1:]
            if self._seen.get(other, ("", now))[0] != text:
                self._seen[other] = (text, now)
            silent = now - self._seen[other][1]
            if int(begun) >= self.begun:
                self._behind[other] = now
            late = now - self._behind.setdefault(other, now)
            if silent < SILENCE and late < SILENCE:
                if other in self._reported and late < PERIOD:
                    self._reported.remove(other)
                    said.append(f"Process {other} ({place}) goes on.")
            elif other not in self._reported:
                self._reported.add(other)
                what = (
                    f"has given no sign of life for {silent:.0f} s: it is frozen, killed, or its machine is gone"
                    if silent >= SILENCE
                    else f"answers and has not begun a batch that others began {late:.0f} s ago: it waits for its "
                    "data or its disk"
                )
                said.append(
                    f"Process {other} ({place}) {what}. The others wait for it. If it does not come back, end the "
                    "run, and go on from its last checkpoint with `--resume_from_checkpoint true`."
                )
        return said


class Heartbeat(TrainerCallback):
    """
    Log an error on the first process when another one stops answering, and on the second when the first does.

    Args:
        clock (`Callable[[], float]`, *optional*, defaults to `time.monotonic`): Returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, threading.Event()
        self._watch: Watch | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Start to give signs of life, where there are other processes."""
        self.stop()
        if args.world_size == 1 or not torch.distributed.is_initialized():
            return
        from torch.distributed.distributed_c10d import _get_default_store

        self._watch, self._end = Watch(_get_default_store(), args.process_index, args.world_size), threading.Event()
        torch.distributed.barrier()  # nobody reads what nobody has written
        threading.Thread(target=self._run, args=(self._watch, self._end), daemon=True, name="heartbeat").start()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Count the update."""
        if self._watch is not None:
            self._watch.begun = state.global_step + 1

    def stop(self) -> None:
        """Give no more signs of life."""
        self._end.set()
        self._watch = None

    def _run(self, watch: Watch, end: threading.Event) -> None:
        while not end.wait(PERIOD):
            try:
                watch.beat()
                for text in watch.look(self._clock()):
                    logger.error(text)
            except RuntimeError:  # the store ends with the process that holds it, and so does the run
                return


def _key(rank: int) -> str:
    return f"tgol_trainer/heartbeat/{rank}"
