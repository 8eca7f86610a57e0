"""Load the base model of a run as its configuration says."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import TGOLConfig, check_sides, size_of
from .families import FamilySettings, ModelFamily, StoredBlocks, load_family
from .families.skeleton import check_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)


def load_model(
    model: str | Path | DiffusionPipeline, args: TGOLConfig, quantization_config: Any = None
) -> ModelFamily:
    """
    Load a pipeline, and put the denoiser on the device of the run.

    Args:
        model (`str`, `Path` or `diffusers.DiffusionPipeline`): As in [`TGOLTrainer`].
        args ([`TGOLConfig`]): The configuration of the run.
        quantization_config (`Any`, *optional*): As in [`TGOLTrainer`].

    Returns:
        [`ModelFamily`]

    Raises:
        ValueError: see [`load_family`]; also for a denoiser that is quantised and trained, and, before weights are
            loaded where configs tell, for a `resolution` that the model does not take.
    """
    options = args.pipeline_kwargs
    if quantization_config is not None:
        if args.full_finetuning:
            raise ValueError("`quantization_config` freezes the weights that `full_finetuning=True` would train.")
        options["quantization_config"] = quantization_config
    settings = FamilySettings(
        timestep_sampling=None if args.timestep_sampling == "family" else args.timestep_sampling,
        guidance=args.train_guidance,
        num_frames=args.num_frames,
        expert=args.expert,
        vae_tiling=args.vae_tiling,
        text_encoders_in_4bit=args.text_encoders_in_4bit,
        size=size_of(args.resolution),
    )
    check_size(model, options, settings, resolution=args.resolution)
    family = load_family(model, options, settings, None if args.full_finetuning else args.device)
    check_sides(family.resolution_multiple, family.max_side, resolution=args.resolution)
    if args.n_gpu > 1:
        logger.warning("%d GPUs are visible, one process uses one; `accelerate launch` uses all.", args.n_gpu)
        args._n_gpu = 1
    if args.group_offload or args.storage_dtype:
        family.blocks = StoredBlocks(family.denoiser, args.device, args.group_offload, args.storage_dtype)
    family.place_denoiser(args.device)
    return family
