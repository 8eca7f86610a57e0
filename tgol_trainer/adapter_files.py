"""Look into the file of an adapter before it is loaded and after it was written, and past wrappers of a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ._hub_ids import is_hub_id

WEIGHTS_NAME = "pytorch_lora_weights.safetensors"
"""File that `pipe.load_lora_weights(folder)` looks for (diffusers/loaders/lora_base.py, LORA_WEIGHT_NAME_SAFE)."""

# What torch.compile, FSDP1 and activation checkpointing put around a network, and around layers inside it.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")


def unwrapped(model: Any) -> Any:
    """Return the network inside `torch.compile`, DistributedDataParallel, FSDP1 or DeepSpeed."""
    while True:
        inner = next((model._modules[name] for name in (*_WRAPPERS, "module") if name in model._modules), None)
        if inner is None:
            return model
        model = inner


def plain_name(name: str) -> str:
    """Return the name of a tensor without what wrappers add to it."""
    return ".".join(part for part in name.removeprefix("module.").split(".") if part not in _WRAPPERS)


def adapter_file(source: str) -> Path | None:
    """
    Find the file of an adapter and check that it is whole.

    Args:
        source (`str`): File, folder or Hub id.

    Returns:
        `Path`, *optional*: the file; `None` where diffusers must look for one of another name or kind.

    Raises:
        ValueError: if there is none, or if what is there cannot be loaded as it is.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = [path / WEIGHTS_NAME] if (path / WEIGHTS_NAME).is_file() else sorted(path.glob("*.safetensors"))
        if not found and any(path.glob("*.bin")):
            return None
        if len(found) != 1:
            what = f"several: {[file.name for file in found]}. Name one" if found else f"none, no {WEIGHTS_NAME}"
            raise ValueError(f"{source!r} is a folder that should hold an adapter and holds {what}.")
        file: Path | None = found[0]
    elif path.exists():
        file = path
    elif is_hub_id(source):
        file = _downloaded(source)
    else:
        raise ValueError(f"{source!r} names neither a file, a folder nor a Hub id (`owner/name`).")
    if file is not None and file.suffix != ".bin":
        _check_content(file)
    return file


def _downloaded(source: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(source, WEIGHTS_NAME))
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"{source!r} is not a file or folder here, and its adapter is not in the Hub's cache while the Hub is out "
            "of reach. Check the name and the network (HF_HUB_OFFLINE, proxy)."
        ) from error
    except EntryNotFoundError:
        return None  # a file of another name: diffusers looks for it
    except HfHubHTTPError as error:
        raise ValueError(
            f"{source!r} is not a file or folder here, and the Hub does not give its adapter: {error}\nCheck the "
            "name; log in with `hf auth login` for a private one."
        ) from error


def _check_content(file: Path) -> None:
    tensors = read_tensors(file)
    if any("dora_scale" in name for name in tensors):
        raise ValueError(
            f"{file} is a DoRA in the format of kohya or LyCORIS. diffusers leaves out its magnitudes (`dora_scale`), "
            "so that another adapter would be used than this file's. Convert it to PEFT's format, or train a LoRA."
        )
    broken = [name for name, tensor in tensors.items() if not _is_sound(tensor)]
    if broken:
        raise ValueError(
            f"{file}: {len(broken)} of {len(tensors)} tensors are empty, or hold NaN or infinite values (such as "
            f"{broken[0]}). Use an earlier checkpoint."
        )


def _is_sound(tensor: torch.Tensor) -> bool:
    return tensor.numel() > 0 and (not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()))


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """
    Read a safetensors file.

    Args:
        file (`Path`): The file.

    Returns:
        `dict[str, torch.Tensor]`: its tensors, at least one.

    Raises:
        ValueError: for a file of another kind, a part of one, or one without a tensor.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file: {error}. Copy or download "
            "it again."
        ) from error
    if not tensors:
        raise ValueError(f"{file} holds no tensors.")
    return tensors


def check_components(tensors: Mapping[str, torch.Tensor], present: Mapping[str, object], source: str) -> None:
    """
    Refuse an adapter of which a part belongs to a component that the pipeline does not have.

    Args:
        tensors (`Mapping[str, torch.Tensor]`): The file.
        present (`Mapping`): Components of the pipeline by name.
        source (`str`): What the adapter was given as.

    Raises:
        ValueError: if there is such a part.
    """
    named = {name.partition(".")[0] for name in tensors if ".lora_" in name} & set(_COMPONENTS)
    absent = sorted(name for name in named if present.get(name) is None)
    if absent and len(absent) < len(named):
        raise ValueError(f"The adapter {source!r} also holds weights for {', '.join(absent)}, which this model lacks.")


def check_fit(
    given: Mapping[str, torch.Tensor], model: torch.nn.Module, adapter: str, component: str, source: str
) -> None:
    """
    Compare what a file gave to a network with the adapter that the network has now.

    Args:
        given (`Mapping[str, torch.Tensor]`): Tensors by the names of the network's parameters.
        model (`torch.nn.Module`): The network, unwrapped.
        adapter (`str`): Name of the adapter.
        component (`str`): Name of the network.
        source (`str`): What the adapter was given as.

    Raises:
        ValueError: for tensors that belong to no layer, and for layers that got none.
    """
    wanted = {
        name
        for name, _ in model.named_parameters()
        if "lora_" in name and adapter in name.split("lora_")[-1].split(".")
    }
    unknown, missing = sorted(set(given) - wanted), sorted(wanted - set(given))
    if not (unknown or missing):
        return
    parts = [f"{len(unknown)} of its tensors belong to no layer (such as {unknown[0]})"] if unknown else []
    parts += [f"{len(missing)} tensors are missing (such as {missing[0]})"] if missing else []
    raise ValueError(
        f"The adapter {source!r} does not fit the {component}: {' and '.join(parts)}. It was trained for another "
        "model, or its file is not whole."
    )


def check_saved(file: Path, written: Mapping[str, torch.Tensor]) -> None:
    """
    Read an adapter back that was just written.

    Args:
        file (`Path`): The file.
        written (`Mapping[str, torch.Tensor]`): What it must hold.

    Raises:
        OSError: if a tensor is missing, unknown, different, empty or not finite, or named by a wrapper's prefix.
    """
    try:
        found = read_tensors(file)
    except ValueError as error:
        raise OSError(f"What was just written cannot be read: {error}") from error
    wrong = sorted(set(found) ^ set(written))
    wrong += [name for name in found if any(part in _WRAPPERS for part in name.split("."))]
    wrong += [name for name, tensor in found.items() if not _is_sound(tensor)]
    wrong += [name for name in set(found) & set(written) if not torch.equal(found[name], written[name])]
    if wrong:
        raise OSError(
            f"{file} is not the adapter that was trained: {len(wrong)} of {len(written)} tensors are missing, "
            f"unknown, different, empty or not finite (such as {wrong[0]}). Check the disk, and the loss for NaN."
        )


# ---- Weights that FSDP2 shards ----


def sharded_modules(model: torch.nn.Module) -> list[Any]:
    """Return the modules whose weights FSDP2 shards over processes; an empty list where it does not run."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def gathered_adapters(model: torch.nn.Module, *, keep: bool) -> dict[str, torch.Tensor]:
    """
    Return the whole weights of all adapters of a sharded model, by name, on the CPU. Every process must call it.

    Args:
        model (`torch.nn.Module`): The denoiser.
        keep (`bool`): Whether this process wants them; the others get an empty dictionary.
    """
    found = {}
    for name, value in model.state_dict().items():
        if "lora_" in name:
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            if keep:
                found[name] = whole.detach().cpu()
    return found


def load_shards(held: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> None:
    """Put whole weights into the sharded ones of equal names; every process keeps its part."""
    from torch.distributed.tensor import distribute_tensor

    with torch.no_grad():
        for name, tensor in weights.items():
            shard: Any = held[name]
            shard.copy_(distribute_tensor(tensor.to(shard), shard.device_mesh, shard.placements))
