"""Compare an exported model with the trained one: the weights, the output on a fixed input, and one image."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from tgol_trainer import adapters
from tgol_trainer.evaluation import generate_images, generate_videos
from tgol_trainer.families import ModelFamily
from tgol_trainer.likelihoods import RowGenerators
from tgol_trainer.saving.card import ExportRow
from tgol_trainer.saving.comfyui import LoraModule, lora_modules

from .formats import adapter_state

logger = logging.getLogger(__name__)

# With equal weights, sums in another order change an output by up to this share of the largest output.
_ORDER_OF_SUMS = 1e-5

TOLERANCE = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.1}
"""The dtypes of an export, and the share of training's effect that an adapter may lose by rounding to each."""

ROUNDED_BASE = {torch.float32: 0.0, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The share of the largest output by which a merged model may differ: all its weights are rounded after merging."""

_NOTEWORTHY = 0.1  # share of training's effect that rounding may take without a warning
_STEPS = 2


class ExportError(ValueError):
    """The model read back is not the trained one. Nothing was written."""


@dataclasses.dataclass(frozen=True)
class Observation:
    """
    The outputs of a model on fixed inputs.

    Args:
        output (`torch.Tensor`): Output of the denoiser, float32 on the CPU.
        image (`np.ndarray`): One image, or the frames of a clip, 0 to 255.
    """

    output: torch.Tensor
    image: np.ndarray


@dataclasses.dataclass(frozen=True)
class Trained:
    """
    The facts of a trained model with which an export is compared after the model itself is freed.

    Args:
        observation ([`Observation`]): Its outputs.
        effect (`float`): Largest difference of its denoiser's output from the base model's.
        state (`dict[str, torch.Tensor]`):
            The adapter's tensors under PEFT's names, on the CPU, in the dtype of the export. Empty without an adapter.
        modules (`dict[str, LoraModule]`): The same tensors by module.
    """

    observation: Observation
    effect: float
    state: dict[str, torch.Tensor]
    modules: dict[str, LoraModule]


def observe(family: ModelFamily, prompt: str) -> Observation:
    """Run one pass of the denoiser on a fixed input, and generate one image in two steps."""
    pixels = family.probe_pixels(RowGenerators(0, 0, [0]))
    height, width = pixels.shape[-2:]
    settings: dict[str, Any] = {"num_inference_steps": _STEPS, "height": height, "width": width, "progress": False}
    if family.num_frames is None:
        images = generate_images(family.pipeline, [prompt], [0], **settings)
    else:
        (images,) = generate_videos(family.pipeline, [prompt], [0], num_frames=pixels.shape[2], **settings)
    image = np.stack([np.asarray(image, dtype=np.float64) for image in images])
    return Observation(family.probe().float().cpu(), image)


def measure_and_round(family: ModelFamily, base_output: torch.Tensor, prompt: str, dtype: torch.dtype) -> Trained:
    """Measure a trained model against the base model's output, then round its adapter to the dtype of the export."""
    observation = observe(family, prompt)
    effect = _largest(observation.output - base_output)
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


def record_differences(
    row: ExportRow, found: Observation, trained: Trained, dtype: torch.dtype, *, rounds_base: bool = False
) -> None:
    """
    Write the differences between an exported and the trained model into `row`.

    `rounds_base` says whether the weights that training did not change were rounded to `dtype` too.

    Raises:
        ExportError: if the models differ by more than rounding can explain.
    """
    expected = trained.observation
    row.effect = trained.effect
    row.difference = _largest(found.output - expected.output)
    row.image_difference = float(np.abs(found.image - expected.image).mean())
    share = max(_ORDER_OF_SUMS, ROUNDED_BASE[dtype] if rounds_base else 0.0)
    allowed = max(TOLERANCE[dtype] * trained.effect, share * _largest(expected.output))
    if not row.difference <= allowed:
        raise ExportError(
            f"The {row.format} export gives another output than the trained model. They differ by "
            f"{row.difference:.3g}, rounding can explain {allowed:.3g}, and training moved the output by "
            f"{trained.effect:.3g}. Nothing was written. Please report this with the adapter's configuration."
        )
    if row.difference > max(_NOTEWORTHY * trained.effect, _ORDER_OF_SUMS * _largest(expected.output)):
        logger.warning(
            "Rounding to %s moved the output by %.2g, which is %.0f%% of the effect of training (%.2g). float32 loses "
            "nothing.",
            *(row.dtype, row.difference, 100 * row.difference / max(trained.effect, 1e-30), trained.effect),
        )


def check_state(found: Mapping[str, torch.Tensor], trained: Trained) -> bool:
    """Return whether the tensors read back equal the trained ones bit for bit. Both are on the CPU."""
    _check_names(found, trained.state, "tensors")
    return all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in trained.state.items()
    )


def check_modules(found: Mapping[str, LoraModule], trained: Trained) -> bool:
    """As [`check_state`], for a file for ComfyUI. Only the output tells whether its magnitudes of DoRA are right."""
    _check_names(found, trained.modules, "modules")
    return all(
        torch.equal(found[path].first, module.first)
        and torch.equal(found[path].second, module.second)
        and found[path].scaling == module.scaling
        for path, module in trained.modules.items()
    )


def _check_names(found: Mapping[str, Any], expected: Mapping[str, Any], noun: str) -> None:
    unmatched = found.keys() ^ expected.keys()
    if unmatched:
        raise ExportError(
            f"The export was read back with {len(found)} {noun}, where {len(expected)} were trained; "
            f"{len(unmatched)} do not match, such as {min(unmatched)}. Nothing was written."
        )


def _largest(difference: torch.Tensor) -> float:
    return difference.abs().max().item()
