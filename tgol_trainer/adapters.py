"""Adapters on a diffusers denoiser: attach, switch to the reference, save and load in the Hub's format."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .adapter_files import (
    WEIGHTS_NAME,
    adapter_file,
    check_components,
    check_fit,
    check_saved,
    load_shards,
    plain_name,
    read_tensors,
    sharded_modules,
    unwrapped,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from peft import LoraConfig, PeftConfig

logger = logging.getLogger(__name__)

POLICY = "default"
"""Name of the adapter that is trained."""

REFERENCE = "reference"
"""Name of the frozen second adapter, where the reference is not the base model."""

REFERENCE_WEIGHTS_NAME = "reference_lora_weights.safetensors"
"""The reference adapter's weights inside a checkpoint; never part of what is published."""

# PiSSA, OLoRA, LoftQ, CorDA, EVA and the like rewrite the base weights (or load others), so that "adapters off" is no
# longer the base model. These leave them alone and start with an update of zero:
_NEUTRAL_INITIALISATIONS = (True, "gaussian", "orthogonal")

# Facts about a run or a machine, not about the adapter.
_NOT_METADATA = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode"}
_NOT_METADATA |= {"peft_version", "runtime_config"}


# ---- Attach ----


def check_peft_config(config: PeftConfig) -> None:
    """
    Refuse adapters under which "adapters off" would not be the base model.

    Args:
        config (`peft.PeftConfig`): The user's configuration.

    Raises:
        TypeError: for anything but a `LoraConfig` (DoRA and rsLoRA are options of it).
        ValueError: for trained biases, `modules_to_save`, or an initialisation that changes base weights.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise TypeError(
            f"`peft_config` is a {type(config).__name__}; TGOLTrainer takes a `peft.LoraConfig` (also with "
            "`use_dora=True` or `use_rslora=True`), the one type whose adapters every diffusers pipeline loads."
        )
    if config.bias != "none":
        raise ValueError(
            f"`peft_config.bias` is {config.bias!r}: trained biases stay on when adapters are switched off, so the "
            'reference would move with the policy. Set `bias="none"`.'
        )
    if config.modules_to_save:
        raise ValueError(
            f"`peft_config.modules_to_save` is {config.modules_to_save!r}: a LoRA file has no place for full modules. "
            "Leave it out."
        )
    if config.init_lora_weights not in _NEUTRAL_INITIALISATIONS:
        raise ValueError(
            f"`peft_config.init_lora_weights` is {config.init_lora_weights!r}, under which the policy does not start "
            "as the reference. Use True or 'gaussian'."
        )
    if not config.lora_alpha > 0:
        raise ValueError(
            f"`peft_config.lora_alpha` is {config.lora_alpha}: the adapter is multiplied by lora_alpha / r and would "
            "never act. Use a number above 0, such as r."
        )
    if config.lora_dropout:
        logger.warning(
            "`peft_config.lora_dropout` is %s: the policy's pass is then noisy while the reference's is not, and the "
            "log-ratio carries that noise. 0 is recommended.",
            config.lora_dropout,
        )


def attach(model: ModelMixin, config: LoraConfig, *, seed: int, probe: Callable[[], torch.Tensor]) -> None:
    """
    Add the policy's adapter to a denoiser, in float32 on a base of any dtype, and freeze the rest.

    Args:
        model (`diffusers.ModelMixin`): The denoiser; changed in place.
        config (`peft.LoraConfig`): With `target_modules` set.
        seed (`int`): Seed of the adapter's random half; the global generator is left as it was.
        probe (`Callable`): Runs the denoiser on a fixed input; called before and, with adapters off, after attaching.

    Raises:
        ValueError: if the model already has adapters, if nothing matches `target_modules`, or if switching the adapter
            off does not give back the base model's output exactly.
    """
    if getattr(model, "peft_config", None):
        raise ValueError(
            f"The model already carries adapters ({', '.join(model.peft_config)}). Call `pipe.unload_lora_weights()` "
            "first, or continue from a saved adapter with `adapter_name_or_path=`."
        )
    before = probe()
    add_policy(model, config, seed=seed)
    check_reference(model, before, probe)


def add_policy(model: ModelMixin, config: LoraConfig, *, seed: int = 0) -> None:
    """Do what [`attach`] does, on a denoiser without adapters, and without its checks, which need weights."""
    from diffusers.training_utils import cast_training_params

    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model.add_adapter(config, POLICY)
        except (ValueError, RuntimeError) as error:  # no such layers, or a rank that no memory holds
            raise ValueError(
                f"`peft_config` (target_modules {config.target_modules}, r {config.r}) does not fit the "
                f"{type(model).__name__}: {error}"
            ) from error
    cast_training_params(model, torch.float32)


def check_reference(model: ModelMixin, expected: torch.Tensor, probe: Callable[[], torch.Tensor]) -> None:
    """
    Raise a `ValueError` unless the output with adapters off is exactly the base model's own.

    `probe` runs the denoiser on a fixed input; `expected` is its output before anything was attached.
    """
    with base_policy(model):
        after = probe()
    if not torch.equal(expected, after):
        raise ValueError(
            "With the adapter switched off the model no longer gives the base model's output (largest difference "
            f"{(expected.float() - after.float()).abs().max().item():.3g}), so it cannot serve as the reference. This "
            "PEFT configuration changes base weights; use a plain LoraConfig."
        )


# ---- Switch between policy and reference ----


@contextlib.contextmanager
def base_policy(model: ModelMixin) -> Iterator[None]:
    """Make the denoiser the base model inside the block, whatever the reference is: adapters off, no gradient."""
    model.disable_adapters()
    try:
        with torch.no_grad():
            yield
    finally:
        model.enable_adapters()


@contextlib.contextmanager
def reference_policy(model: ModelMixin) -> Iterator[None]:
    """
    Make the denoiser the reference inside the block: no gradient, adapters off or the reference adapter on.

    Switching adapters off also clears `requires_grad` on their weights. A backward pass before they are on again would
    give zero gradients without any error, so leaving the block always restores them; run the reference's pass first
    and the policy's after, and nothing is switched between a forward pass and its backward pass. The model is the
    denoiser itself, not its distributed wrapper.
    """
    if REFERENCE not in model.peft_config:
        with base_policy(model):
            yield
        return
    model.set_adapter(REFERENCE)
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_adapter(POLICY)
        _freeze_reference(model)


def add_reference(model: ModelMixin) -> None:
    """Attach a second, frozen adapter for the reference, which changes nothing until the first sync."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # a second is meant
        model.add_adapter(copy.deepcopy(model.peft_config[POLICY]), REFERENCE)
    _activate_policy(model)
    _freeze_reference(model)


def sync_reference(model: ModelMixin) -> None:
    """
    Make the policy of this moment the reference (paper, Algorithm 1, line 15).

    The reference becomes a second, frozen adapter, absent until the first call unless [`add_reference`] made it. What
    is published stays relative to the true base model.
    """
    if REFERENCE not in model.peft_config:
        add_reference(model)
    for module in sharded_modules(model):
        module.reshard()  # a pass without gradient leaves whole weights, which the next one would not read
    policy = _parameters_of(model, POLICY)
    with torch.no_grad():
        for name, parameter in _parameters_of(model, REFERENCE).items():
            parameter.copy_(policy[name])
    _activate_policy(model)
    _freeze_reference(model)


def scale_policy(model: ModelMixin, factor: float) -> None:
    """Multiply the update of the policy's LoRA by a factor, in its weights, so that every loader sees it."""
    with torch.no_grad():
        for name, parameter in _parameters_of(model, POLICY).items():
            if ".lora_B" in name or ".lora_embedding_B" in name:
                parameter.mul_(factor)


def reference_name(weight: str) -> str | None:
    """Return the name of a weight of the denoiser as the reference has it, `None` for one of the policy's adapter."""
    parts = weight.split(".")
    if POLICY in parts and any(part.startswith("lora_") for part in parts):
        return None
    return ".".join(part for part in parts if part != "base_layer")


def _parameters_of(model: torch.nn.Module, adapter: str) -> dict[str, torch.nn.Parameter]:
    """Parameters of one adapter, keyed by their name without the adapter's."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if adapter in parts and any(part.startswith("lora_") for part in parts):
            found[".".join(part for part in parts if part != adapter)] = parameter
    return found


def _activate_policy(model: ModelMixin) -> None:
    model.set_adapter(POLICY)
    for parameter in _parameters_of(model, POLICY).values():
        parameter.requires_grad_(True)


def _freeze_reference(model: ModelMixin) -> None:
    for parameter in _parameters_of(model, REFERENCE).values():
        parameter.requires_grad_(False)
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()


# ---- Files of a second denoiser ----

# Wan 2.2 has a second transformer. diffusers has one name for adapters of both and an option for where they go.
_SECOND = "transformer_2"


def file_prefix(denoiser: str) -> str:
    """Return the name that the file of an adapter has for a component."""
    return "transformer" if denoiser == _SECOND else denoiser


def loading_options(denoiser: str) -> dict[str, Any]:
    """Return the options with which `pipe.load_lora_weights` brings a file to a component."""
    return {"load_into_transformer_2": True} if denoiser == _SECOND else {}


# ---- Load into a pipeline ----
#
# The pipeline is changed in place. `denoiser` is the name of the component that carries the adapter, `source` a folder
# or Hub id in any format that `pipeline.load_lora_weights` reads; for a pipeline without that method, what
# `save_adapter` writes.


# What diffusers and PEFT raise for files that do not fit; some of it is meant for the authors of a file.
_LOAD_ERRORS = (OSError, RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError)


def load_weights(
    pipeline: DiffusionPipeline, denoiser: str, source: str, *, adapter: str = POLICY
) -> dict[str, torch.Tensor]:
    """
    Load a saved adapter into a pipeline under a name, with diffusers alone.

    Returns the denoiser's tensors as the file has them, by the names of its parameters. Raises `ValueError` for a file
    that is missing, damaged or of another model, and for one of which a part would be left out.
    """
    file = adapter_file(source)
    if file is not None and file.suffix != ".bin":
        check_components(read_tensors(file), pipeline.components, source)
    place, name = (source, None) if file is None else (str(file.parent), file.name)
    given: dict[str, dict[str, torch.Tensor]] = {}
    networks = {
        name: unwrapped(part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
    }
    hooks = [
        model.register_load_state_dict_pre_hook(
            lambda module, state_dict, *_, part=part: given.setdefault(part, {}).update(state_dict)
        )
        for part, model in networks.items()
    ]
    try:
        if hasattr(pipeline, "load_lora_weights"):
            options = loading_options(denoiser) | ({"weight_name": name} if name else {})
            pipeline.load_lora_weights(place, adapter_name=adapter, **options)
        else:  # aMUSEd, Meissonic: the denoiser has a method, the pipeline has none
            options = {"prefix": denoiser, "adapter_name": adapter, "low_cpu_mem_usage": True}
            getattr(pipeline, denoiser).load_lora_adapter(place, weight_name=name or WEIGHTS_NAME, **options)
    except _LOAD_ERRORS as error:
        cause = "\n".join(str(error).splitlines()[:3])[:500]
        raise ValueError(
            f"The adapter {source!r} cannot be loaded into this {type(pipeline).__name__}: {cause}\nUse an adapter "
            "that was trained for this model."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    for part, tensors in given.items():
        check_fit(tensors, networks[part], adapter, part, source)
    return given.get(denoiser, {})


def load_initial(pipeline: DiffusionPipeline, denoiser: str, source: str, *, keep_as_reference: bool) -> None:
    """
    Start the policy from a saved adapter, with the values of its file in float32 whatever the base's dtype.

    With `keep_as_reference` the adapter is loaded a second time, frozen, as the reference; else the reference is the
    base model. Raises `ValueError` if the file holds nothing for the denoiser, or something for another component.
    """
    from diffusers.training_utils import cast_training_params

    names = [POLICY, REFERENCE] if keep_as_reference else [POLICY]
    model = unwrapped(getattr(pipeline, denoiser))
    # PEFT casts what it loads to the base's dtype, so the values are kept as they were read.
    read: dict[str, torch.Tensor] = {}
    for name in names:
        read |= load_weights(pipeline, denoiser, source, adapter=name)
    if POLICY not in (getattr(model, "peft_config", None) or {}):
        raise ValueError(
            f"`adapter_name_or_path={source!r}` holds no LoRA weights for the {denoiser}: nothing was loaded."
        )
    others = [
        name
        for name, component in pipeline.components.items()
        if name != denoiser and getattr(component, "peft_config", None)
    ]
    if others:
        raise ValueError(
            f"`adapter_name_or_path={source!r}` also holds weights for {', '.join(others)}, which are not trained "
            f"here and would be missing from what is saved. Use an adapter of the {denoiser} alone."
        )
    config = copy.copy(model.peft_config[POLICY])
    config.init_lora_weights = True  # how a loaded adapter was once initialised does not matter any more
    check_peft_config(config)
    model.requires_grad_(False)
    _activate_policy(model)
    cast_training_params(model, torch.float32)
    _freeze_reference(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in read:
                parameter.copy_(read[name])


def load_trained(pipeline: DiffusionPipeline, denoiser: str, source: str) -> None:
    """
    Load what was trained elsewhere, to make images with it: an adapter of any origin, or fully fine-tuned weights.

    Unlike [`load_initial`] it does not check whether the adapter could be trained further here. The source may also be
    a folder with the whole denoiser in a folder of the component's name, as full fine-tuning writes it. Raises
    `ValueError` if it holds nothing for this pipeline.
    """
    model, folder = getattr(pipeline, denoiser), Path(source).expanduser() / denoiser
    if (folder / "config.json").is_file():
        setattr(pipeline, denoiser, type(model).from_pretrained(folder, dtype=model.dtype))
        return
    load_weights(pipeline, denoiser, source)
    if not any(getattr(component, "peft_config", None) for component in pipeline.components.values()):
        raise ValueError(
            f"{source!r} holds no LoRA weights for {type(pipeline).__name__}: nothing was loaded. Give an adapter "
            "that was trained for this model."
        )


# ---- Files ----


def adapter_metadata(config: LoraConfig) -> dict[str, Any]:
    """
    What a loader must know to rebuild the adapter: r, lora_alpha, target_modules and every field off its default.

    A full dump of today's fields could not be read by a PEFT that lacks one of them; without the metadata diffusers
    takes lora_alpha for r and forgets rsLoRA. The result can be written as JSON.
    """
    always = {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": config.target_modules}
    defaults = type(config)().to_dict()
    changed = {name: value for name, value in config.to_dict().items() if value != defaults[name]}
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in (always | changed).items()
        if name not in _NOT_METADATA and not name.startswith("_")
    }


def save_adapter(
    pipeline_class: type[DiffusionPipeline],
    denoiser: str,
    model: ModelMixin,
    directory: Path,
    *,
    adapter: str = POLICY,
    weight_name: str = WEIGHTS_NAME,
    state_dict: dict[str, torch.Tensor] | None = None,
) -> None:
    """
    Write one adapter in diffusers' format, metadata included, into a folder, which is made if missing.

    For a pipeline without `save_lora_weights` (aMUSEd, Meissonic) the same file is written here, and read by
    `pipe.transformer.load_lora_adapter(folder, prefix="transformer", weight_name=...)`. diffusers'
    `AmusedLoraLoaderMixin.save_lora_weights` takes no metadata, so lora_alpha would be lost.

    `denoiser` is the name of the component, `"unet"` or `"transformer"`. `state_dict` is the whole model's gathered
    state, where it is sharded over processes.
    """
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    model = unwrapped(model)
    if state_dict is not None:
        state_dict = {plain_name(name): tensor for name, tensor in state_dict.items()}
    weights = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=adapter)
    weights = {plain_name(name): tensor.detach().to("cpu").contiguous() for name, tensor in weights.items()}
    denoiser = file_prefix(denoiser)
    tensors = {f"{denoiser}.{name}": tensor for name, tensor in weights.items()}
    metadata = adapter_metadata(model.peft_config[adapter])
    directory.mkdir(parents=True, exist_ok=True)
    if hasattr(pipeline_class, "save_lora_weights"):
        options = {f"{denoiser}_lora_layers": weights, f"{denoiser}_lora_adapter_metadata": metadata}
        pipeline_class.save_lora_weights(directory, weight_name=weight_name, **options)
        check_saved(directory / weight_name, tensors)
        return
    # The form of LoraBaseMixin._save_lora_weights (diffusers/loaders/lora_base.py), a method that is private there.
    named = {f"{denoiser}.{name}": value for name, value in metadata.items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(named, indent=2, sort_keys=True)}
    save_file(tensors, directory / weight_name, metadata=header)
    check_saved(directory / weight_name, tensors)


def load_adapter(model: ModelMixin, denoiser: str, file: Path, *, adapter: str = POLICY) -> None:
    """
    Put the weights of a file that [`save_adapter`] wrote into an adapter that is already attached to the model.

    `denoiser` is the name of the component. Raises `ValueError` if its keys and shapes are not the adapter's.
    """
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    model = unwrapped(model)
    weights = {name.removeprefix(f"{file_prefix(denoiser)}."): tensor for name, tensor in read_tensors(file).items()}
    own = get_peft_model_state_dict(model, adapter_name=adapter)
    names = {plain_name(name): name for name in own}
    expected = {name: own[names[name]] for name in names}
    wrong = set(weights) ^ set(expected)
    wrong |= {name for name in set(weights) & set(expected) if weights[name].shape != expected[name].shape}
    if wrong:
        raise ValueError(
            f"{file} does not fit the adapter of this run: {len(wrong)} tensors are missing, unknown or of another "
            f"shape (such as {sorted(wrong)[0]}). Resume with the `peft_config` that the checkpoint was trained with."
        )
    if sharded_modules(model):
        load_shards(expected, weights)
        return
    renamed = {names[name]: tensor for name, tensor in weights.items()}
    set_peft_model_state_dict(model, renamed, adapter_name=adapter)
