"""What decides the meaning of a run: written into checkpoints, compared when one is resumed."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from tgol_trainer.adapters import POLICY, adapter_metadata
from tgol_trainer.config import MethodArguments, TGOLConfig
from tgol_trainer.data import ScoredDataset, ScoredStream
from tgol_trainer.fingerprint import component_fingerprint

from .files import public_arguments

if TYPE_CHECKING:
    from tgol_trainer.families import ModelFamily

logger = logging.getLogger(__name__)

TRAINING_FIELDS = (
    "learning_rate",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "bf16",
    "fp16",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
)
"""Settings of TrainingArguments that decide what is trained, but for its length."""
_ARGUMENTS = (
    *(item.name for item in dataclasses.fields(MethodArguments)),
    "full_finetuning",
    "reference",
    "aspect_buckets",
    "random_flip",
    "caption_dropout",
    "latent_sampling",
    "timestep_sampling",
    "train_guidance",
    "num_frames",
    *TRAINING_FIELDS,
)
# The optimizer's state has their form or their values.
_FIXED = {"full_finetuning", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"}
_FIXED |= {"r", "target_modules"}

ALL = "all"
"""Entry of `TGOLConfig.allow_changed` that stands for every name."""


@dataclasses.dataclass(frozen=True)
class Change:
    """
    A setting that is another than its checkpoint's.

    Args:
        name (`str`): Its name.
        before (`Any`): Value in the checkpoint.
        now (`Any`): Value of the run that resumes.
        step (`int`): Step of the checkpoint.
    """

    name: str
    before: Any
    now: Any
    step: int

    def __str__(self) -> str:
        return f"{self.name} from {_shown(self.before)} to {_shown(self.now)}"


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def decisive_settings(args: TGOLConfig, family: ModelFamily, rows: Any, resolution: tuple[int, int]) -> dict[str, Any]:
    """
    Return what decides the meaning of a run, by name, as JSON gives it back.

    Args:
        args ([`TGOLConfig`]): Its settings.
        family ([`families.ModelFamily`]): The model, before anything is trained.
        rows ([`data.ScoredDataset`], [`data.ScoredStream`] or `None`): The training rows.
        resolution (`tuple[int, int]`): (height, width) of training images.
    """
    values = args.to_dict()
    found = {name: values[name] for name in _ARGUMENTS if name in values}
    if not args.full_finetuning:
        found |= adapter_metadata(family.denoiser.peft_config[POLICY])
    found |= {"resolution": resolution, "world_size": args.world_size}
    found |= {"model": _model_fingerprint(family), "train_dataset": _data_fingerprint(rows)}
    if isinstance(rows, ScoredStream):  # whose workers decide the order of its rows
        found["dataloader_num_workers"] = args.dataloader_num_workers
    return json.loads(json.dumps(found, default=str))


def _model_fingerprint(family: ModelFamily) -> str:
    """Class, dtype and hash of a pipeline's networks, without adapters."""
    digest = xxhash.xxh3_64()
    for name, component in sorted(family.pipeline.components.items()):
        if isinstance(component, torch.nn.Module):
            digest.update(f"{name} {component_fingerprint(component, _base_name)}".encode())
    dtype = str(family.denoiser.dtype).removeprefix("torch.")
    return f"{type(family.pipeline).__name__} in {dtype}, weights {digest.hexdigest()}"


def _base_name(weight: str) -> str | None:
    return None if ".lora_" in weight else weight.replace(".base_layer", "")


def _data_fingerprint(rows: Any) -> str | None:
    """Number and hash of the rows in their order: prompts, scores, pixels. What a stream gives is not known."""
    if not isinstance(rows, ScoredDataset):
        return None if rows is None else "a stream"
    digest, prompts = xxhash.xxh3_64(), rows.prompts
    for start in range(0, len(prompts), 10_000):  # the text of millions in one piece would take gigabytes
        digest.update(json.dumps(prompts[start : start + 10_000]).encode())
    for values in (rows.scores, rows.row_ids, rows.image_keys):
        digest.update(values.tobytes())
    return f"{len(rows)} rows {digest.hexdigest()}"


def find_changes(before: Mapping[str, Any], now: Mapping[str, Any], step: int) -> list[Change]:
    """Return the settings that differ between a checkpoint, written at `step`, and a run."""
    return [
        Change(name, before.get(name), now.get(name), step)
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def check_changes(changes: list[Change], allowed: list[str] | None, checkpoint: str) -> None:
    """
    Refuse changed settings that are not allowed to change.

    Args:
        changes (`list[Change]`): Those of [`find_changes`].
        allowed (`list[str]`, *optional*): Names, or `["all"]`.
        checkpoint (`str`): The checkpoint, for the message.

    Raises:
        ValueError: with every name that is not allowed, its two values, and the remedy.
    """
    fixed = [change for change in changes if change.name in _FIXED]
    if fixed:
        raise ValueError(
            f"{checkpoint} cannot be resumed with {'; '.join(map(str, fixed))}: the state of the optimizer depends on "
            "it. Set it back, or start a new run, for an adapter with `adapter_name_or_path` at the checkpoint."
        )
    refused = [change for change in changes if ALL not in (allowed or []) and change.name not in (allowed or [])]
    if refused:
        names = " ".join(change.name for change in refused)
        raise ValueError(
            f"{checkpoint} was trained with other settings: {'; '.join(map(str, refused))}. Set them back, start a "
            f"new run, or let them change from here on, which the card will say: `allow_changed={names.split()}` "
            f"(`--allow_changed {names}`)."
        )
    for change in changes:
        logger.warning("Changed from step %d on, as `allow_changed` says: %s.", change.step, change)


def log_harmless(before: Mapping[str, Any], args: TGOLConfig, checkpoint: str) -> None:
    """Log other settings that changed; `before` are the arguments that a checkpoint holds."""
    now = json.loads(json.dumps(public_arguments(args), default=str))
    others = [change for change in find_changes(before, now, 0) if change.name not in (*_ARGUMENTS, "allow_changed")]
    if others:
        logger.info("Changed since %s: %s.", checkpoint, "; ".join(map(str, others)))


def set_learning_rate(optimizer: torch.optim.Optimizer, scheduler: Any, value: float) -> None:
    """Give a resumed optimizer and its schedule another peak; they come back with the checkpoint's."""
    for group in optimizer.param_groups:
        before = group.get("initial_lr", group["lr"])
        group["lr"] = group["lr"] / before * value if before else value
        group["initial_lr"] = value
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [value] * len(scheduler.base_lrs)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
