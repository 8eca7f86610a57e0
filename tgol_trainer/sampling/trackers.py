"""Send images to the trackers that Trainer reports to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def log_images(
    callbacks: Iterable[TrainerCallback],
    names: Sequence[str],
    captions: Sequence[str],
    images: Sequence[Image.Image],
    step: int,
) -> None:
    """
    Send images to TensorBoard, W&B and trackio, as far as the run reports to them.

    Args:
        callbacks (`Iterable[transformers.TrainerCallback]`):
            The callbacks of a Trainer on its first process. Images go through Trainer's own integrations.
        names (`Sequence[str]`):
            One name per image, the same at every step. TensorBoard and trackio show one series per name.
        captions (`Sequence[str]`): One caption per image, for W&B and trackio.
        images (`Sequence[PIL.Image.Image]`): The images.
        step (`int`): Number of updates made so far.
    """
    for callback in callbacks:
        if isinstance(callback, TensorBoardCallback):
            if (writer := callback.tb_writer) is not None:
                for name, image in zip(names, images, strict=True):
                    writer.add_image(f"samples/{name}", np.asarray(image.convert("RGB")), step, dataformats="HWC")
                writer.flush()
        elif isinstance(callback, WandbCallback):
            import wandb

            if wandb.run is not None:
                shown = [wandb.Image(image, caption=text) for image, text in zip(images, captions, strict=True)]
                wandb.log({"samples": shown, "train/global_step": step})
        elif isinstance(callback, TrackioCallback):
            import trackio

            found = zip(names, captions, images, strict=True)
            logged = {f"samples/{name}": trackio.Image(image, caption=text) for name, text, image in found}
            trackio.log({**logged, "train/global_step": step})
