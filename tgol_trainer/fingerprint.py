"""Tell networks and tokenizers apart by their content, for caches and checkpoints that must know what made them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import xxhash


def component_fingerprint(component: Any, rename: Callable[[str], str | None] | None = None) -> str:
    """
    Return a text that changes with what a component of a pipeline computes.

    Args:
        component (`Any`): A network, whose class, config and weights count; or a tokenizer, whose files count.
        rename (`Callable[[str], str | None]`, *optional*):
            Returns the name that a weight counts under, `None` for one that does not count.

    Returns:
        `str`: 32 hexadecimal digits.
    """
    digest = xxhash.xxh3_128(type(component).__name__.encode())
    if isinstance(component, torch.nn.Module):
        config = getattr(component, "config", {})
        config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
        settings = {name: value for name, value in vars(component).items() if name.startswith(("use_", "tile_"))}
        digest.update(json.dumps(settings, sort_keys=True, default=str).encode())  # tiling gives other latents
        if rename is None:
            digest.update(repr(_adapter_state(component)).encode())
        weights = {(rename(name) if rename else name): value for name, value in component.state_dict().items()}
        weights.pop(None, None)
        for name, tensor in sorted(weights.items()):
            digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}".encode())
            for plain in _plain(tensor.detach()):
                digest.update(plain.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    else:
        with tempfile.TemporaryDirectory() as folder:
            component.save_pretrained(folder)
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    digest.update(file.name.encode() + b"|" + _content(file))
    return digest.hexdigest()


def _plain(tensor: Any) -> list[Any]:
    """Return the tensors that a quantised one of torchao is made of, or the tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    return [part for name in tensor.__tensor_flatten__()[0] for part in _plain(getattr(tensor, name))]


def _adapter_state(network: torch.nn.Module) -> list[Any]:
    """Return how adapters act: their scales, and which are on."""
    return [
        (name, sorted(layer.scaling.items()), sorted(layer.active_adapters), layer.disable_adapters, layer.merged)
        for name, layer in network.named_modules()
        if hasattr(layer, "scaling") and hasattr(layer, "active_adapters")
    ]


def _content(file: Path) -> bytes:
    if file.name != "tokenizer.json":
        return file.read_bytes()
    content = json.loads(file.read_text(encoding="utf-8"))
    # What the last call asked for, and the next one asks for anew.
    return json.dumps({**content, "truncation": None, "padding": None}, sort_keys=True).encode()
