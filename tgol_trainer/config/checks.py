"""Check what `TrainingArguments` lets through: numbers out of range, a folder that is a file, unusable processes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainingArguments

_Rule = tuple[tuple[str, ...], Callable[[float], bool], str]

# Fields of TrainingArguments, what their values must fulfil (NaN fulfils nothing), and how a message says it.
_RULES: tuple[_Rule, ...] = (
    (
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
        lambda value: value >= 1,
        "at least 1",
    ),
    (("seed", "data_seed"), lambda value: 0 <= value < 2**32, "at least 0 and below 2**32"),
    (
        ("learning_rate", "weight_decay", "max_grad_norm", "adam_epsilon", "dataloader_num_workers"),
        lambda value: 0 <= value < math.inf,
        "at least 0 and finite",
    ),
    (("adam_beta1", "adam_beta2"), lambda value: 0 <= value < 1, "at least 0 and below 1"),
    (
        ("max_steps",),
        lambda value: value == -1 or value >= 1,
        "at least 1, or -1 for as many updates as `num_train_epochs` asks for",
    ),
    (
        ("num_train_epochs", "save_steps", "eval_steps", "logging_steps"),
        lambda value: 0 < value < math.inf,
        "larger than 0 and finite",
    ),
)


def check_ranges(args: Any) -> None:
    """
    Check the numbers of `TrainingArguments` that would fail later, or train nothing without a word.

    Args:
        args ([`TGOLConfig`]): The configuration.

    Raises:
        ValueError: for one that is out of range or not finite.
    """
    for names, fulfils, text in _RULES:
        for name in names:
            value = getattr(args, name)
            if value is not None and not fulfils(value):
                raise ValueError(f"`{name}` must be {text}, got {value}.")


def check_folder(path: str | None) -> None:
    """
    Check that a folder is one, or can be made one.

    Args:
        path (`str`, *optional*): The output folder.

    Raises:
        ValueError: if it is a file, or lies below one.
    """
    place = Path(path or ".").absolute()
    for part in (place, *place.parents):
        try:
            if part.is_dir():
                return
        except OSError as error:  # a name that is too long
            raise ValueError(f"`output_dir` is {path!r}: {error.strerror}. Name another folder.") from error
        if part.exists():
            raise ValueError(f"`output_dir` is {path!r}, and {str(part)!r} is a file. Name another folder.")


def check_processes(args: TrainingArguments) -> None:
    """
    Check that processes, device and precision fit each other, before anything is loaded.

    Args:
        args ([`TGOLConfig`]): The configuration.

    Raises:
        ValueError: for several processes that take themselves for the only one, float16 on a CPU, a way of sharding
            that is not supported, or a tracker that nobody knows.
    """
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    unknown = set(args.report_to) - set(INTEGRATION_TO_CALLBACK)
    if unknown:
        raise ValueError(
            f"`report_to` names {', '.join(sorted(unknown))}. Trackers are {', '.join(INTEGRATION_TO_CALLBACK)}; "
            "'none' leaves them out."
        )
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and args.world_size == 1:
        raise ValueError(
            f"The launcher started {world_size} processes (WORLD_SIZE), but this one runs alone and all would write "
            f"to {args.output_dir}. On machines without a GPU add `--use_cpu true` (TGOLConfig(use_cpu=True))."
        )
    if args.fp16 and args.device.type == "cpu":
        raise ValueError(
            "`fp16=True` has no effect on a CPU, where training would run in float32. Leave it out, or use "
            "`bf16=True`."
        )
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched != "no" and not (args.bf16 or args.fp16):  # which Trainer would follow, and nothing else here
        wanted = launched if launched == "fp16" else "bf16"
        raise ValueError(
            f"The launcher asks for mixed precision, {launched!r}, and the run's settings for none. Add `--{wanted} "
            f"true` (TGOLConfig({wanted}=True)), or `--mixed_precision no` to `accelerate launch`."
        )
    if is_asked_for(args, "deepspeed"):
        _check_deepspeed(args)
    if not is_asked_for(args, "fsdp"):
        return
    version = (args.fsdp_config or {}).get("version") or os.environ.get("FSDP_VERSION") or 2
    if int(version) != 2:
        raise ValueError(f"`fsdp` is of version {version}, which is not supported. Use version 2, the default.")
    if getattr(args, "full_finetuning", False):
        raise ValueError(
            "`full_finetuning=True` keeps a frozen copy of the denoiser whole in each process, so `fsdp` would save "
            "little. Train an adapter, or leave `fsdp` out."
        )
    if args.world_size == 1:
        raise ValueError("`fsdp` shards a model over several processes, and there is one. Leave it out.")


def _check_deepspeed(args: TrainingArguments) -> None:
    """Refuse what was not seen to train the same as without DeepSpeed, or is known not to."""
    config: dict[str, Any] = {} if args.deepspeed_plugin is None else args.deepspeed_plugin.deepspeed_config
    zero = config.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage != 2:
        raise ValueError(
            f"`deepspeed` with ZeRO stage {stage} is not supported. Use stage 2 "
            "(scripts/accelerate_configs/zero2.yaml), or FSDP2 (`fsdp=True`), which also divides the base model."
        )
    for name in ("offload_optimizer", "offload_param"):
        if (zero.get(name) or {}).get("device", "none") != "none":
            raise ValueError(f"`deepspeed` with `{name}` is not supported. Leave it out.")
    for name in ("optimizer", "scheduler"):
        if name in config:
            raise ValueError(
                f"The settings of `deepspeed` name {'an' if name == 'optimizer' else 'a'} `{name}`, which the run's "
                "own settings and the card would not tell of. Leave it out there."
            )
    if args.bf16 or args.fp16 or any(config.get(name, {}).get("enabled") is True for name in ("bf16", "fp16")):
        raise ValueError(
            "`deepspeed` turns the trained weights, too, into the 16 bits of `bf16` and `fp16`, and what is saved "
            "would be those. Leave the precision out, or use FSDP2 (`fsdp=True`)."
        )
    if not args.optim.startswith("adamw_torch"):
        raise ValueError(
            f"`optim` is {args.optim.value!r}, and `deepspeed` hands an optimizer all weights as one row of numbers, "
            "of which it may make something else than of matrices. Use 'adamw_torch' or 'adamw_torch_fused'."
        )
    if getattr(args, "on_nan", "stop") == "skip":
        raise ValueError("`on_nan='skip'` comes too late with `deepspeed`, which updates in the backward pass.")


def check_sharding(args: TrainingArguments, *, fsdp: bool, deepspeed: bool) -> None:
    """
    Check that a run is sharded where that was asked for: on CPUs accelerate takes DistributedDataParallel instead.

    Args:
        args ([`TGOLConfig`]): The configuration.
        fsdp (`bool`): Whether FSDP runs.
        deepspeed (`bool`): Whether DeepSpeed runs.

    Raises:
        ValueError: if it does not, and should.
    """
    if is_asked_for(args, "deepspeed") and not deepspeed:
        raise ValueError(
            "`deepspeed` was asked for and does not run: accelerate starts it on GPUs alone, and would keep the whole "
            "optimizer in each process. Leave it out."
        )
    if is_asked_for(args, "fsdp") and not fsdp:
        raise ValueError(
            "`fsdp` was asked for and does not run: accelerate shards over GPUs alone, and would keep a whole copy of "
            "the model in each process. Leave it out."
        )


def is_asked_for(args: TrainingArguments, name: str) -> bool:
    """
    Return whether a setting is switched on, by the run or by `accelerate launch`.

    Args:
        args ([`TGOLConfig`]): The configuration.
        name (`str`): Such as `"fsdp"` or `"deepspeed"`, for which the launcher has a variable of the environment.
    """
    launched = os.environ.get(f"ACCELERATE_USE_{name.upper()}", "false").lower() in ("1", "true", "yes")
    return bool(getattr(args, name)) or launched
