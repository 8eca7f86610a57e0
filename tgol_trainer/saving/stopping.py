"""Stop a run on a signal: finish the step, save a checkpoint on all processes, and say how to go on."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tgol_trainer.data import StreamPasses

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)]


class TrainingStopped(Exception):
    """
    A signal stopped training, and a checkpoint is saved.

    Args:
        signal (`int`): Number of the signal.
        checkpoint (`str`): The checkpoint.
    """

    def __init__(self, signal: int, checkpoint: str) -> None:
        super().__init__(
            f"{_name(signal)} stopped training. {checkpoint} is saved; `resume_from_checkpoint=True` goes on from it."
        )
        self.signal, self.checkpoint = signal, checkpoint


class StopOnSignal(TrainerCallback):
    """
    Save a checkpoint and raise [`TrainingStopped`] on SIGTERM, SIGUSR1 and Ctrl-C.

    The step that runs is finished; with several processes also the next one, on which they agree. An evaluation that
    is due then is left out, since schedulers kill what does not end soon. A second Ctrl-C ends the process at once.
    `tgol train` uses it; elsewhere hand it in with `callbacks`, the last of them. Signals are handled during training
    alone, and only where it runs in the main thread.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}
        self._others: list[Any] = []
        self._asked: tuple[torch.Tensor, Any] | None = None
        self._stopping = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Handle signals from here on, in this process alone: what loads data for it goes on until it is stopped."""
        self.received = self._stopping = 0
        self._asked = None
        loader = kwargs["train_dataloader"]
        loader = getattr(loader, "base_dataloader", loader)
        if isinstance(loader.dataset, StreamPasses):  # the workers are those of the loader within
            loader = loader.dataset.loader
        loader.worker_init_fn = functools.partial(_start_unstopped, loader.worker_init_fn)
        self._before = {number: signal.signal(number, self._receive) for number in _SIGNALS}
        self._others = multiprocessing.active_children()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received:
            self.restore()
            raise KeyboardInterrupt
        if not self.received and os.environ.get("RANK", "0") == "0":
            again = " Once more ends it at once." if number == signal.SIGINT else ""
            # A handler may interrupt a write of the log, whose lock it would wait for.
            os.write(2, f"\n{_name(number)}: training stops after this step and saves a checkpoint.{again}\n".encode())
        self.received = number

    def restore(self) -> None:
        """Handle signals as before training."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            started = [child for child in multiprocessing.active_children() if child not in self._others]
            atexit.register(_end, started)
        self._before = {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint if any process received a signal."""
        self._stopping = self._agreed(args.device)
        if self._stopping:
            control.should_save = control.should_log = control.should_training_stop = True
            control.should_evaluate = False
            args.save_only_model = False

    def _agreed(self, device: torch.device) -> int:
        """Return the signal that all processes stop for, or 0."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return self.received
        # The answer is read one step later, when it has arrived: no step waits for it.
        flag = torch.tensor([self.received], device=device)
        before, self._asked = self._asked, (flag, torch.distributed.all_reduce(flag, async_op=True, op=_MAX))
        if before is None:
            return 0
        before[1].wait()
        return int(before[0].item())

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop, once the checkpoint is there."""
        if self._stopping:
            raise TrainingStopped(
                self._stopping, os.path.join(args.output_dir or "", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            )


_MAX = torch.distributed.ReduceOp.MAX if torch.distributed.is_available() else None


def _start_unstopped(start: Callable[[int], None] | None, worker: int) -> None:
    """Start a worker that takes no signal: schedulers and terminals send theirs to every process of a job."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if start is not None:
        start(worker)


def _end(workers: list[Any]) -> None:
    """End what still loads data when this process exits: it takes no SIGTERM, and Python would wait for it."""
    for worker in workers:
        if worker.daemon and worker.is_alive():
            worker.kill()


def _name(number: int) -> str:
    return signal.Signals(number).name
