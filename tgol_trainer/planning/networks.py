"""A pipeline as training would have it, without its weights: dtype, quantisation, adapter."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tgol_trainer import adapters
from tgol_trainer.families import FamilySettings, ModelFamily, StoredBlocks
from tgol_trainer.families.quantization import large_text_encoders
from tgol_trainer.families.skeleton import load_skeleton

from .quantized import Quantization, quantize

if TYPE_CHECKING:
    from peft import LoraConfig


@dataclasses.dataclass(frozen=True)
class Setup:
    """
    What decides how much memory a run takes; names as in [`TGOLConfig`] and `tgol train`.

    Args:
        model (`str` or `Path`): Hub id or folder of a diffusers pipeline, or the name of an embedded model.
        revision (`str`, *optional*): Revision on the Hub.
        dtype (`Any`, *optional*, defaults to `"float32"`): Of the weights, also by component.
        quantization ([`Quantization`], *optional*): Of the denoiser.
        lora (`peft.LoraConfig`, *optional*): The adapter; `None` for training every weight.
        reference_pass (`bool`, *optional*, defaults to `True`): Each step runs the reference too.
        reference_adapter (`bool`, *optional*, defaults to `False`): The reference is a second adapter.
        resolution (`tuple[int, int]`, *optional*): Height and width in pixels; by default the model's own.
        num_frames (`int`, *optional*): Frames of a clip; by default the model's own number.
        expert (`str`, *optional*): Which of two transformers is trained, as in [`FamilySettings`].
        batch_size (`int`, *optional*, defaults to 8): Rows of one pass.
        accumulation (`int`, *optional*, defaults to 1): Passes of one update.
        checkpointing (`bool`, *optional*, defaults to `False`): Recompute activations in the backward pass.
        group_offload (`bool`, *optional*, defaults to `False`): Keep the blocks' weights on the CPU.
        storage_dtype (`str`, *optional*): Dtype that the blocks' matrices are kept in.
        autocast (`torch.dtype`, *optional*): What `bf16=True` or `fp16=True` computes in.
        vae_tiling (`bool`, *optional*, defaults to `False`): As in [`FamilySettings`].
        text_encoders_in_4bit (`bool`, *optional*, defaults to `False`): As in [`FamilySettings`].
        optimizer (`str`, *optional*, defaults to `"adamw_torch_fused"`): `TrainingArguments.optim`.
        cache (`bool`, *optional*, defaults to `True`):
            Encode once before training. Without it text encoders and autoencoder stay on the device.
        sampling_batch (`int`, *optional*, defaults to 1): Images that are generated at once; 0 leaves sampling out.
    """

    model: str | Path
    revision: str | None = None
    dtype: Any = "float32"
    quantization: Quantization | None = None
    lora: LoraConfig | None = None
    reference_pass: bool = True
    reference_adapter: bool = False
    resolution: tuple[int, int] | None = None
    num_frames: int | None = None
    expert: str | None = None
    batch_size: int = 8
    accumulation: int = 1
    checkpointing: bool = False
    group_offload: bool = False
    storage_dtype: str | None = None
    autocast: torch.dtype | None = None
    vae_tiling: bool = False
    text_encoders_in_4bit: bool = False
    optimizer: str = "adamw_torch_fused"
    cache: bool = True
    sampling_batch: int = 1

    @property
    def main_dtype(self) -> str:
        """Name of the dtype of all components but those that have their own."""
        dtype = self.dtype.get("default", "float32") if isinstance(self.dtype, dict) else self.dtype
        return str(dtype).removeprefix("torch.")

    @property
    def stored(self) -> str:
        """How weights are kept beside their dtype, for a line of text: each with a comma before it."""
        parts = [
            f"{self.quantization.bits} bits" if self.quantization else "",
            f"blocks in {self.storage_dtype}" if self.storage_dtype else "",
            "blocks on the CPU" if self.group_offload else "",
            "text encoders in 4 bits" if self.text_encoders_in_4bit else "",
        ]
        return "".join(f", {part}" for part in parts if part)


def build(setup: Setup) -> ModelFamily:
    """
    Return the family with its networks on the meta device, the denoiser ready to train.

    Args:
        setup ([`Setup`]): The run.

    Returns:
        [`ModelFamily`]

    Raises:
        ValueError: for what [`load_skeleton`] refuses, and for a combination that training refuses.
    """
    stored = "group_offload" if setup.group_offload else "storage_dtype" if setup.storage_dtype else None
    if stored and (setup.lora is None or setup.lora.use_dora or setup.quantization is not None):
        reason = "training every weight" if setup.lora is None else "`use_dora` or a quantised denoiser"
        raise ValueError(f"`{stored}` does not go with {reason}: leave one out.")
    if setup.quantization is not None and (setup.lora is None or setup.lora.use_dora):
        reason = "training every weight" if setup.lora is None else "`use_dora`"
        raise ValueError(f"A quantised denoiser is not planned for together with {reason}: leave one out.")
    family = load_skeleton(
        setup.model,
        revision=setup.revision,
        dtype=setup.dtype,
        settings=FamilySettings(num_frames=setup.num_frames, expert=setup.expert, vae_tiling=setup.vae_tiling),
    )
    prepare(family, setup)
    return family


def prepare(family: ModelFamily, setup: Setup) -> None:
    """Make the denoiser of a family, on the meta device, what training would make it."""
    denoiser = family.denoiser
    if setup.quantization is not None:
        quantize(denoiser, setup.quantization)
    if setup.text_encoders_in_4bit:
        names = large_text_encoders(family.pipeline)
        if not names:
            raise ValueError("`text_encoders_in_4bit`: this pipeline has CLIP's text encoders alone: leave it out.")
        for name in names:
            encoder = getattr(family.pipeline, name)
            quantize(encoder, Quantization(4, double=True, compute_dtype=encoder.dtype))
    if setup.group_offload or setup.storage_dtype:
        family.blocks = StoredBlocks(denoiser, torch.device("meta"), setup.group_offload, setup.storage_dtype)
    if setup.lora is None:
        denoiser.requires_grad_(True)
    else:
        config = copy.deepcopy(setup.lora)
        config.target_modules = config.target_modules or set(family.default_target_modules)
        adapters.add_policy(denoiser, config)
    if setup.checkpointing:
        family.enable_gradient_checkpointing()
    denoiser.train()


def networks(family: ModelFamily) -> dict[str, torch.nn.Module]:
    """Return the networks of a pipeline by the names of its components."""
    found = family.pipeline.components.items()
    return {name: component for name, component in found if isinstance(component, torch.nn.Module)}


def weight_bytes(network: torch.nn.Module) -> int:
    """Return the bytes of parameters and buffers; those that are tied count once."""
    tensors = {id(each): each for each in [*network.parameters(), *network.buffers()]}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def forget_weights(network: torch.nn.Module) -> None:
    """
    Replace parameters and buffers, inside [`without_memory`], by tensors without memory on the device of a run.

    Also tensors that are only attributes, such as Qwen-Image's positions: each pass would count them as its own. Whole
    numbers among them keep their values.
    """
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    for module in network.modules():
        tables: list[dict[str, Any]] = [module._parameters, module._buffers, vars(module)]
        for table in tables:
            for name, tensor in table.items():
                if not isinstance(tensor, torch.Tensor):
                    continue
                if table is tables[2] and not (tensor.is_floating_point() or tensor.is_complex()):
                    continue
                if id(tensor) not in made:
                    # Not `empty_like`: the base of a view may have kept another dtype, and is looked at.
                    new = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
                    is_parameter = isinstance(tensor, torch.nn.Parameter)
                    made[id(tensor)] = torch.nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                table[name] = made[id(tensor)]
