"""The source of an export: the trained weights in a folder, and the base model that they belong to."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any

import torch

from tgol_trainer import adapters
from tgol_trainer.config import size_of
from tgol_trainer.families import FamilySettings, ModelFamily, ModelOrigin, load_family
from tgol_trainer.saving.card import FACTS_NAME, CardFacts, read_facts
from tgol_trainer.saving.files import recorded_expert
from tgol_trainer.shapes import EMBEDDED

logger = logging.getLogger(__name__)

# Options that an exported pipeline needs for loading, like its base model.
_KEPT_OPTIONS = ("meissonic_repository", "trust_remote_code")


@dataclasses.dataclass(frozen=True)
class Source:
    """
    A folder with trained weights and its base model.

    Args:
        directory (`Path`): Holds an adapter in diffusers' format, or a denoiser's folder.
        facts ([`card.CardFacts`]): The facts of its card.
        model (`str`): Base model: a Hub id, a folder, or the name of an embedded model.
        options (`dict[str, Any]`): Options of [`families.load_family`].
        dtype (`torch.dtype`): Dtype of the exported weights.
        rounds_base (`bool`): Whether the base model is exported too, and compared after rounding to that dtype.
        device (`str`): Device of the comparison.
    """

    directory: Path
    facts: CardFacts
    model: str
    options: dict[str, Any]
    dtype: torch.dtype
    rounds_base: bool
    device: str

    @property
    def is_adapter(self) -> bool:
        """Whether the folder holds an adapter."""
        return _has_adapter(self.directory)

    @property
    def settings(self) -> FamilySettings:
        """Choices of the run on which depends what was trained."""
        recorded = {item.name: item.value for item in self.facts.hyperparameters}
        return FamilySettings(
            expert=recorded_expert(str(self.directory)),
            num_frames=recorded.get("num_frames"),
            size=size_of(recorded.get("resolution")),
        )

    def load_base(self, *, compute: bool = True) -> ModelFamily:
        """
        Load a fresh base model, in float32 on the device unless `compute` is false.

        All comparisons run in float32: in half precision, rounding inside a pass is as large as the effect of a short
        training.
        """
        dtype = self.dtype if self.rounds_base else torch.float32
        family = load_family(self.model, {**self.options, "dtype": dtype}, self.settings)
        return in_float32(family).to(self.device) if compute else family

    def load_exported(self, folder: Path, origin: ModelOrigin) -> ModelFamily:
        """Load a complete pipeline that was exported, in float32 on the device."""
        kept = {name: value for name, value in self.options.items() if name in _KEPT_OPTIONS}
        exported = load_family(str(folder), {**kept, "dtype": self.dtype}, self.settings)
        return in_float32(type(exported)(exported.pipeline, origin, exported.settings)).to(self.device)


def in_float32(family: ModelFamily) -> ModelFamily:
    """Convert every component to float32 in place, adapters too, and return the family."""
    for component in family.pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.float()
    family.dtype = torch.float32
    return family


def find_base(
    directory: Path, facts: CardFacts, model: str | None, options: dict[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the base model that the user or the folder's card names, and its options with the recorded revision."""
    embedded = [name for name, model in EMBEDDED.items() if model.note == facts.base_model_note]
    recorded = facts.base_model or (embedded[0] if embedded else None)
    if model is not None:
        if recorded is not None and model != recorded and not Path(model).exists():
            logger.warning("%s was trained on %s; it is exported on %s, as asked.", directory, recorded, model)
        if model != facts.base_model:
            return model, options
    if recorded is None:
        raise ValueError(
            f"{directory} does not record the name of its base model (it was a local folder or a loaded pipeline). "
            "Name it with `model_name_or_path`."
        )
    if facts.base_model_revision and facts.base_model == recorded:
        options = {"revision": facts.base_model_revision, **options}
    return recorded, options


def folder_facts(directory: Path) -> CardFacts:
    """Return the facts of a folder's card, or almost empty ones if it has none, as an adapter from elsewhere."""
    if (directory / FACTS_NAME).is_file():
        return read_facts(directory)
    return CardFacts(model_name=directory.resolve().name, full_finetuning=not _has_adapter(directory))


def check_directory(directory: Path) -> None:
    """Raise a `FileNotFoundError` for a folder without trained weights of a run."""
    denoisers = [name for name in ("unet", "transformer") if (directory / name / "config.json").is_file()]
    if (directory / "model_index.json").is_file():
        raise FileNotFoundError(
            f"{directory} is a complete pipeline already, not the output of a training run. Name an `output_dir`."
        )
    if not directory.is_dir() or not (_has_adapter(directory) or denoisers):
        raise FileNotFoundError(
            f"{directory} holds neither {adapters.WEIGHTS_NAME} nor a folder `unet` or `transformer`. Name the "
            "`output_dir` of a run, or one of its checkpoints."
        )


def check_fits(source: Source, family: ModelFamily) -> None:
    """
    Raise a `ValueError` if an adapter was trained on another model. It names the first module that does not fit.

    The loader itself would list every tensor.
    """
    from safetensors import safe_open

    modules = dict(family.denoiser.named_modules())
    prefix, suffix = f"{adapters.file_prefix(family.denoiser_name)}.", ".lora_A.weight"
    with safe_open(source.directory / adapters.WEIGHTS_NAME, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if not (name.startswith(prefix) and name.endswith(suffix)):
                continue
            path, size = name[len(prefix) : -len(suffix)], file.get_slice(name).get_shape()[1]
            weight = getattr(modules.get(path), "weight", None)
            if weight is None or weight.shape[1] != size:
                has = "no such module" if weight is None else f"one of {weight.shape[1]}"
                raise ValueError(
                    f"The adapter in {source.directory} was trained on another model than {source.model}. It changes "
                    f"{path} with {size} inputs, and the model has {has}. Name its base with `model_name_or_path`."
                )


def _has_adapter(directory: Path) -> bool:
    return (directory / adapters.WEIGHTS_NAME).is_file()
