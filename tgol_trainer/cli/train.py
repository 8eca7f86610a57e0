"""`tgol train` and `scripts/train_tgol.py`: parse, build, train, save, push."""

from __future__ import annotations

import dataclasses
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import ModelConfig, ScriptArguments, TrlParser

from tgol_trainer.config import TGOLConfig

from .console import PUSH_FAILED, plain_errors, read_settings, set_up_logging

if TYPE_CHECKING:
    from tgol_trainer.planning import Setup

logger = logging.getLogger(__name__)


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments with proxy set, rewards and rounds. `dataset_name` is a Hub id, a folder or a file."""

    proxy_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder or file whose scores set the threshold, instead of the training scores."},
    )
    folder_scores: bool = field(
        default=False,
        metadata={
            "help": "Take the scores of a folder without a table from names of folders: numbers, or words such "
            "as good and bad."
        },
    )
    reward_funcs: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards that score the images of --sample_prompts or of --rounds: names, or module:function."
        },
    )
    rounds: int | None = field(
        default=None,
        metadata={
            "help": "Train in this many rounds instead of on --dataset_name. Each round generates images of --prompts "
            "with the policy, scores them with --reward_funcs, and trains with that policy as the reference."
        },
    )
    prompts: str | None = field(
        default=None,
        metadata={"help": "Prompts of --rounds: a text file, a table, a dataset or a named set of prompts."},
    )
    images_per_prompt: int = field(default=8, metadata={"help": "Images of each prompt in each of the --rounds."})
    check_memory: bool = field(
        default=True,
        metadata={
            "help": "On one GPU, refuse what cannot fit before any weights are loaded, as `tgol plan` predicts it."
        },
    )


@dataclass
class SampleArguments:
    """Images of the same prompts and seeds during training, see [`sampling.SampleCallback`]."""

    sample_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Prompts whose images are generated at the start, during and at the end of training: texts, or "
            "one text file, table or named set of prompts. --reward_funcs score the images."
        },
    )
    sample_steps: int | None = field(
        default=None, metadata={"help": "Updates between two samplings of --sample_prompts. None: at each evaluation."}
    )
    sample_seeds: list[int] = field(
        default_factory=lambda: [0], metadata={"help": "Seeds. Each prompt gets one image per seed."}
    )
    sample_guidance_scale: float | None = field(
        default=None,
        metadata={"help": "Guidance scale of --sample_prompts and --rounds. None: the pipeline's own default."},
    )
    sample_num_inference_steps: int | None = field(
        default=None,
        metadata={"help": "Denoising steps of --sample_prompts and --rounds. None: the pipeline's own default."},
    )


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

    lora_alpha: int = field(default=16, metadata={"help": "LoRA alpha; the update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.0, metadata={"help": "LoRA dropout; above 0 the policy's pass is noisy and the reference's is not."}
    )


# TRL's fields that mean nothing here. A value other than the default is refused, not dropped in silence.
_UNUSED: tuple[str, ...] = (
    "attn_implementation",
    "trust_remote_code",
    "lora_target_parameters",
    "lora_modules_to_save",
    "lora_task_type",
    "ignore_bias_buffers",
    "bnb_4bit_quant_storage",
)


_RESUME: dict[str | None, bool] = {"true": True, "True": True, "last": True, "false": False, "False": False}


def _changed(arguments: Any) -> list[str]:
    return [item.name for item in dataclasses.fields(arguments) if getattr(arguments, item.name) != item.default]


def _sample_callback(sample: SampleArguments, script: TrainArguments) -> Any:
    from tgol_trainer.sampling import SampleCallback, SampleSettings

    return SampleCallback(
        sample.sample_prompts or [],
        script.reward_funcs,
        steps=sample.sample_steps,
        seeds=sample.sample_seeds,
        settings=SampleSettings(sample.sample_guidance_scale, sample.sample_num_inference_steps),
    )


def _check_arguments(
    script: TrainArguments, training: TGOLConfig, model: ModelArguments, sample: SampleArguments
) -> None:
    if sample.sample_prompts is None and script.rounds is None:
        for name in ("sample_guidance_scale", "sample_num_inference_steps"):
            if getattr(sample, name) is not None:
                raise SystemExit(f"error: --{name}: has no effect without --sample_prompts or --rounds.")
        if script.reward_funcs:
            raise SystemExit("error: --reward_funcs: has no effect without --sample_prompts or --rounds.")
    if sample.sample_prompts is None:
        if sample.sample_steps is not None or sample.sample_seeds != [0]:
            name = "sample_seeds" if sample.sample_steps is None else "sample_steps"
            raise SystemExit(f"error: --{name}: has no effect without --sample_prompts.")
        if "samples/" in (training.metric_for_best_model or ""):
            raise SystemExit(
                f"error: --metric_for_best_model: {training.metric_for_best_model} is only logged with "
                "--sample_prompts and --reward_funcs."
            )
    changed = _changed(model)
    unused = [name for name in [*changed, *_changed(script)] if name in _UNUSED]
    if unused:
        raise SystemExit(f"error: {', '.join(f'--{name}' for name in unused)}: not supported for diffusion pipelines.")
    lora = [name for name in changed if name.startswith(("lora_", "use_rslora", "use_dora"))]
    if lora and (training.full_finetuning or training.adapter_name_or_path):
        reason = "full_finetuning" if training.full_finetuning else "adapter_name_or_path"
        raise SystemExit(f"error: {', '.join(f'--{name}' for name in lora)}: has no effect with --{reason}.")
    if model.lora_r < 1:
        raise SystemExit(f"error: --lora_r: must be at least 1, got {model.lora_r}.")
    if not 0 <= model.lora_dropout < 1:
        raise SystemExit(f"error: --lora_dropout: must be at least 0 and below 1, got {model.lora_dropout}.")
    if training.hub_token is not None:
        raise SystemExit(
            "error: --hub_token: a token in a command line or a settings file is soon in a log or a repository. Set "
            "HF_TOKEN, or run `hf auth login` once."
        )
    if model.model_name_or_path is None:
        raise SystemExit(
            "error: --model_name_or_path is needed: a Hub id, a folder, or `shapes` for the embedded model."
        )
    if training.eval_strategy != "no" and Path(script.dataset_name or "").is_file():
        raise SystemExit(
            f"error: --eval_strategy: {script.dataset_name} is one file, all of it for training. Use a folder "
            "with a train and a test file, or a dataset with both splits."
        )
    if script.rounds is not None:
        given = [name for name in ("dataset_name", "proxy_dataset_name") if getattr(script, name) is not None]
        if given:
            raise SystemExit(f"error: --{given[0]}: rounds make their own data. Leave it out, or leave out --rounds.")
        if script.prompts is None or not script.reward_funcs:
            raise SystemExit("error: --rounds needs --prompts and --reward_funcs.")
    elif script.dataset_name is None:
        raise SystemExit("error: --dataset_name is needed: a Hub id, a folder, or a CSV, JSONL or Parquet file.")
    fixed = [name for name in changed if name in ("model_revision", "dtype")]
    fixed += ["model_init_kwargs"] if training.pipeline_kwargs else []
    from tgol_trainer.shapes import embedded_model

    if fixed and embedded_model(model.model_name_or_path):
        raise SystemExit(f"error: {', '.join(f'--{name}' for name in fixed)}: has no effect on the embedded model.")


def _model_init_kwargs(model: ModelArguments, training: TGOLConfig) -> dict[str, Any] | None:
    options = training.pipeline_kwargs
    if model.model_revision != "main":
        options.setdefault("revision", model.model_revision)
    if model.dtype not in (None, "float32"):
        options.setdefault("dtype", model.dtype)
    return options or None


def _quantization_config(model: ModelArguments) -> Any:
    useless = {"use_bnb_nested_quant", "bnb_4bit_quant_type"}.intersection(_changed(model))
    if useless and not model.load_in_4bit:
        raise SystemExit(f"error: {', '.join(f'--{name}' for name in sorted(useless))}: only with --load_in_4bit.")
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


def _lora_config(model: ModelArguments, training: TGOLConfig) -> Any:
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


def planned_setup(script: TrainArguments, training: TGOLConfig, model: ModelArguments) -> Setup:
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
    options = _model_init_kwargs(model, training) or {}
    if "meissonic_repository" in options:
        raise SystemExit("error: Meissonic cannot be planned for: its classes are not in diffusers.")
    quantization = None
    if model.load_in_4bit or model.load_in_8bit:
        compute = torch.bfloat16 if model.dtype == "auto" else getattr(torch, model.dtype or "float32")
        quantization = Quantization(4 if model.load_in_4bit else 8, model.use_bnb_nested_quant, compute)
    lora = _lora_config(model, training)
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
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        checkpointing=bool(training.gradient_checkpointing or training.activation_checkpointing),
        autocast=torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None,
        optimizer=str(getattr(training.optim, "value", training.optim)),
        cache=training.cache and not script.dataset_streaming,
        sampling_batch=training.per_device_eval_batch_size,
    )


def _check_memory(script: TrainArguments, training: TGOLConfig, model: ModelArguments) -> None:
    """Refuse a run whose tensors alone are more than the card holds, where one card holds all of it."""
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
        reason = refusal(predict(setup), card.memory)
    if reason is not None:
        raise SystemExit(
            f"error: {reason}. `tgol plan` with the same flags says which fit. --check_memory false tries it anyway."
        )


def _train_rounds(script: TrainArguments, training: TGOLConfig, model: ModelArguments, sample: SampleArguments) -> int:
    from functools import partial

    from tgol_trainer.jobs import load_adapted_pipeline, process_device
    from tgol_trainer.rewards import load_reward
    from tgol_trainer.rounds import train_rounds
    from tgol_trainer.saving.stopping import StopOnSignal
    from tgol_trainer.sources import load_prompts

    name, device = model.model_name_or_path or "", process_device(training.use_cpu)
    sampling = {
        "images_per_prompt": script.images_per_prompt,
        "num_inference_steps": sample.sample_num_inference_steps,
        "guidance_scale": sample.sample_guidance_scale,
    }
    with plain_errors():
        train_rounds(
            name,
            training,
            load_prompts(script.prompts or "").texts,
            {spec.rpartition(":")[2]: partial(load_reward, spec, device=device) for spec in script.reward_funcs or ()},
            partial(
                load_adapted_pipeline,
                name,
                use_cpu=training.use_cpu,
                model_init_kwargs=training.pipeline_kwargs,
                num_frames=training.num_frames,
            ),
            num_rounds=script.rounds or 1,
            sampling={key: value for key, value in sampling.items() if value is not None},
            trainer_options={
                "peft_config": _lora_config(model, training),
                "quantization_config": _quantization_config(model),
                "callbacks": [*([_sample_callback(sample, script)] if sample.sample_prompts else []), StopOnSignal()],
            },
        )
    print(f"Saved to {training.output_dir}. README.md there shows how to load it; rounds.json has each round.")
    if not training.push_to_hub:
        return 0
    from .push import main as push

    flags = {
        "--hub_model_id": training.hub_model_id,
        "--revision": training.hub_revision,
        "--gated": training.hub_gated,
    }
    given = [part for flag, value in flags.items() if value is not None for part in (flag, value)]
    private = ["--private"] if training.hub_private_repo else []
    return PUSH_FAILED if push([training.output_dir, *given, *private]) else 0


def _train(script: TrainArguments, training: TGOLConfig, model: ModelArguments, sample: SampleArguments) -> int:
    from tgol_trainer.data import Columns
    from tgol_trainer.saving.resuming import starting_point
    from tgol_trainer.saving.stopping import StopOnSignal
    from tgol_trainer.sources import load_scored_dataset
    from tgol_trainer.trainer import TGOLTrainer

    def load(source: str, split: str) -> Any:
        columns = Columns(training.prompt_column, training.image_column, training.score_column)
        return load_scored_dataset(
            source,
            name=script.dataset_config,
            split=split,
            streaming=script.dataset_streaming,
            columns=columns,
            folder_scores=script.folder_scores,
        )

    with plain_errors():
        resume = _RESUME.get(training.resume_from_checkpoint, training.resume_from_checkpoint)
        if not resume:
            starting_point(training.output_dir, None)  # refuses a used folder before models and data are loaded
        trainer = TGOLTrainer(
            model=model.model_name_or_path,
            args=training,
            train_dataset=load(script.dataset_name, script.dataset_train_split),
            eval_dataset=(
                load(script.dataset_name, script.dataset_test_split) if training.eval_strategy != "no" else None
            ),
            proxy_dataset=load(script.proxy_dataset_name, "train") if script.proxy_dataset_name else None,
            peft_config=_lora_config(model, training),
            quantization_config=_quantization_config(model),
            callbacks=[*([_sample_callback(sample, script)] if sample.sample_prompts else []), StopOnSignal()],
        )
        trainer.train(resume_from_checkpoint=resume)
        if not trainer.already_saved:
            trainer.save_state()
        if training.push_to_hub:
            pushed = _push(trainer)
        else:
            pushed = True
            if not trainer.already_saved:
                trainer.save_model()
    if trainer.is_world_process_zero():
        said = "The finished run was there before:" if trainer.already_saved else "Saved to"
        print(f"{said} {training.output_dir}. README.md there shows how to load it.")
    return 0 if pushed else PUSH_FAILED


def _resume_line(arguments: list[str], rounds: bool) -> str:
    """Return the command that goes on."""
    flag = "--resume_from_checkpoint"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"Go on with the same command and {flag} true."
    kept = [word for word in arguments if not word.startswith(f"{flag}=")]
    while flag in kept:
        at = kept.index(flag)
        kept[at : at + 2] = []
    return shlex.join(["tgol", "train", *kept, *([] if rounds else [flag, "true"])])


def main(argv: Sequence[str] | None = None) -> int:
    """
    Train from a command line.

    Args:
        argv (`Sequence[str]`, *optional*): Flags, `--config file.yaml` among them; by default those of the process.

    Returns:
        `int`: 0; 3 where all is trained and saved and a push failed; 128 and the number of a signal that stopped it.
    """
    set_up_logging()
    arguments = list(sys.argv[1:] if argv is None else argv)
    for place in (place for place, word in enumerate(arguments[:-1]) if word == "--config"):
        read_settings(Path(arguments[place + 1]))  # the parser's own errors are tracebacks
    parser = TrlParser((TrainArguments, TGOLConfig, ModelArguments, SampleArguments), prog="tgol train")
    try:
        script, training, model, sample = parser.parse_args_and_config(list(arguments))
    except (ValueError, FileNotFoundError) as error:  # a flag that nobody knows, or a value that TGOLConfig refuses
        raise SystemExit(f"error: {error}") from error
    _check_arguments(script, training, model, sample)
    training.model_init_kwargs = _model_init_kwargs(model, training)
    _check_memory(script, training, model)
    from tgol_trainer.saving.checkpoints import last_good
    from tgol_trainer.saving.stopping import TrainingStopped

    try:
        return (_train_rounds if script.rounds is not None else _train)(script, training, model, sample)
    except TrainingStopped as stopped:
        number, said = stopped.signal, f"Stopped. {stopped.checkpoint} is saved. Go on with:"
    except KeyboardInterrupt:
        number, said = signal.SIGINT, f"Ended at once. {last_good(training.output_dir)} Go on with:"
    if os.environ.get("RANK", "0") == "0":
        print(f"{said}\n{_resume_line(arguments, script.rounds is not None)}", file=sys.stderr)
    return 128 + number


def _push(trainer: Any) -> bool:
    """Save and push; return whether this push and all before it arrived."""
    from tgol_trainer.saving.hub import PushError

    try:
        commit = trainer.push_to_hub()  # saves first
    except PushError as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    if commit is None:
        return True
    print(f"Pushed and compared: {commit.commit_url}")
    if trainer.pushes.failed:
        names = ", ".join(trainer.pushes.failed)
        print(f"error: pushes during training failed: {names} (see above); the last one succeeded.", file=sys.stderr)
    return not trainer.pushes.failed
