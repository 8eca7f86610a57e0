"""Write each format from a trained model in memory, and read it back into a fresh model as its users do."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tgol_trainer import adapters
from tgol_trainer._files import write_json
from tgol_trainer.families import ModelFamily
from tgol_trainer.saving.comfyui import LoraModule, apply_as_comfyui, from_comfyui, layout_of
from tgol_trainer.saving.sharing import comfyui_tensors

from .source import Source

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""The files that `PeftModel.from_pretrained` looks for."""

_PEFT_PREFIX = "base_model.model."


def adapter_state(family: ModelFamily) -> dict[str, torch.Tensor]:
    """Return the policy adapter's tensors under PEFT's names, on the CPU."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(family.denoiser, adapter_name=adapters.POLICY)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def set_strength(family: ModelFamily, weight: float) -> None:
    """Scale the policy adapter as diffusers' `set_adapters(..., weight)` does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in family.denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale(adapters.POLICY, weight)


def _written_config(family: ModelFamily, weight: float) -> Any:
    """Return the adapter's configuration with the strength multiplied into its alphas: a file has no other place."""
    config = copy.deepcopy(family.denoiser.peft_config[adapters.POLICY])
    if weight != 1.0:
        config.lora_alpha = config.lora_alpha * weight
        config.alpha_pattern = {name: alpha * weight for name, alpha in (config.alpha_pattern or {}).items()}
    return config


def write_diffusers(family: ModelFamily, folder: Path, weight: float) -> None:
    """Write the file that `pipe.load_lora_weights` reads."""
    family.denoiser.peft_config[adapters.POLICY] = _written_config(family, weight)
    adapters.save_adapter(type(family.pipeline), family.denoiser_name, family.denoiser, folder)


def read_diffusers(source: Source, folder: Path) -> tuple[ModelFamily, dict[str, torch.Tensor]]:
    """Load the export into a fresh base model. Return the model and the adapter's tensors in it."""
    family = source.load_base()
    adapters.load_weights(family.pipeline, family.denoiser_name, str(folder))
    return family, adapter_state(family)


def write_peft(family: ModelFamily, folder: Path, weight: float) -> None:
    """Write the files that `PeftModel.from_pretrained` reads. Fields at LoraConfig's defaults are left out."""
    config = _written_config(family, weight)
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": family.origin.hub_id,
        "revision": family.origin.revision if family.origin.hub_id else None,
        "inference_mode": True,
        **adapters.adapter_metadata(config),
    }
    state = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in adapter_state(family).items()}
    save_file(state, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def read_peft(source: Source, folder: Path) -> tuple[ModelFamily, dict[str, torch.Tensor]]:
    """Load the export into a fresh base model. Return the model and the adapter's tensors in it."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    family = source.load_base()
    model = PeftModel.from_pretrained(family.denoiser, str(folder))
    setattr(family.pipeline, family.denoiser_name, model)
    state = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in get_peft_model_state_dict(model).items()}
    return family, {name: tensor.detach().cpu() for name, tensor in state.items()}


def write_comfyui(family: ModelFamily, file: Path) -> None:
    """Write one file for ComfyUI's `models/loras`."""
    save_file(comfyui_tensors(family), file, metadata={"format": "pt"})


def read_comfyui(source: Source, file: Path) -> tuple[ModelFamily, dict[str, LoraModule], int]:
    """Apply a file to a fresh base model. Return the model, the updates, and the number of tensors, all matched."""
    family = source.load_base()
    tensors = load_file(file)
    modules = from_comfyui(tensors, family.denoiser, layout_of(type(family.pipeline).__name__))
    apply_as_comfyui(modules, family.denoiser)
    return family, modules, len(tensors)


def write_merged(family: ModelFamily, folder: Path, source: Source) -> None:
    """Write a complete pipeline without adapters. The strength of the adapter was set before."""
    if getattr(family.denoiser, "hf_quantizer", None) is not None:
        raise ValueError(
            "`format` is 'merged', and the base model is quantised. Rounding to its few levels would lose the update. "
            "Name the base model in full precision with `model_name_or_path`."
        )
    if hasattr(family.denoiser, "peft_config"):
        family.denoiser.fuse_lora(safe_fusing=True, adapter_names=[adapters.POLICY])
        family.denoiser.unload_lora()
    if source.dtype != torch.float32:
        # Round once, after merging. Modules that the loader keeps in float32 stay in float32.
        state = family.denoiser.state_dict()
        family = source.load_base(compute=False)
        family.denoiser.load_state_dict(state)
    family.pipeline.save_pretrained(folder)
    for file in folder.rglob("*.json"):  # each component notes the folder it was loaded from
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            write_json(file, content)
