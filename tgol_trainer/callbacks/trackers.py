"""Pictures for the trackers that Trainer reports to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def log_pictures(
    callbacks: Iterable[TrainerCallback],
    names: Sequence[str],
    captions: Sequence[str],
    pictures: Sequence[Image.Image],
    step: int,
) -> None:
    """
    Send pictures to TensorBoard, W&B and trackio, to those of the three that a run reports to.

    Args:
        callbacks (`Iterable[transformers.TrainerCallback]`):
            Those of a Trainer on its first process; Trainer's own integrations among them are written through.
        names (`Sequence[str]`):
            One a picture, the same at every step: TensorBoard and trackio show one series for each.
        captions (`Sequence[str]`):
            One a picture, for W&B and trackio.
        pictures (`Sequence[PIL.Image.Image]`):
            The pictures.
        step (`int`):
            Updates made so far.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            if (writer := callback.tb_writer) is not None:
                for name, picture in zip(names, pictures, strict=True):
                    writer.add_image(f"samples/{name}", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
                writer.flush()
        elif isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                shown = [wandb.Image(picture, caption=text) for picture, text in zip(pictures, captions, strict=True)]
                wandb.log({"samples": shown, "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import trackio

            found = zip(names, captions, pictures, strict=True)
            images = {f"samples/{name}": trackio.Image(picture, caption=text) for name, text, picture in found}
            trackio.log({**images, "train/global_step": step})
