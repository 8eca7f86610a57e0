"""Load a pipeline without its weights: enough to know and to check limits and sizes, from a few JSON files."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tgol_trainer.config import check_sides
from tgol_trainer.shapes import embedded_model

from . import INDEX_OPTIONS, choose_family, read_dtype, read_index, wrap_pipeline
from .base import FamilySettings, ModelFamily
from .inspection import is_component

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")
_HARMLESS = {*INDEX_OPTIONS, "dtype", "variant", "use_safetensors", "quantization_config"}
"""Options of loading that change no size."""


def load_skeleton(
    model: str | Path,
    *,
    revision: str | None = None,
    dtype: Any = torch.float32,
    settings: FamilySettings | None = None,
) -> ModelFamily:
    """
    Load tokenizers, schedulers and configs of a pipeline; its networks stand on torch's meta device, without weights.

    `native_size`, `resolution_multiple`, `num_frames` and `count_long_prompts` of the result are those of the model;
    it can neither encode nor predict.

    Args:
        model (`str` or `Path`): Hub id or folder of a diffusers pipeline, or the name of an embedded model.
        revision (`str`, *optional*): Revision on the Hub.
        dtype (`torch.dtype`, `str` or `dict`, *optional*, defaults to `torch.float32`):
            Of the weights, as `from_pretrained` takes it: also by component, `{"default": ..., "vae": ...}`.
        settings ([`FamilySettings`], *optional*): Choices of the run.

    Returns:
        [`ModelFamily`]

    Raises:
        FileNotFoundError: for a folder that holds no pipeline, and for what is neither a folder nor a Hub id.
        ValueError: for an unsupported pipeline, Meissonic among them, whose classes are not in diffusers, and for
            tokenizers without files; for a dtype that only the weights know (`"auto"`).
    """
    options = {"revision": revision} if revision is not None else {}
    return wrap_pipeline(_skeleton(model, options, dtype), settings=settings)


def check_size(model: Any, options: Mapping[str, Any], settings: FamilySettings, **sizes: int | str | None) -> None:
    """
    Refuse sizes and a number of frames that a model does not take, before its weights are loaded.

    What cannot be known without loading is let through: a loaded pipeline, one with parts or code of its own, and
    files that cannot be read, of which loading says why.

    Args:
        model (`str`, `Path` or `diffusers.DiffusionPipeline`): As in [`load_family`].
        options (`Mapping[str, Any]`): The `model_init_kwargs` of [`load_family`].
        settings ([`FamilySettings`]): Choices of the run, of which frames and expert count here.
        sizes (`int` or `str`, *optional*): As in [`check_sides`].

    Raises:
        ValueError: with the name of the argument, and the nearest value that the model takes.
    """
    asked = settings.num_frames is not None or any(value is not None for value in sizes.values())
    if not asked or not isinstance(model, str | Path) or options.keys() - _HARMLESS:
        return
    try:
        pipeline = _skeleton(model, {name: options[name] for name in INDEX_OPTIONS if name in options})
    except (OSError, ValueError, TypeError, LookupError, ImportError, AttributeError, RuntimeError):
        return
    choices = FamilySettings(num_frames=settings.num_frames, expert=settings.expert)
    family = choose_family(pipeline, None, choices)
    check_sides(family.resolution_multiple, family.max_side, **sizes)


def _skeleton(model: str | Path, options: dict[str, Any], dtype: Any = torch.float32) -> DiffusionPipeline:
    """Load a pipeline whose networks stand on the meta device; `options` say where its files are."""
    import diffusers

    embedded = embedded_model(model)
    source = str(embedded.folder if embedded else model)
    dtypes = dtype if isinstance(dtype, dict) else {"default": dtype}
    index = read_index(source, options)
    kind = getattr(diffusers, index["_class_name"], None)
    if kind is None:
        raise ValueError(f"{source!r} is of the class {index['_class_name']}, which diffusers does not have.")
    known = inspect.signature(kind.__init__).parameters
    # Parts that an index does not name are None, as diffusers loads them.
    arguments: dict[str, Any] = {name: None for name in kind._optional_components if name in known}
    for name, value in index.items():
        if name not in known:
            continue
        if not is_component(value):
            arguments[name] = value
        elif name in _LEFT_OUT or value[1] is None:
            arguments[name] = None
        else:
            # A class of the pipeline's own, such as LTX-2's connectors, is in diffusers' module of that pipeline.
            module = getattr(diffusers.pipelines, value[0], None) or importlib.import_module(value[0])
            arguments[name] = _component(getattr(module, value[1]), source, name, options)
            if isinstance(arguments[name], torch.nn.Module):
                _cast(arguments[name], read_dtype(dtypes.get(name, dtypes.get("default", torch.float32))))
    if "requires_safety_checker" in known:
        arguments["requires_safety_checker"] = False
    return kind(**arguments)


def _component(kind: Any, source: str, name: str, options: dict[str, Any]) -> Any:
    """Load a component of a class, a network on the meta device."""
    from_diffusers, is_network = hasattr(kind, "load_config"), issubclass(kind, torch.nn.Module)
    if not from_diffusers and not is_network:  # a tokenizer
        return kind.from_pretrained(source, subfolder=name, **options)
    read = kind.load_config if from_diffusers else kind.config_class.from_pretrained
    build = kind.from_config if from_diffusers else kind
    config = read(source, subfolder=name, **options)
    # Kolors' text encoder makes its weights on the CPU unless it is told where.
    told = {"device": "meta"} if not from_diffusers and "device" in inspect.signature(kind.__init__).parameters else {}
    with torch.device("meta" if is_network else "cpu"):
        return build(config, **told)


def _cast(network: Any, dtype: Any) -> None:
    """Bring weights to a dtype; what `from_pretrained` keeps in float32 stays."""
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"`dtype` is {dtype!r}, which only the weights know: name one, such as 'bfloat16'.")
    if dtype == torch.float32:
        return
    kept = set(network._keep_in_fp32_modules or ())
    if not hasattr(network, "load_config"):  # transformers has a second list, which holds for bfloat16 too
        kept = (kept if dtype == torch.float16 else set()) | set(network._keep_in_fp32_modules_strict or ())
    for name, weight in network.state_dict(keep_vars=True).items():  # buffers too, such as ChatGLM's frequencies
        if weight.is_floating_point() and not kept.intersection(name.split(".")):
            weight.data = weight.data.to(dtype)
