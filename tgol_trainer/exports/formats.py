"""Writing each format from a trained model in memory, and reading it back into a fresh one as its users do."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tgol_trainer import adapters
from tgol_trainer.backbones import Backbone

from .comfyui import LoraModule, apply_as_comfyui, from_comfyui, layout_of, lora_modules, to_comfyui
from .source import Source

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
"""What `PeftModel.from_pretrained` looks for."""

_PEFT_PREFIX = "base_model.model."


def adapter_state(backbone: Backbone) -> dict[str, torch.Tensor]:
    """The policy adapter's tensors under PEFT's names, on the CPU."""
    from peft.utils import get_peft_model_state_dict

    state = get_peft_model_state_dict(backbone.denoiser, adapter_name=adapters.POLICY)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def set_strength(backbone: Backbone, weight: float) -> None:
    """Scale the policy adapter as diffusers' `set_adapters(..., weight)` does."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in backbone.denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_scale(adapters.POLICY, weight)


def _written_config(backbone: Backbone, weight: float) -> Any:
    """The adapter's configuration with the strength in its alphas: a file has no other place for it."""
    config = copy.deepcopy(backbone.denoiser.peft_config[adapters.POLICY])
    if weight != 1.0:
        config.lora_alpha = config.lora_alpha * weight
        config.alpha_pattern = {name: alpha * weight for name, alpha in (config.alpha_pattern or {}).items()}
    return config


def write_diffusers(backbone: Backbone, folder: Path, weight: float) -> None:
    """The format of `pipe.load_lora_weights`."""
    backbone.denoiser.peft_config[adapters.POLICY] = _written_config(backbone, weight)
    adapters.save_adapter(type(backbone.pipeline), backbone.denoiser_name, backbone.denoiser, folder)


def read_diffusers(source: Source, folder: Path) -> tuple[Backbone, dict[str, torch.Tensor]]:
    """Load into a fresh base model; returns it with the tensors that arrived there."""
    backbone = source.load_base()
    adapters.load_weights(backbone.pipeline, backbone.denoiser_name, str(folder))
    return backbone, adapter_state(backbone)


def write_peft(backbone: Backbone, folder: Path, weight: float) -> None:
    """The format of `PeftModel.from_pretrained`, with the fields that differ from LoraConfig's defaults alone."""
    config = _written_config(backbone, weight)
    fields = {
        "peft_type": "LORA",
        "base_model_name_or_path": backbone.origin.hub_id,
        "revision": backbone.origin.revision if backbone.origin.hub_id else None,
        "inference_mode": True,
        **adapters.adapter_metadata(config),
    }
    state = {f"{_PEFT_PREFIX}{name}": tensor for name, tensor in adapter_state(backbone).items()}
    save_file(state, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    (folder / PEFT_CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def read_peft(source: Source, folder: Path) -> tuple[Backbone, dict[str, torch.Tensor]]:
    """Load into a fresh base model; returns it with the tensors that arrived there."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    backbone = source.load_base()
    model = PeftModel.from_pretrained(backbone.denoiser, str(folder))
    setattr(backbone.pipeline, backbone.denoiser_name, model)
    state = {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in get_peft_model_state_dict(model).items()}
    return backbone, {name: tensor.detach().cpu() for name, tensor in state.items()}


def comfyui_name(title: str) -> str:
    """File name: ComfyUI lists files by name alone, so it says which model this is."""
    return f"{re.sub(r'[^0-9A-Za-z._-]+', '-', title).strip('.-') or 'adapter'}_comfyui.safetensors"


def write_comfyui(backbone: Backbone, file: Path) -> None:
    """One file for ComfyUI's `models/loras`."""
    layout = layout_of(type(backbone.pipeline).__name__)
    modules = lora_modules(backbone.denoiser, adapters.POLICY)
    known = re.compile(r"lora_(A\.weight|B\.weight|magnitude_vector(\.weight)?)$")
    strange = [name for name in adapter_state(backbone) if not known.search(name)]
    if strange:
        raise ValueError(
            f"`format` is 'comfyui', and {len(strange)} tensors of the adapter (such as {strange[0]}) are of a "
            "kind that its loader has no place for. Use 'diffusers', 'peft' or 'merged'."
        )
    save_file(to_comfyui(modules, backbone.denoiser, layout), file, metadata={"format": "pt"})


def read_comfyui(source: Source, file: Path) -> tuple[Backbone, dict[str, LoraModule], int]:
    """
    Change a fresh base model's weights by the loader's formulas.

    Args:
        source ([`Source`]):
            Loads the base model.
        file (`Path`):
            From [`write_comfyui`].

    Returns:
        `tuple`: the model, the updates that were read, and the number of tensors in the file, all of them matched.

    Raises:
        ValueError: for tensors that match no module.
    """
    backbone = source.load_base()
    tensors = load_file(file)
    modules = from_comfyui(tensors, backbone.denoiser, layout_of(type(backbone.pipeline).__name__))
    apply_as_comfyui(modules, backbone.denoiser)
    return backbone, modules, len(tensors)


def write_merged(backbone: Backbone, folder: Path, source: Source) -> None:
    """A complete pipeline without adapters; the strength was set before."""
    if getattr(backbone.denoiser, "hf_quantizer", None) is not None:
        raise ValueError(
            "`format` is 'merged', and the base model is quantised: an update does not survive the rounding to its "
            "few levels. Name the base model in full precision with `model_name_or_path`."
        )
    if hasattr(backbone.denoiser, "peft_config"):
        backbone.denoiser.fuse_lora(safe_fusing=True, adapter_names=[adapters.POLICY])
        backbone.denoiser.unload_lora()
    if source.dtype != torch.float32:
        # Rounded once, after merging, and where the loader keeps some modules in float32, they stay so.
        state = backbone.denoiser.state_dict()
        backbone = source.load_base(compute=False)
        backbone.denoiser.load_state_dict(state)
    backbone.pipeline.save_pretrained(folder)
    for file in folder.rglob("*.json"):  # each component remembers the folder it was loaded from
        content = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(content, dict) and content.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
