"""The twin of an adapter for ComfyUI, written beside it and compared, and what each program makes of either file."""

from __future__ import annotations

import copy
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from tgol_trainer._files import replacing
from tgol_trainer.adapter_files import WEIGHTS_NAME, unwrapped
from tgol_trainer.adapters import POLICY

from .card import SharedFile
from .comfyui import LAYOUTS, from_comfyui, layout_of, lora_modules, to_comfyui
from .facts import harvest_facts

if TYPE_CHECKING:
    from tgol_trainer.config import TGOLConfig
    from tgol_trainer.families import ModelFamily

    from .facts import CardSource

logger = logging.getLogger(__name__)

# Of the largest weight of a module: what sums in another order change in float32.
_TOLERANCE = 1e-5
_KNOWN = re.compile(r"lora_(A\.weight|B\.weight|magnitude_vector(\.weight)?)$")
# Of the two programs, each reads some files of the other. Of these, ComfyUI finds the names of diffusers and no alpha:
_ALPHA_UNREAD = (
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "ZImagePipeline",
    "QwenImagePipeline",
)
# Of these, diffusers takes alpha or the names of ComfyUI's file for an error.
_UNREAD_BY_DIFFUSERS = (
    "StableDiffusion3Pipeline",
    "Flux2Pipeline",
    "Flux2KleinPipeline",
    "LTXPipeline",
    "LTXConditionPipeline",
    "LTX2Pipeline",
)
_LATER = "`tgol export --format comfyui` writes it"


def comfyui_name(title: str) -> str:
    """Return a file name that says which model this is, because ComfyUI lists files by name alone."""
    return f"{re.sub(r'[^0-9A-Za-z._-]+', '-', title).strip('.-') or 'adapter'}_comfyui.safetensors"


def comfyui_tensors(family: ModelFamily) -> dict[str, torch.Tensor]:
    """
    Return the policy adapter's tensors under the names of ComfyUI's loader.

    Raises:
        ValueError: if the loader has no names for the family, for a module or for a kind of tensor.
    """
    from peft.utils import get_peft_model_state_dict

    denoiser = unwrapped(family.denoiser)
    state = get_peft_model_state_dict(denoiser, adapter_name=POLICY)
    strange = [name for name in state if not _KNOWN.search(name)]
    if strange:
        raise ValueError(
            f"ComfyUI's loader does not read {len(strange)} tensors of the adapter (such as {strange[0]}), so there "
            "is no 'comfyui' file of it. Use another format."
        )
    layout = layout_of(type(family.pipeline).__name__)
    return to_comfyui(lora_modules(denoiser, POLICY), denoiser, layout)


def check_share_formats(args: TGOLConfig, family: ModelFamily) -> None:
    """
    Refuse a format that was asked for by name and cannot be written, before training.

    Args:
        args ([`TGOLConfig`]): The configuration.
        family ([`families.ModelFamily`]): With the policy attached.

    Raises:
        ValueError: with the reason.
    """
    if "comfyui" not in (args.share_formats or []):
        return
    obstacle = _obstacle(args, family)
    if obstacle:
        raise ValueError(f"`share_formats` names 'comfyui': {obstacle}")
    layout = layout_of(type(family.pipeline).__name__)
    unnamed = [path for path in lora_modules(family.denoiser, POLICY) if layout.name(path) is None]
    if unnamed:
        raise ValueError(
            f"`share_formats` names 'comfyui', and its loader has no name for {len(unnamed)} trained modules (such as "
            f"{unnamed[0]}). Leave it out, or train only attention and feed-forward layers."
        )


def _obstacle(args: TGOLConfig, family: ModelFamily) -> str | None:
    """Return why a run has no file for ComfyUI, or `None` if it has one."""
    name = type(family.pipeline).__name__
    if args.full_finetuning:
        return "all weights are trained, so there is no adapter. Leave it out."
    if name not in LAYOUTS:
        return f"the names of {name} in ComfyUI's loader are not known here. Leave it out."
    dora = any(module.magnitude is not None for module in lora_modules(family.denoiser, POLICY).values())
    if dora and getattr(unwrapped(family.denoiser), "hf_quantizer", None) is not None:
        return f"DoRA's file needs the norms of a base model that is not quantised. {_LATER} on that base."
    return None


def shared_files(source: CardSource, folder: Path, *, sharded: bool) -> list[SharedFile]:
    """
    Write the twin of an adapter that was saved in a run's folder; return what the card says of both.

    Args:
        source ([`facts.CardSource`]): The trainer.
        folder (`Path`): Where the adapter was saved. In a checkpoint there is no twin.
        sharded (`bool`): As in [`write_twin`].

    Returns:
        `list[card.SharedFile]`: empty without a twin.
    """
    args, family = source.args, source.family
    if folder != Path(args.output_dir) or args.full_finetuning:
        return []
    twin = write_twin(args, family, folder / comfyui_name(harvest_facts(source).model_name), sharded=sharded)
    if twin is None:
        return []
    return [SharedFile(WEIGHTS_NAME, "diffusers", in_other_program(family, "diffusers")), twin]


def write_twin(args: TGOLConfig, family: ModelFamily, file: Path, *, sharded: bool) -> SharedFile | None:
    """
    Write the adapter's twin for ComfyUI, read it back, and compare each module's weight with PEFT's.

    Args:
        args ([`TGOLConfig`]): The configuration; without `share_formats` a twin is written wherever there can be one.
        family ([`families.ModelFamily`]): With the trained policy.
        file (`Path`): The twin. An older one is removed first: it would be of another adapter.
        sharded (`bool`): Whether the weights lie on several processes; then there is no twin.

    Returns:
        [`card.SharedFile`], *optional*: the twin with the result; `None` without one. Where it was to be expected, a
        warning says why.
    """
    file.unlink(missing_ok=True)
    wanted = args.share_formats
    if wanted is not None and "comfyui" not in wanted:
        return None
    # ComfyUI does not know a base that diffusers alone cannot load, such as the embedded ones.
    if wanted is None and (_obstacle(args, family) or family.origin.loading_code):
        return None
    if sharded:
        logger.warning("No file for ComfyUI: the weights are spread over processes. %s.", _LATER)
        return None
    try:
        with replacing(file) as draft:
            save_file(comfyui_tensors(family), draft, metadata={"format": "pt"})
            found = _compare(family, draft)
    except ValueError as error:
        logger.warning("No file for ComfyUI: %s The adapter itself is saved.", error)
        return None
    return SharedFile(file.name, "ComfyUI", in_other_program(family, "comfyui"), found)


def _compare(family: ModelFamily, file: Path) -> str:
    """Read a twin back and return what was compared; raise ValueError if it is not the trained adapter."""
    denoiser = unwrapped(family.denoiser)
    layers = lora_modules(denoiser, POLICY)
    found = from_comfyui(load_file(file), denoiser, layout_of(type(family.pipeline).__name__))
    if found.keys() != layers.keys():
        raise ValueError(f"it was read back with {len(found)} modules, where {len(layers)} were trained.")
    largest = effect = 0.0
    for path, module in found.items():
        before, ours = _merged(denoiser.get_submodule(path))
        difference = (module.applied(before) - ours).abs().max().item()
        if not difference <= _TOLERANCE * ours.abs().max().item():
            raise ValueError(f"read back, {path} differs from the trained weight by {difference:.3g}.")
        largest, effect = max(largest, difference), max(effect, (ours - before).abs().max().item())
    return (
        f"read back, all {len(found)} modules found, and applied by the formulas of ComfyUI's loader: weights differ "
        f"from the trained ones by at most {largest:.2g}, training moved them by up to {effect:.2g}"
    )


@torch.no_grad()
def _merged(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's weight without and with the policy, merged by PEFT, float32; if quantised, the update alone."""
    base = layer.get_base_layer().weight
    if not base.is_floating_point():  # packed: there is no weight to add to, and no DoRA
        update = layer.get_delta_weight(POLICY).float()
        return torch.zeros_like(update), update
    single = copy.deepcopy(layer).float()
    before = single.get_base_layer().weight.detach().clone()
    single.merge(adapter_names=[POLICY])
    return before, single.get_base_layer().weight.detach()


def in_other_program(family: ModelFamily, file: str) -> str:
    """
    Say what a program sees that is given the other program's file.

    Args:
        family ([`families.ModelFamily`]): With the policy.
        file (`str`): `"diffusers"` or `"comfyui"`: whose file it is.
    """
    name = type(family.pipeline).__name__
    modules = lora_modules(family.denoiser, POLICY).values()
    scalings = {module.scaling for module in modules}
    dora = any(module.magnitude is not None for module in modules)
    if file == "comfyui":
        if name in _UNREAD_BY_DIFFUSERS:
            return "diffusers does not read this file."
        lost = [
            *(["an alpha of each module"] if len(scalings) > 1 else []),
            *(["the magnitudes of DoRA"] if dora else []),
        ]
        return f"diffusers reads this file without {' and '.join(lost)}." if lost else "diffusers reads this file too."
    if name not in LAYOUTS:
        return "The names of this model in ComfyUI's loader are not known here."
    if name not in _ALPHA_UNREAD:
        return "ComfyUI loads nothing of this file, and says so in its log alone."
    lost = []
    if scalings != {1.0}:
        times = f"{1 / min(scalings):.3g} times" if len(scalings) == 1 else "another multiple of"
        lost.append(f"at {times} its strength, since it does not read alpha here")
    lost += ["without the magnitudes of DoRA"] if dora else []
    return f"ComfyUI loads this file {' and '.join(lost)}." if lost else "ComfyUI loads this file as trained."
