"""Notice a pass over the data that trains nothing."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tgol_trainer.data import DataError


class EveryPassTrains(TrainerCallback):
    """Stop at a pass over the training data without an update, which Trainer ends a run at, or repeats for ever."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note where the run begins: a resumed run skips what it has seen, which may be all of a pass."""
        self._skips = state.global_step > 0

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note the step."""
        self._step = state.global_step

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Raise a [`data.DataError`] if the step is the same, but for a pass that a resumed run skips."""
        if state.global_step == self._step and not self._skips:
            rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
            raise DataError(
                f"train_dataset: a pass over it made no update, after step {state.global_step} of {state.max_steps}. "
                f"An update takes {rows} rows on each of {args.world_size} processes (`per_device_train_batch_size` × "
                "`gradient_accumulation_steps`), and `dataloader_drop_last` drops a batch that is not full. Use "
                "smaller batches or more rows, and a stream that can be read again for each pass."
            )
        self._skips = False
