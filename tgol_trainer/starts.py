"""What happens when training starts: a look at what the base model predicts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .data import Collator, ScoredDataset
from .families.conditioning import Conditioning
from .likelihoods import Draw, Likelihood, RowGenerators

_ROWS = 8
_BAD, _GOOD = 0.5, 0.2
"""Shares of a target's mean square that are left of it. An untrained network leaves about 1 of every target."""


class Starts(TrainerCallback):
    """
    Tell the trainer that training or an epoch starts.

    Args:
        begin_training (`Callable[[], None]`): Called before the first step of a run that is not resumed.
        begin_epoch (`Callable[[float, bool], None]`):
            Called with the epoch, and whether it is the first since `train()` was called.
    """

    def __init__(self, begin_training: Callable[[], None], begin_epoch: Callable[[float, bool], None]) -> None:
        self.begin_training, self.begin_epoch = begin_training, begin_epoch
        self.first = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass it on."""
        self.first = True
        if not state.global_step:
            self.begin_training()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Pass it on."""
        self.begin_epoch(state.epoch or 0.0, self.first)
        self.first = False


def check_base(
    rows: Any,
    collator: Collator,
    batch_size: int,
    likelihood: Likelihood,
    latents: Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, RowGenerators, Conditioning]],
    predict: Callable[[Draw, Conditioning], torch.Tensor],
) -> None:
    """
    Refuse a base model that predicts another target than its likelihood takes it to predict.

    Such a model trains without a word, and is ruined. It is told from an untrained one by what it predicts well: an
    untrained network predicts none of noise, velocity, clean latents and their opposites.

    Args:
        rows (`Any`): Training rows; those of a stream are not looked at.
        collator ([`Collator`]): Makes batches of rows.
        batch_size (`int`): Rows of a pass.
        likelihood ([`Likelihood`]): What the model is taken to predict.
        latents (`Callable[[dict], tuple]`): Returns latents, keys of the noise and conditioning of a batch.
        predict (`Callable[[Draw, dict], torch.Tensor]`): Returns the reference's prediction (B, ...) on a draw.

    Raises:
        ValueError: naming both targets, and the remedy.
    """
    if not isinstance(rows, ScoredDataset):
        return
    chosen = np.arange(len(rows))
    if rows.resolutions is not None:  # a batch holds images of one size
        chosen = np.flatnonzero((rows.resolutions == rows.resolutions[0]).all(axis=1))
    chosen, sums = chosen[:_ROWS], dict[str, torch.Tensor]()
    for start in range(0, len(chosen), batch_size):
        batch = collator([rows[int(index)] for index in chosen[start : start + batch_size]])
        clean, keys, conditioning = latents(batch)
        targets = likelihood.targets(clean, keys)
        if not targets:
            return
        prediction = predict(likelihood.draw(clean, keys), conditioning).float()
        for name, target in targets.items():
            both = torch.stack([((prediction - target) ** 2).sum(), (target**2).sum()])
            sums[name] = sums.get(name, 0) + both
    (own, own_left), *others = ((name, (both[0] / both[1]).item()) for name, both in sums.items())
    other, left = min(others, key=lambda pair: pair[1])
    if own_left > _BAD and left < _GOOD:
        raise ValueError(
            f"The base model does not predict what its configuration says, {own}: on the first rows its error is "
            f"{own_left:.2f} of that target's mean square. Taken to predict {other}, it is {left:.2f}. Training would "
            "ruin it. Load the scheduler that the model was trained with, with its `prediction_type`; "
            "`allow_bad_base=True` trains all the same."
        )
