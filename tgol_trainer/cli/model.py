"""The base model and its adapter as a command line names them, and whether they fit the card."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from typing import TYPE_CHECKING, Any, Literal

from trl import ModelConfig

from tgol_trainer.config import TGOLConfig

from .console import plain_errors

if TYPE_CHECKING:
    from tgol_trainer.planning import Setup

logger = logging.getLogger(__name__)

_NOT_USED = {"help": "Means nothing for diffusion pipelines: another value is refused."}


@dataclass
class ModelArguments(ModelConfig):
    """TRL's model arguments with LoRA defaults for denoisers."""

    use_peft: bool = field(
        default=False,
        metadata={"help": "No effect: a LoRA adapter is trained unless `full_finetuning` is set."},
    )
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Modules that get a LoRA. None: those of the family (docs/families.md)."}
    )
    attn_implementation: str | None = field(default=None, metadata=_NOT_USED)
    lora_target_parameters: list[str] | None = field(default=None, metadata=_NOT_USED)
    lora_modules_to_save: list[str] | None = field(default=None, metadata=_NOT_USED)
    lora_task_type: str = field(default="CAUSAL_LM", metadata=_NOT_USED)
    bnb_4bit_quant_storage: str | None = field(default=None, metadata=_NOT_USED)

    torchao: Literal["int8", "float8"] | None = field(
        default=None,
        metadata={"help": "Load the denoiser's linear layers in 8 bits with torchao, weights alone. Needs no GPU."},
    )
    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha; the update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "LoRA dropout; above 0 the policy's pass is noisy and the reference's is not."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.torchao and (self.load_in_4bit or self.load_in_8bit):
            raise ValueError("--torchao and --load_in_4bit or --load_in_8bit: one way to quantise is enough.")


# TRL's fields that mean nothing here. A value other than the default is refused, not dropped in silence.
UNUSED: tuple[str, ...] = (
    "attn_implementation",
    "trust_remote_code",
    "lora_target_parameters",
    "lora_modules_to_save",
    "lora_task_type",
    "ignore_bias_buffers",
    "bnb_4bit_quant_storage",
)


def changed(arguments: Any) -> list[str]:
    """Return the names of fields that are not at their default."""
    return [item.name for item in dataclasses.fields(arguments) if getattr(arguments, item.name) != item.default]


def model_init_kwargs(model: ModelArguments, training: TGOLConfig) -> dict[str, Any] | None:
    """Return the arguments of `from_pretrained`, `None` if there are none."""
    options = training.pipeline_kwargs
    if model.model_revision != "main":
        options.setdefault("revision", model.model_revision)
    if model.dtype not in (None, "float32"):
        options.setdefault("dtype", model.dtype)
    return options or None


def quantization_config(model: ModelArguments) -> Any:
    """Return diffusers' configuration of the quantisation that is asked for, `None` if there is none."""
    useless = {"use_bnb_nested_quant", "bnb_4bit_quant_type"}.intersection(changed(model))
    if useless and not model.load_in_4bit:
        raise SystemExit(f"error: {', '.join(f'--{name}' for name in sorted(useless))}: only with --load_in_4bit.")
    if model.torchao:
        return _torchao_config(model.torchao)
    if not (model.load_in_4bit or model.load_in_8bit):
        return None
    import torch
    from diffusers import BitsAndBytesConfig

    if model.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    dtype = getattr(torch, model.dtype or "float32") if model.dtype != "auto" else torch.bfloat16
    try:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    except PackageNotFoundError as error:
        raise SystemExit(
            "error: --load_in_4bit needs bitsandbytes: pip install 'tgol_trainer[quantization]'."
        ) from error


def _torchao_config(kind: str) -> Any:
    from diffusers import TorchAoConfig

    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
    except ImportError as error:
        raise SystemExit("error: --torchao needs torchao: pip install torchao.") from error
    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def lora_config(model: ModelArguments, training: TGOLConfig) -> Any:
    """Return PEFT's configuration of the adapter, `None` where none is made."""
    if training.full_finetuning or training.adapter_name_or_path:
        return None
    from peft import LoraConfig

    return LoraConfig(
        r=model.lora_r,
        lora_alpha=model.lora_alpha,
        lora_dropout=model.lora_dropout,
        target_modules=model.lora_target_modules,
        use_rslora=model.use_rslora,
        use_dora=model.use_dora,
        init_lora_weights="gaussian",
    )


def planned_setup(script: Any, training: TGOLConfig, model: ModelArguments) -> Setup:
    """Return what decides the memory of a command line, for [`planning.predict`]."""
    import torch

    from tgol_trainer.families import FROZEN_DTYPE
    from tgol_trainer.planning import Quantization, Setup
    from tgol_trainer.shapes import embedded_model

    if model.model_name_or_path is None:
        raise SystemExit("error: name a model: a Hub id, a folder, or `shapes` for the embedded model.")
    if training.adapter_name_or_path:
        raise SystemExit(
            "error: --adapter_name_or_path is not read here: leave it out and give that adapter's --lora_r."
        )
    options = model_init_kwargs(model, training) or {}
    if "meissonic_repository" in options:
        raise SystemExit("error: Meissonic cannot be planned for: its classes are not in diffusers.")
    quantization = None
    if model.load_in_4bit or model.load_in_8bit:
        compute = torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype or "float32")
        quantization = Quantization(4 if model.load_in_4bit else 8, model.use_bnb_nested_quant, compute)
    if model.torchao:
        quantization = Quantization(8, torchao=model.torchao)
    lora = lora_config(model, training)
    frozen = lora is not None and not embedded_model(model.model_name_or_path)
    sides = [int(side) for side in str(training.resolution or "").split("x") if side]
    return Setup(
        model=model.model_name_or_path,
        revision=options.get("revision"),
        dtype=options.get("dtype", FROZEN_DTYPE if frozen else "float32"),
        quantization=quantization,
        lora=lora,
        reference_pass=training.needs_reference and not training.precompute_ref_log_probs,
        reference_adapter=training.reference_update == "epoch",
        resolution=(sides[0], sides[-1]) if sides else None,
        num_frames=training.num_frames,
        expert=training.expert,
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        checkpointing=bool(training.gradient_checkpointing or training.activation_checkpointing),
        group_offload=training.group_offload,
        storage_dtype=training.storage_dtype,
        vae_tiling=training.vae_tiling,
        text_encoders_in_4bit=training.text_encoders_in_4bit,
        autocast=torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None,
        optimizer=str(getattr(training.optim, "value", training.optim)),
        cache=training.cache and not script.dataset_streaming,
        sampling_batch=training.per_device_eval_batch_size,
    )


def check_memory(script: Any, training: TGOLConfig, model: ModelArguments) -> None:
    """
    Refuse a run whose tensors alone are more than the card holds, where one card holds all of it.

    Where the plan needs more than the card and the user did not say whether to recompute activations, that is switched
    on in `training`.
    """
    from tgol_trainer.planning import KNOWN_OPTIMIZERS, found_card, predict, refusal

    card = None if training.use_cpu or not script.check_memory else found_card()
    elsewhere = training.adapter_name_or_path or "meissonic_repository" in training.pipeline_kwargs
    if card is None or elsewhere or training.world_size > 1 or training.fsdp or training.deepspeed:
        return
    logger.info("Predicting the memory of this run; --check_memory false leaves that out.")
    setup = planned_setup(script, training, model)
    if setup.optimizer not in KNOWN_OPTIMIZERS:
        setup = dataclasses.replace(setup, optimizer="sgd")  # which keeps nothing
    with plain_errors():
        prediction = predict(setup)
        if not training.checkpointing_given and prediction.needed > card.memory:
            kept, prediction = prediction, predict(dataclasses.replace(setup, checkpointing=True))
            training.activation_checkpointing = training.gradient_checkpointing = True
            needs = (f"{each.needed / 2**30:.1f} GiB" for each in (kept, prediction))
            logger.info(
                "Activations are recomputed in the backward pass: this run is planned to take %s of the %.1f GiB of "
                "%s without, and %s with that. --activation_checkpointing false keeps them.",
                *(next(needs), card.memory / 2**30, card.name, next(needs)),
            )
        reason = refusal(prediction, card.memory)
    if reason is not None:
        raise SystemExit(
            f"error: {reason}. `tgol plan` with the same flags says which fit. --check_memory false tries it anyway."
        )
