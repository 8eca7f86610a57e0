"""Say what inspection finds of a pipeline that has no model family: what one would be made of."""

from __future__ import annotations

import inspect
from typing import Any


def inspect_pipeline(name: str, parts: dict[str, str]) -> str:
    """
    Say which facts that a model family needs are found in the classes of a pipeline, and which are not.

    Args:
        name (`str`): Name of the pipeline's class.
        parts (`dict[str, str]`): Class names of its components, by their names in the pipeline.

    Returns:
        `str`: sentences for an error message.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if name.endswith("ModularPipeline"):
        return "A modular pipeline has no components to inspect before its blocks are chosen."
    if kind is None:
        return f"diffusers {diffusers.__version__} has no such class, so nothing could be inspected."
    if packages := getattr(kind, "_backends", None):  # a stand-in that diffusers has where one is not installed
        return f"diffusers has this class only beside {', '.join(packages)}, so nothing could be inspected."
    found, missing = [], []
    denoiser = next((part for part in ("transformer", "unet") if part in parts), "")
    network = getattr(diffusers, parts.get(denoiser, ""), None)
    if network is None:
        missing.append("the denoiser (no `transformer` or `unet` of diffusers)")
    elif hasattr(network, "add_adapter"):
        second = f" and `{denoiser}_2`" if f"{denoiser}_2" in parts else ""
        found.append(f"the denoiser `{denoiser}`{second} ({parts[denoiser]}, takes adapters)")
    else:
        missing.append(f"a denoiser that takes adapters ({parts[denoiser]} has no `add_adapter`)")
    _note(_scheduler(parts.get("scheduler", "")), "the scheduler's kind", found, missing)
    autoencoder = getattr(diffusers, parts.get("vae", ""), None)
    _note(_latents(autoencoder, parts.get("vae", "")), "the scale of latents", found, missing)
    for method, what in (("encode_prompt", "encodes prompts"), ("load_lora_weights", "loads an adapter")):
        _note(f"what {what} (`{method}`)" if hasattr(kind, method) else None, f"`{method}`", found, missing)
    return f"Found by inspection: {'; '.join(found) or 'nothing'}. Not found: {'; '.join(missing) or 'nothing'}."


def parts_of_index(index: dict[str, Any]) -> dict[str, str]:
    """Return the class names of components from a `model_index.json`, which may hold other lists (Krea 2's layers)."""
    return {name: value[1] for name, value in index.items() if is_component(value) and value[1]}


def is_component(value: Any) -> bool:
    """Whether an entry of a `model_index.json` names a library and a class, or two nulls."""
    return isinstance(value, list) and len(value) == 2 and all(each is None or isinstance(each, str) for each in value)


def _note(fact: str | None, what: str, found: list[str], missing: list[str]) -> None:
    if fact:
        found.append(fact)
    else:
        missing.append(what)


def _scheduler(name: str) -> str | None:
    """Say what the class of a scheduler tells of the noise."""
    if name.startswith("FlowMatch"):
        return f"flow matching ({name})"
    if name.startswith(("DDPM", "DDIM", "PNDM", "EulerDiscrete", "EulerAncestral")):
        return f"noise levels of DDPM ({name})"
    return None  # such as DPM++ and UniPC, which sample both kinds


def _latents(kind: Any, name: str) -> str | None:
    """Say what the config of an autoencoder's class has for the scale of latents."""
    if kind is None:
        return None
    parameters = inspect.signature(kind.__init__).parameters
    names = [each for each in ("scaling_factor", "shift_factor", "latents_mean", "latents_std") if each in parameters]
    return f"the scale of latents ({name}: {', '.join(names)})" if names else None
