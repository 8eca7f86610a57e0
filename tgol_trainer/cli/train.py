"""`tgol train` and `scripts/train_tgol.py`: parse, build, train, save, push."""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from trl import ScriptArguments, TrlParser

from tgol_trainer.config import TGOLConfig

from .console import PUSH_FAILED, plain_errors, program, set_up_logging
from .model import (
    UNUSED,
    ModelArguments,
    changed,
    check_memory,
    lora_config,
    model_init_kwargs,
    quantization_config,
)
from .recipes import RECIPE_HELP, parse_flags

logger = logging.getLogger(__name__)


@dataclass
class TrainArguments(ScriptArguments):
    """TRL's script arguments with proxy set, rewards and rounds. `dataset_name` is a Hub id, a folder or a file."""

    recipe: str = field(default="paper", metadata={"help": RECIPE_HELP})
    proxy_dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub id, folder or file whose scores set the threshold, instead of the training scores."},
    )
    folder_scores: bool = field(
        default=False,
        metadata={
            "help": "Take the scores of a folder whose table has none from names of folders: numbers, or words such "
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
    mean_over_frames: int | None = field(
        default=None,
        metadata={"help": "Score videos of --rounds with rewards of images: the mean over this number of frames."},
    )
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
    on_drift: Literal["warn", "stop", "ignore"] = field(
        default="warn",
        metadata={
            "help": "Images of --sample_prompts that drift from the base model's: 'warn', 'stop' and keep the weights "
            "of the last sampling before, or 'ignore'."
        },
    )


_FEW_UPDATES = 50
_RESUME: dict[str | None, bool] = {"true": True, "True": True, "last": True, "false": False, "False": False}


def _sample_callback(sample: SampleArguments, script: TrainArguments) -> Any:
    from tgol_trainer.sampling import DriftAlarm, SampleCallback, SampleSettings

    return SampleCallback(
        sample.sample_prompts or [],
        script.reward_funcs,
        steps=sample.sample_steps,
        seeds=sample.sample_seeds,
        settings=SampleSettings(sample.sample_guidance_scale, sample.sample_num_inference_steps),
        drift=DriftAlarm(sample.on_drift),
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
        if sample.on_drift != "warn":
            raise SystemExit("error: --on_drift: has no effect without --sample_prompts.")
        if "samples/" in (training.metric_for_best_model or ""):
            raise SystemExit(
                f"error: --metric_for_best_model: {training.metric_for_best_model} is only logged with "
                "--sample_prompts and --reward_funcs."
            )
    given = changed(model)
    unused = [name for name in [*given, *changed(script)] if name in UNUSED]
    if unused:
        raise SystemExit(f"error: {', '.join(f'--{name}' for name in unused)}: not supported for diffusion pipelines.")
    lora = [name for name in given if name.startswith(("lora_", "use_rslora", "use_dora"))]
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
        data = [name for name in ("dataset_name", "proxy_dataset_name") if getattr(script, name) is not None]
        if data:
            raise SystemExit(f"error: --{data[0]}: rounds make their own data. Leave it out, or leave out --rounds.")
        if script.prompts is None or not script.reward_funcs:
            raise SystemExit("error: --rounds needs --prompts and --reward_funcs.")
    elif script.mean_over_frames is not None:
        raise SystemExit("error: --mean_over_frames: has no effect without --rounds; `tgol score` takes it too.")
    elif script.dataset_name is None:
        raise SystemExit("error: --dataset_name is needed: a Hub id, a folder, or a CSV, JSONL or Parquet file.")
    fixed = [name for name in given if name in ("model_revision", "dtype")]
    fixed += ["model_init_kwargs"] if training.pipeline_kwargs else []
    from tgol_trainer.shapes import embedded_model

    if fixed and embedded_model(model.model_name_or_path):
        raise SystemExit(f"error: {', '.join(f'--{name}' for name in fixed)}: has no effect on the embedded model.")


def _train_rounds(script: TrainArguments, training: TGOLConfig, model: ModelArguments, sample: SampleArguments) -> int:
    from functools import partial

    from tgol_trainer.jobs import load_adapted_pipeline, process_device
    from tgol_trainer.rewards import RewardLoader
    from tgol_trainer.rounds import train_rounds
    from tgol_trainer.saving.stopping import StopOnSignal
    from tgol_trainer.sources import load_prompts

    name, device = model.model_name_or_path or "", process_device(training.use_cpu)
    sampling = {
        "images_per_prompt": script.images_per_prompt,
        "mean_over_frames": script.mean_over_frames,
        "num_inference_steps": sample.sample_num_inference_steps,
        "guidance_scale": sample.sample_guidance_scale,
    }
    with plain_errors():
        train_rounds(
            name,
            training,
            load_prompts(script.prompts or "", prompt_syntax=training.prompt_syntax).texts,
            {spec.rpartition(":")[2]: RewardLoader(spec, device=device) for spec in script.reward_funcs or ()},
            partial(
                load_adapted_pipeline,
                name,
                use_cpu=training.use_cpu,
                model_init_kwargs=training.pipeline_kwargs,
                num_frames=training.num_frames,
                sizes={"resolution": training.resolution},
            ),
            num_rounds=script.rounds or 1,
            sampling={key: value for key, value in sampling.items() if value is not None},
            trainer_options={
                "peft_config": lora_config(model, training),
                "quantization_config": quantization_config(model),
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
            peft_config=lora_config(model, training),
            quantization_config=quantization_config(model),
            callbacks=[*([_sample_callback(sample, script)] if sample.sample_prompts else []), StopOnSignal()],
        )
        if not script.dataset_streaming and trainer.is_world_process_zero():
            _tell_of_few_updates(len(trainer.train_dataset), trainer.columns.medium, training)
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


def _tell_of_few_updates(num_rows: int, medium: str, training: TGOLConfig) -> None:
    """Warn of a run whose length nobody chose and whose result nobody will see."""
    images = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    updates = int(num_rows // images * training.num_train_epochs)
    if training.max_steps <= 0 and 0 < updates < _FEW_UPDATES:
        logger.warning(
            "%d updates of %d %ss, in which an adapter hardly moves. `--max_steps 200` makes 200 of them, in "
            "several passes over the %d rows.",
            *(updates, images, medium, num_rows),
        )


def _resume_lines(arguments: list[str], rounds: bool) -> str:
    """Return the command that goes on, on a line of its own; of several processes, how it differs from this one."""
    flag = "--resume_from_checkpoint"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the launcher's own words are not known here
        return "Go on with the same command" + ("." if rounds else f" and {flag} true.")
    kept = [word for word in arguments if not word.startswith(f"{flag}=")]
    while flag in kept:
        at = kept.index(flag)
        kept[at : at + 2] = []
    return "Go on with:\n" + shlex.join([program(), "train", *kept, *([] if rounds else [flag, "true"])])


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
    parser = TrlParser((TrainArguments, TGOLConfig, ModelArguments, SampleArguments), prog="tgol train")
    script, training, model, sample = parse_flags(parser, arguments)
    _check_arguments(script, training, model, sample)
    training.model_init_kwargs = model_init_kwargs(model, training)
    check_memory(script, training, model)
    from tgol_trainer.saving.checkpoints import last_good
    from tgol_trainer.saving.stopping import TrainingStopped

    try:
        return (_train_rounds if script.rounds is not None else _train)(script, training, model, sample)
    except TrainingStopped as stopped:
        number, said = stopped.signal, f"Stopped. {stopped.checkpoint} is saved."
    except KeyboardInterrupt:
        number, said = signal.SIGINT, f"Ended at once. {last_good(training.output_dir)}"
    if os.environ.get("RANK", "0") == "0":
        print(f"{said} {_resume_lines(arguments, script.rounds is not None)}", file=sys.stderr)
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
