"""What a callback may use of a run: explicit values, handed over once by the trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from .config import TGOLConfig
    from .saving.card import CardImage


@dataclasses.dataclass(frozen=True)
class Run:
    """
    A training run, as callbacks see it.

    Args:
        args ([`TGOLConfig`]): Settings of the run: folder, device, process, batch sizes.
        pipeline (`Callable[[], ContextManager[DiffusionPipeline]]`):
            Yields the pipeline with the policy in it for a block that calls it with prompts. All of it is on the
            device, but the text encoders only while prompts are encoded that no call had before.
        size (`tuple[int, int]`): (height, width) of training images, in pixels.
        num_frames (`int`, *optional*): Frames of a video; `None` for models of images.
        call_arguments (`Mapping[str, Any]`): Arguments of a pipeline call that suit this model, such as its guidance.
        base_model (`Callable[[bool], ContextManager[bool]]`):
            Puts the base model into the pipeline for a block. Takes whether the policy has moved since it began, and
            yields whether the base model is still to be had.
        gather (`Callable[[list], list]`): Joins the lists of all processes.
        log (`Callable[[dict], None]`): Writes a line of the training log.
        add_card_image (`Callable[[CardImage], None]`): Shows an image on the model card.
        add_limit (`Callable[[str], None]`): Says a sentence among the limits of the model card.
        keep_policy (`Callable[[], Callable[[], None]]`):
            Copies the trained weights; what it returns puts them back.
        callbacks (`Callable[[], list]`): Returns the trainer's callbacks, its trackers among them.
        sharded (`bool`, *optional*, defaults to `False`):
            Whether the network is sharded, so that all processes must call it together.
    """

    args: TGOLConfig
    pipeline: Callable[[], AbstractContextManager[DiffusionPipeline]]
    size: tuple[int, int]
    num_frames: int | None
    call_arguments: Mapping[str, Any]
    base_model: Callable[[bool], AbstractContextManager[bool]]
    gather: Callable[[list[Any]], list[Any]]
    log: Callable[[dict[str, float]], None]
    add_card_image: Callable[[CardImage], None]
    add_limit: Callable[[str], None]
    keep_policy: Callable[[], Callable[[], None]]
    callbacks: Callable[[], list[TrainerCallback]]
    sharded: bool = False


class RunCallback(TrainerCallback):
    """
    A callback that uses the run itself. A trainer takes one of each class.

    [`TGOLTrainer`] calls `prepare` and then `start` once, when the callback is handed to it.
    """

    def prepare(self, args: TGOLConfig, num_frames: int | None) -> None:
        """
        Check the settings and load what they name, before the trainer makes a folder or a repository.

        Args:
            args ([`TGOLConfig`]): Settings of the run.
            num_frames (`int`, *optional*): Frames of a video; `None` for models of images.

        Raises:
            ValueError: for settings of the callback that do not fit the run.
        """

    def start(self, run: Run) -> None:
        """
        Take over the run.

        Args:
            run ([`Run`]): The run.
        """

    def evaluate(self, state: TrainerState, control: TrainerControl, in_train: bool) -> dict[str, float]:
        """
        Return metrics for an evaluation at this moment; empty by default.

        Args:
            state (`transformers.TrainerState`): State of the run.
            control (`transformers.TrainerControl`): Flags of the training loop.
            in_train (`bool`): Whether the evaluation happens during training.
        """
        return {}
