"""The start of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class EpochStart(TrainerCallback):
    """
    Call a function at the start of each epoch.

    Args:
        action (`Callable`):
            Takes the epoch as Trainer counts it, fractional where training resumes inside one, and whether it is the
            first since `train()` was called.
    """

    def __init__(self, action: Callable[[float, bool], None]) -> None:
        self.action = action
        self.first = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the next epoch is the first."""
        self.first = True

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Run the action."""
        self.action(state.epoch or 0.0, self.first)
        self.first = False
