"""Load a pipeline with its adapter onto the device of this process."""

from __future__ import annotations

import os
from typing import Any

import torch

from tgol_trainer import adapters
from tgol_trainer.families import FamilySettings, load_family
from tgol_trainer.rewards import REWARDS, load_reward
from tgol_trainer.saving.files import recorded_expert


def load_adapted_pipeline(
    model: str,
    adapter: str | None = None,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    num_frames: int | None = None,
    use_cpu: bool = False,
) -> tuple[Any, str | None]:
    """
    Load a pipeline, and an adapter into it, onto the device of this process.

    Args:
        model (`str`): Hub id, folder, or the name of an embedded model.
        adapter (`str`, *optional*): Folder or Hub id of a LoRA adapter or of fully fine-tuned weights.
        revision (`str`, *optional*): Revision on the Hub.
        dtype (`str`, *optional*): Name of a torch dtype.
        model_init_kwargs (`dict`, *optional*): Further options of [`load_family`].
        num_frames (`int`, *optional*):
            Frames of the videos that will be generated; a number that the model does not take is refused at once.
        use_cpu (`bool`, *optional*, defaults to `False`): Leave a GPU unused.

    Returns:
        `tuple`: the pipeline, and the revision that was loaded, if it is known.

    Raises:
        ValueError: for an unsupported pipeline, an adapter without weights for it, a number of frames that does not
            fit, options that an embedded model does not have, or an option that is given twice.
    """
    options = {name: value for name, value in (("revision", revision), ("dtype", dtype)) if value is not None}
    twice = options.keys() & (model_init_kwargs or {})
    if twice:
        raise ValueError(f"`model_init_kwargs`: {min(twice)!r} is also given on its own. Give it once.")
    options |= model_init_kwargs or {}
    expert = None if adapter is None else recorded_expert(adapter)
    family = load_family(model, options, FamilySettings(num_frames=num_frames, expert=expert))
    if adapter is not None:
        adapters.load_trained(family.pipeline, family.denoiser_name, adapter)
    return family.to(process_device(use_cpu)).pipeline, family.origin.revision


def process_device(use_cpu: bool) -> str:
    """Return the device of this process: its GPU, or `"cpu"` without one or with `use_cpu`."""
    if use_cpu or not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"


def load_image_features(spec: str, device: str) -> Any:
    """Load a function `(images) -> (n, D)` from the name of a reward with image features, or `module:function`."""
    found = load_reward(spec, device=device)
    if spec in REWARDS and not hasattr(found, "image_features"):
        raise ValueError(f"`features`: {spec!r} has no image features. Use clip, pickscore or hpsv2.1.")
    return getattr(found, "image_features", found)
