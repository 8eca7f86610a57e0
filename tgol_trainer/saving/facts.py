"""Gather the facts that a model card states, at any moment of a run."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import re
from typing import TYPE_CHECKING, Any, Protocol

from tgol_trainer.adapters import POLICY, adapter_metadata
from tgol_trainer.config import FULL_LEARNING_RATE, LORA_LEARNING_RATE, MethodArguments, TGOLConfig, default_of
from tgol_trainer.families import hub_license
from tgol_trainer.labels import Labeler
from tgol_trainer.scaling import Scaling
from tgol_trainer.thresholds import ScoreCombination, shown

from .card import CardFacts, DatasetFacts, Hyperparameter, SharedFile
from .settings import TRAINING_FIELDS, Change

if TYPE_CHECKING:
    import datasets
    from transformers import TrainerState

    from tgol_trainer.families import ModelFamily

_HUB_DATA = re.compile(r"^hf://datasets/([^/@]+/[^/@]+)@([0-9a-f]{7,40})/")

# Settings of TrainingArguments that a card shows; those of TGOLConfig itself are listed by their class.
_TRAINING_FIELDS = (*TRAINING_FIELDS, "num_train_epochs", "max_steps", "torch_compile")
_PACKAGES = ("torch", "transformers", "diffusers", "peft", "datasets", "accelerate")
# Where the data lie and how they are checked says nothing about the result.
_NOT_SHOWN = {"dataset_num_proc", "allow_changed", "adapter_name_or_path", "hub_gated", "activation_checkpointing"}
_NOT_SHOWN |= {"cache", "cache_dir", "share_formats"}


class CardSource(Protocol):
    """The members of a trainer that a card is made of; [`SavingTrainer`] says what they are."""

    args: TGOLConfig
    family: ModelFamily
    labeler: Labeler | None
    state: TrainerState
    dataset_facts: list[DatasetFacts]
    example_prompt: str | None
    card_extras: dict[str, Any]
    changes: list[Change]
    scaling: Scaling | None
    shared_files: list[SharedFile]
    limits: list[str]
    hub_model_id: str | None


def dataset_facts(dataset: datasets.Dataset | datasets.IterableDataset, columns: list[str]) -> DatasetFacts:
    """
    Name a dataset by its Hub id and commit where `datasets` recorded them, else not at all.

    Args:
        dataset (`datasets.Dataset` or `datasets.IterableDataset`): As the user gave it.
        columns (`list[str]`): Names of the columns used.
    """
    for source in getattr(dataset.info, "download_checksums", None) or {}:
        if match := _HUB_DATA.match(source):
            return DatasetFacts(name=match[1], revision=match[2], columns=columns)
    return DatasetFacts(columns=columns)


def _hyperparameters(args: TGOLConfig, effective_batch: int) -> list[Hyperparameter]:
    own = [*MethodArguments.__annotations__, *TGOLConfig.__annotations__]
    defaults = {item.name: default_of(item) for item in dataclasses.fields(TGOLConfig)}
    defaults["learning_rate"] = FULL_LEARNING_RATE if args.full_finetuning else LORA_LEARNING_RATE
    values = args.to_dict()
    shown = [name for name in dict.fromkeys([*_TRAINING_FIELDS, *own]) if name in values and name not in _NOT_SHOWN]
    shown = [
        name for name in shown if name in _TRAINING_FIELDS or not name.startswith(("logging_", "remove_", "ddp_"))
    ]
    listed = [Hyperparameter(name, values[name], values[name] == defaults[name]) for name in shown]
    return [Hyperparameter("rows per update", effective_batch), *listed]


def _hardware(world_size: int) -> str:
    import torch

    count = f"{world_size} × " if world_size > 1 else ""
    if torch.cuda.is_available():
        return f"{count}{torch.cuda.get_device_name()}"
    return f"{count}CPU ({platform.machine()}, {os.cpu_count()} cores)"


def _versions() -> dict[str, str]:
    from tgol_trainer import __version__

    return {"tgol_trainer": __version__, **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def _training(state: TrainerState) -> dict[str, Any]:
    facts: dict[str, Any] = {}
    if not state.global_step:
        return facts
    facts["steps"] = state.global_step
    facts["epochs"] = round(state.epoch, 3) if state.epoch is not None else None
    for line in state.log_history:
        if "train_runtime" in line:
            facts["train_seconds"] = line["train_runtime"]
        for name in ("loss", "rewards/accuracies", "rewards/margins", "eval_loss", "eval_rewards/accuracies"):
            if name in line:
                facts[name] = line[name]
    return facts


def _combination_facts(combination: ScoreCombination) -> dict[str, Any]:
    columns = zip(combination.columns, combination.weights, combination.centers, combination.scales, strict=True)
    rows: list[dict[str, Any]] = [
        {"name": name, "weight": weight, "mean": shown(mean, std), "std": std} for name, weight, mean, std in columns
    ]
    for row, tau in zip(rows, combination.raw_thresholds, strict=False):
        row["threshold"] = shown(tau, row["std"])
    return {"method": combination.method, "columns": rows}


def _label_facts(labeler: Labeler | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the card says of the threshold, and of the weights."""
    if labeler is None:
        return {}, {}
    threshold = {
        **labeler.threshold.to_dict(),
        "value": shown(labeler.threshold.value, labeler.score_std),
        "num_negative": labeler.threshold.num_negative,
        "normalization": dataclasses.asdict(labeler.normalization),
        **({"combination": _combination_facts(labeler.combination)} if labeler.combination else {}),
        **{name: value for name, value in labeler.strategy.items() if name != "name"},
    }
    if labeler.weights is None:
        return threshold, {}
    weighting = labeler.weighting
    facts = {**dataclasses.asdict(labeler.weights), "formula": weighting.formula}
    return threshold, {**facts, "confidence_scale": weighting.scale} if "c·" in weighting.formula else facts


def harvest_facts(trainer: CardSource) -> CardFacts:
    """
    Gather what a card states about a run, at any moment of it.

    Args:
        trainer ([`CardSource`]): The trainer. Its `card_extras` override single fields.

    Returns:
        [`card.CardFacts`]
    """
    args, family, origin = trainer.args, trainer.family, trainer.family.origin
    extras = dict(trainer.card_extras)
    hub_id = getattr(trainer, "hub_model_id", None) or args.hub_model_id
    usage = family.full_usage if args.full_finetuning else family.usage
    prompt = trainer.example_prompt or "a photo"
    if args.loss_type == "csft":  # the suffix that it was trained to answer with its positives
        prompt += args.csft_suffixes[0]
    threshold, weights = _label_facts(trainer.labeler)
    limits = ["It inherits the limits, the biases and the terms of use of its base model."]
    if trainer.scaling is not None:
        limits.append(
            "The adapter was multiplied by {:.4g} after training, to a chosen drift: {:.4g} as trained, {:.4g} as "
            "saved (mean squared change of the denoiser's output).".format(*trainer.scaling)
        )
    limits += trainer.limits
    limits += [f"Training was resumed at step {change.step} with a change of {change}." for change in trainer.changes]
    adapter = {} if args.full_finetuning else adapter_metadata(family.denoiser.peft_config[POLICY])
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    license_facts: dict[str, Any] = dict(
        hub_license(origin.hub_id, origin.revision) if origin.hub_id else origin.license
    )
    facts = CardFacts(
        model_name=os.path.basename(os.path.normpath(hub_id or args.output_dir)),
        hub_model_id=hub_id,
        base_model=origin.hub_id,
        base_model_revision=origin.revision,
        base_model_note=origin.note,
        pipeline_class=type(family.pipeline).__name__,
        pipeline_tag=family.pipeline_tag,
        datasets=trainer.dataset_facts,
        threshold=threshold,
        weights=weights,
        **license_facts,
        adapter=adapter,
        full_finetuning=args.full_finetuning,
        hyperparameters=_hyperparameters(args, batch),
        training=_training(trainer.state),
        example_prompt=trainer.example_prompt,
        usage=usage(hub_id or ".", prompt),
        files=trainer.shared_files,
        hardware=_hardware(args.world_size),
        versions=_versions(),
        limits=limits,
        created=datetime.date.today().isoformat(),
    )
    return dataclasses.replace(facts, **extras)
