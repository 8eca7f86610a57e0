"""Load a pipeline with its adapter onto the device of this process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from tgol_trainer import adapters
from tgol_trainer.families import FamilySettings, load_family
from tgol_trainer.rewards import REWARDS, load_reward
from tgol_trainer.saving.files import recorded_expert

EXPERTS = ("high_noise", "low_noise")


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
        adapter (`str`, *optional*):
            Folder or Hub id of a LoRA adapter or of fully fine-tuned weights. A folder with `high_noise` and
            `low_noise` in it, one run each, loads both into the two transformers of Wan 2.2 A14B.
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
    sources = {} if adapter is None else _by_expert(adapter)
    family = load_family(model, options, FamilySettings(num_frames=num_frames, expert=next(iter(sources), None)))
    for expert, source in sources.items():
        denoiser = "transformer_2" if expert == "low_noise" else family.denoiser_name
        adapters.load_trained(family.pipeline, denoiser, source)
    return family.to(process_device(use_cpu)).pipeline, family.origin.revision


def _by_expert(adapter: str) -> dict[str | None, str]:
    """Return the adapters of both experts, where a folder holds them, or the one, by what each was trained for."""
    folders: dict[str | None, str] = {expert: str(Path(adapter).expanduser() / expert) for expert in EXPERTS}
    if not all(Path(folder).is_dir() for folder in folders.values()):
        return {recorded_expert(adapter): adapter}
    for expert, folder in folders.items():
        if (recorded := recorded_expert(folder) or expert) != expert:
            raise ValueError(f"{folder} holds an adapter that was trained for {recorded}. Rename the folders.")
    return folders


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
