"""What a model does, measured before and after an export."""

from __future__ import annotations

import dataclasses
import logging

import numpy as np
import torch

from tgol_trainer import adapters
from tgol_trainer.evaluation import generate_images, generate_videos
from tgol_trainer.families import ModelFamily
from tgol_trainer.likelihoods import RowGenerators
from tgol_trainer.saving.card import ExportRow

from .comfyui import LoraModule, lora_modules
from .formats import adapter_state

logger = logging.getLogger(__name__)

# Equal weights give outputs that differ by this share of the largest, when sums are taken in another order.
_ORDER_OF_SUMS = 1e-5

TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
"""Precisions an export can have, to the share of training's own effect that an adapter may lose to rounding."""

ROUNDED_BASE = {torch.float32: 0.0, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The share of the largest output by which a merged model may differ: all of its weights are rounded after merging."""

_NOTEWORTHY = 0.1

_STEPS = 2


class ExportError(ValueError):
    """What was read back is not what was trained; nothing was written."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """
    What a model gives.

    Args:
        output (`torch.Tensor`):
            Float32 on the CPU, of the denoiser on a fixed input.
        image (`np.ndarray`):
            One image, or the frames of a clip, 0 to 255.
    """

    output: torch.Tensor
    image: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trained:
    """
    What a trained model is and gives, kept while the model itself is not.

    Args:
        observation ([`Observation`]):
            What it gives.
        effect (`float`):
            Largest difference of its output from the base model's.
        state (`dict[str, torch.Tensor]`):
            The adapter's tensors under PEFT's names, on the CPU, in the precision of the export; empty without one.
        modules (`dict[str, LoraModule]`):
            The same by module.
    """

    observation: Observation
    effect: float
    state: dict[str, torch.Tensor]
    modules: dict[str, LoraModule]


def observe(family: ModelFamily, prompt: str) -> Observation:
    """
    Run a model on fixed inputs: one pass of the denoiser, and one image in two steps.

    Args:
        family ([`ModelFamily`]):
            The model.
        prompt (`str`):
            Of the image.

    Returns:
        [`Observation`]
    """
    pixels = family.probe_pixels(RowGenerators(0, 0, [0]))
    height, width = pixels.shape[-2:]
    if family.num_frames is None:
        images = generate_images(
            family.pipeline,
            [prompt],
            [0],
            num_inference_steps=_STEPS,
            height=height,
            width=width,
            progress=False,
        )
    else:
        images = generate_videos(
            family.pipeline,
            [prompt],
            [0],
            num_frames=pixels.shape[2],
            num_inference_steps=_STEPS,
            height=height,
            width=width,
            progress=False,
        )[0]
    image = np.stack([np.asarray(image, dtype=np.float64) for image in images])
    return Observation(family.probe().float().cpu(), image)


def remember(family: ModelFamily, base_output: torch.Tensor, prompt: str, dtype: torch.dtype) -> Trained:
    """
    Measure a trained model, then round its adapter to the precision of the export.

    Args:
        family ([`ModelFamily`]):
            With the trained weights; its adapter's tensors change to `dtype`.
        base_output (`torch.Tensor`):
            Output of the base model on the fixed input.
        prompt (`str`):
            Of the image.
        dtype (`torch.dtype`):
            Precision of the export.

    Returns:
        [`Trained`]
    """
    observation = observe(family, prompt)
    effect = largest(observation.output - base_output)
    if not getattr(family.denoiser, "peft_config", None):
        return Trained(observation, effect, {}, {})
    for parameter in family.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    modules = {
        path: dataclasses.replace(module, first=module.first.cpu().clone(), second=module.second.cpu().clone())
        for path, module in lora_modules(family.denoiser, adapters.POLICY).items()
    }
    return Trained(observation, effect, adapter_state(family), modules)


def compare(
    row: ExportRow, found: Observation, trained: Trained, dtype: torch.dtype, *, rounds_base: bool = False
) -> None:
    """
    Measure how far an export is from the trained model.

    Args:
        row ([`card.ExportRow`]):
            Gets the differences.
        found ([`Observation`]):
            Of the export in a fresh model.
        trained ([`Trained`]):
            What it should be.
        dtype (`torch.dtype`):
            Precision of the export.
        rounds_base (`bool`, *optional*, defaults to `False`):
            Whether the weights that training did not change were rounded with the others.

    Raises:
        ExportError: where they differ by more than rounding can explain.
    """
    expected = trained.observation
    row.effect = trained.effect
    row.difference = largest(found.output - expected.output)
    row.image_difference = float(np.abs(found.image - expected.image).mean())
    share = max(_ORDER_OF_SUMS, ROUNDED_BASE[dtype] if rounds_base else 0.0)
    allowed = max(TOLERANCE[dtype] * trained.effect, share * largest(expected.output))
    if not row.difference <= allowed:
        raise ExportError(
            f"The {row.format} export gives another output than the trained model: they differ by "
            f"{row.difference:.3g}, where {allowed:.3g} can be rounding and training itself moved the output by "
            f"{trained.effect:.3g}. Nothing was written. Please report this with the adapter's configuration."
        )
    if row.difference > max(_NOTEWORTHY * trained.effect, _ORDER_OF_SUMS * largest(expected.output)):
        logger.warning(
            "Rounding to %s moved the output by %.2g, %.0f%% of what training did (%.2g). In float32 nothing is lost.",
            *(row.dtype, row.difference, 100 * row.difference / max(trained.effect, 1e-30), trained.effect),
        )


def check_state(found: dict[str, torch.Tensor], trained: Trained) -> bool:
    """
    Compare the tensors that arrived in a fresh model with those trained.

    Args:
        found (`dict[str, torch.Tensor]`):
            Under PEFT's names, on the CPU.
        trained ([`Trained`]):
            What they should be.

    Returns:
        `bool`: whether all are equal, bit for bit.

    Raises:
        ExportError: if some are missing, or there are others.
    """
    unmatched = found.keys() ^ trained.state.keys()
    if unmatched:
        raise ExportError(
            f"Read back from the export: {len(found)} tensors, where {len(trained.state)} were trained; "
            f"{len(unmatched)} do not match, such as {min(unmatched)}. Nothing was written."
        )
    return all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in trained.state.items()
    )


def check_modules(found: dict[str, LoraModule], trained: Trained) -> bool:
    """
    Compare the updates that a file for ComfyUI holds with those trained; magnitudes of DoRA are compared by output.

    Args:
        found (`dict[str, LoraModule]`):
            Converted back.
        trained ([`Trained`]):
            What they should be.

    Returns:
        `bool`: whether all matrices and scales are equal, bit for bit.

    Raises:
        ExportError: if some are missing, or there are others.
    """
    if found.keys() != trained.modules.keys():
        raise ExportError(
            f"Read back from the export: {len(found)} modules, where {len(trained.modules)} were trained. Nothing was "
            "written."
        )
    return all(
        torch.equal(found[path].first, module.first)
        and torch.equal(found[path].second, module.second)
        and found[path].scaling == module.scaling
        for path, module in trained.modules.items()
    )


def largest(difference: torch.Tensor) -> float:
    """The largest absolute value."""
    return difference.abs().max().item()
