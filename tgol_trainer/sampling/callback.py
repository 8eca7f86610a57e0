"""Sample, score and log images of the same prompts and seeds during training."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tgol_trainer.config import TGOLConfig
from tgol_trainer.data import DataError
from tgol_trainer.data.prompts import apply_syntax
from tgol_trainer.data.rows import prompt_problem
from tgol_trainer.evaluation import compare_scores, frame_row, generate_images, generate_videos
from tgol_trainer.rewards import (
    Clip,
    MeanOverFrames,
    RewardFunction,
    load_reward,
    reward_name,
    reward_takes,
    score_images,
)
from tgol_trainer.run import Run, RunCallback
from tgol_trainer.saving.card import CardImage
from tgol_trainer.saving.divergence import TrainingDivergedError
from tgol_trainer.sources import load_prompts, prompt_set

from .drift import DriftAlarm, compare, measure
from .files import FOLDER, MAX_ROWS, STRIP_NAME, SampleColumn, SampleFiles
from .trackers import log_images

logger = logging.getLogger(__name__)

RewardFuncs: TypeAlias = str | RewardFunction | Sequence[str | RewardFunction]

SAMPLE_METRICS: dict[str, str] = {
    "samples/<reward>/mean": "mean score of the sampled images",
    "samples/<reward>/base": "mean score of the base model's images of equal prompts and seeds",
    "samples/<reward>/win_rate": "share of sampled images that score above the base model's; ties count one half",
}
"""What is logged for each reward at each sampling; evaluation adds the prefix `eval_`."""

_FRAMES_SCORED = 8
_TABLES = {".txt", ".csv", ".jsonl", ".json", ".parquet"}


@dataclasses.dataclass
class SampleSettings:
    """How sampled images are made. `None` takes what the model's own pipeline call takes."""

    guidance_scale: float | None = None
    num_inference_steps: int | None = None


class SampleCallback(RunCallback):
    """
    Sample the same prompts and seeds at chosen steps without disturbing what is trained.

    Every process samples and scores its share of the batches, then all meet once in `run.gather`, whatever they made;
    the first process writes and logs. Weights, gradients, random state, training flags, active adapters and scheduler
    are afterwards as they were. Hand it to [`TGOLTrainer`] in `callbacks`.

    Args:
        prompts (`list[str]` or `str`): Prompts; or one text file, table or named prompt set that holds them.
        reward_funcs (`str`, `Callable` or a list of them, *optional*):
            Names of rewards, `module:function` or functions `(images, prompts) -> scores`, which score the images.
            Rewards that are named are loaded on the trainer's device when the trainer is set up.
        steps (`int`, *optional*):
            Updates between two samplings; by default one at each evaluation. The start and the end are always sampled.
        seeds (`Sequence[int]`, *optional*, defaults to `(0,)`): Each prompt gets one image per seed.
        settings ([`SampleSettings`], *optional*): Guidance and denoising steps of the images.
        drift ([`DriftAlarm`], *optional*): When to warn, or to stop, because images drift from the base model's.

    Raises:
        ValueError: for settings out of range; when the trainer is set up, for an unknown reward, two of one name, one
            that scores another medium than the model makes, or a `metric_for_best_model` that will not be logged.
        DataError: for prompts that cannot be read.
    """

    def __init__(
        self,
        prompts: list[str] | str,
        reward_funcs: RewardFuncs | None = None,
        *,
        steps: int | None = None,
        seeds: Sequence[int] = (0,),
        settings: SampleSettings | None = None,
        drift: DriftAlarm | None = None,
    ) -> None:
        settings = settings or SampleSettings()
        self.alarm = drift or DriftAlarm()
        for name, value in (("steps", steps), ("num_inference_steps", settings.num_inference_steps)):
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"`seeds` must be one or more different numbers of at least 0, got {list(seeds)}.")
        self.rows = [(prompt, seed) for prompt in read_sample_prompts(prompts) for seed in seeds]
        self.reward_funcs, self.steps, self.settings = reward_funcs, steps, settings
        self.rewards: dict[str, RewardFunction] = {}
        self.columns: list[SampleColumn] = []
        self.base: SampleColumn | None = None
        self.latest: tuple[int, dict[str, float]] | None = None
        self.moved = False
        self._kept: tuple[int, Callable[[], None]] | None = None
        self._drifted: tuple[int, str] | None = None

    def prepare(self, args: TGOLConfig, num_frames: int | None) -> None:
        """Load the rewards, and check the settings against those of the run."""
        if self.alarm.action == "stop" and args.load_best_model_at_end:
            raise ValueError(
                "`load_best_model_at_end=True` and a `DriftAlarm` that stops both choose the weights at the end: "
                "leave one out."
            )
        self.medium = "image" if num_frames is None else "video"
        plain = [apply_syntax(prompt, args.prompt_syntax) for prompt, _ in self.rows]
        if not all(plain):
            raise DataError(f"`prompts` of sampling: {self.rows[plain.index('')][0]!r} has no plain text. Replace it.")
        self.rows = [(prompt, seed) for prompt, (_, seed) in zip(plain, self.rows, strict=True)]
        with _undisturbed():
            self.rewards = self._load_rewards(self.reward_funcs, args)
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        self.at_evaluation = self.steps is None or "samples/" in metric
        if metric.startswith("samples/"):
            self._check_metric(metric)

    def start(self, run: Run) -> None:
        """Begin with a run, and forget an earlier one."""
        self.run, args = run, run.args
        self.columns, self.base, self.latest = [], None, None
        self._kept = self._drifted = None
        if self.alarm.action == "stop" and run.sharded:
            raise ValueError(
                "A `DriftAlarm` that stops keeps a copy of the weights, which are sharded here: let it warn."
            )
        own = run.call_arguments
        height, width = run.size
        steps, guidance = self.settings.num_inference_steps, self.settings.guidance_scale
        self.sampling: dict[str, Any] = {
            "num_inference_steps": own.get("num_inference_steps") if steps is None else steps,
            "guidance_scale": own.get("guidance_scale") if guidance is None else guidance,
            "height": height,
            "width": width,
        }
        if self.medium == "video":
            self.sampling["num_frames"] = run.num_frames
        self.files = SampleFiles(
            args.output_dir,
            [prompt for prompt, _ in self.rows],
            {"seeds": [seed for _, seed in self.rows], "batch_size": args.per_device_eval_batch_size, **self.sampling},
        )
        self.moved = bool(args.adapter_name_or_path and args.reference == "base")

    def _load_rewards(self, reward_funcs: RewardFuncs | None, args: TGOLConfig) -> dict[str, RewardFunction]:
        given = [reward_funcs] if isinstance(reward_funcs, str) or callable(reward_funcs) else list(reward_funcs or ())
        rewards: dict[str, RewardFunction] = {}
        for item in given:
            reward = load_reward(item, device=args.device) if isinstance(item, str) else item
            name = reward_name(reward)
            if name in rewards:
                raise ValueError(
                    f"`reward_funcs`: two rewards are called {name!r}, which would be one key of the log."
                )
            takes = reward_takes(reward)
            if self.medium == "video" and takes == "images":
                reward = MeanOverFrames(reward, _FRAMES_SCORED)
            elif self.medium == "image" and takes == "videos":
                raise ValueError(f"`reward_funcs`: {name!r} scores videos, and this model makes images.")
            rewards[name] = reward
        return rewards

    def _check_metric(self, metric: str) -> None:
        known = [key.replace("<reward>", name) for name in self.rewards for key in SAMPLE_METRICS]
        if metric not in known:
            found = f"Logged are {', '.join(known)}." if known else "Give the callback `reward_funcs`."
            raise ValueError(f"`metric_for_best_model` is {metric!r}, which will not be logged. {found}")

    # ---- When ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over what an earlier part of the run left, sample the base if it is missing, and log step 0."""
        found = [self.files.read(state.global_step, list(self.rewards))] if self._is_first() else []
        self.columns, self.latest = self.run.gather(found)[0], None
        self.moved = self.moved or state.global_step > 0
        self.base = next((column for column in self.columns if column.step is None), None)
        self._keep_policy(state.global_step)
        with _undelayed(control):
            if self.base is None:
                self._sample_base()
            if state.global_step == 0:
                self._sample(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample every `steps` updates and after the last."""
        self.moved = True
        due = self.steps is not None and state.global_step % self.steps == 0
        if due or state.global_step >= state.max_steps:
            with _undelayed(control):
                self._sample(state.global_step)
        if self._drifted is not None:
            # A checkpoint of this step would be the first that a resumed run takes.
            control.should_training_stop, control.should_save = True, False

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the last weights before a drift back, where it stopped the run."""
        if self._drifted is None or self._kept is None:
            return
        (step, found), (kept, put_back) = self._drifted, self._kept
        if kept == 0:
            raise TrainingDivergedError(
                f"Training stopped at step {step}, the first that was sampled: its {self.medium}s had drifted from "
                f"the base model's ({found}). No weights before it were kept. Lower `learning_rate`, or sample more "
                "often."
            )
        put_back()
        said = f"Training stopped at step {step}, where {self.medium}s had drifted from the base model's ({found})."
        self.run.add_limit(f"{said} The weights are those of step {kept}.")
        logger.warning("%s The weights of step %d are put back.", said, kept)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample where training stops before its last step; later, in `on_train_end`, trackers are closed."""
        if control.should_training_stop:
            with _undelayed(control):
                self._sample(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Lay the strip beside the checkpoint's card, which shows it."""
        strip = self.files.folder / STRIP_NAME
        if args.should_save and strip.exists():
            target = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", FOLDER)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(strip, target / STRIP_NAME)

    def evaluate(self, state: TrainerState, control: TrainerControl, in_train: bool) -> dict[str, float]:
        """
        Return the scores for an evaluation at this moment, keys as in `SAMPLE_METRICS`.

        During training the images join the strip; else they are made, scored and dropped.
        """
        if not (self.rewards and self.at_evaluation):
            return {}
        if in_train:
            with _undelayed(control):
                return self._sample(state.global_step)
        if self.base is None:
            self._sample_base(keep=False)
        images, scores = self._make("Sampling")
        return self._compare(scores, measure(images))

    # ---- What ----

    def _sample(self, step: int) -> dict[str, float]:
        if self.latest is not None and self.latest[0] == step:
            return self.latest[1]
        if self.base is not None and not self.moved:
            scores, measures = self.base.scores, self.base.measures
        else:
            images, scores = self._make(f"Sampling (step {step})")
            measures = measure(images)
            self._keep(SampleColumn(step, scores, measures), images)
        metrics = self._compare(scores, measures)
        self.latest = (step, metrics)
        self._raise_alarm(step, metrics)
        if metrics:
            self.run.log(dict(metrics))
        return metrics

    def _sample_base(self, keep: bool = True) -> None:
        with self.run.base_model(self.moved) as there:
            if not there:
                logger.warning(
                    "The base model's %ss in %s are gone, and the reference has moved since: the strip goes on "
                    "without them and without win rates.",
                    *(self.medium, self.files.folder),
                )
                return
            images, scores = self._make("Sampling (base)")
        self.base = SampleColumn(None, scores, measure(images))
        if keep:
            self._keep(self.base, images, first=True)

    def _is_first(self) -> bool:
        return self.run.args.process_index == 0

    def _make(self, description: str) -> tuple[list[Image.Image], dict[str, list[float | None]]]:
        """Return the images of all rows and their scores, the same on every process."""
        args = self.run.args
        starts = range(0, len(self.rows), args.per_device_eval_batch_size)
        # A sharded network is called by all processes or by none, so there each makes everything.
        mine = starts if self.run.sharded else starts[args.process_index :: args.world_size]
        hidden = args.disable_tqdm or not self._is_first()
        parts = []
        with tqdm(total=len(mine), desc=description, unit="batch", leave=False, disable=hidden) as bar, _undisturbed():
            for start in mine:
                parts.append((start, *self._make_batch(self.rows[start : start + args.per_device_eval_batch_size])))
                bar.update()
        images: list[Image.Image] = []
        scores: dict[str, list[float | None]] = {name: [] for name in self.rewards}
        for _, made, found in sorted(
            {part[0]: part for part in self.run.gather(parts)}.values(), key=lambda part: part[0]
        ):
            images += made
            for name, values in found.items():
                scores[name] += values
        return images, scores

    def _make_batch(self, rows: list[tuple[str, int]]) -> tuple[list[Image.Image], dict[str, list[float | None]]]:
        prompts, seeds = [prompt for prompt, _ in rows], [seed for _, seed in rows]
        options = {"batch_size": len(rows), "progress": False, **self.sampling}
        if self.medium == "video":
            with self.run.pipeline() as pipeline:
                clips = [Clip(frames) for frames in generate_videos(pipeline, prompts, seeds, **options)]
            return [frame_row(clip) for clip in clips], self._score(clips, prompts)
        with self.run.pipeline() as pipeline:
            images = generate_images(pipeline, prompts, seeds, **options)
        return images, self._score(images, prompts)

    def _score(self, made: Sequence[Any], prompts: list[str]) -> dict[str, list[float | None]]:
        return {name: score_images(reward, made, prompts) for name, reward in self.rewards.items()}

    def _raise_alarm(self, step: int, metrics: dict[str, float]) -> None:
        found = ", ".join(self.alarm.findings({key: value for key, value in metrics.items() if key[:6] == "drift/"}))
        if not found:
            self._keep_policy(step)
        elif self.alarm.action == "stop":
            self._drifted = (step, found)
        elif self.alarm.action == "warn":
            logger.warning(
                "Step %d: %ss have drifted from the base model's (%s). Look at %s; a lower `learning_rate` or an "
                "earlier checkpoint may be better.",
                *(step, self.medium, found, self.files.folder / STRIP_NAME),
            )

    def _keep_policy(self, step: int) -> None:
        if self.alarm.action == "stop" and self._drifted is None:
            self._kept = (step, self.run.keep_policy())

    def _compare(self, scores: dict[str, list[float | None]], measures: dict[str, float]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.base is not None:
            metrics = compare(self.base.measures, measures, self.base.scores, scores)
        prompts = [prompt for prompt, _ in self.rows]
        for name, values in scores.items():
            base = self.base.scores[name] if self.base is not None else values
            if all(old is None or new is None for old, new in zip(base, values, strict=True)):
                logger.warning("The reward %r scored no pair of %ss, so nothing of it is logged.", name, self.medium)
                continue
            found = compare_scores(name, base, values, prompts, trained=False, num_resamples=1)
            metrics[f"samples/{name}/mean"] = found.mean_after
            if self.base is not None:
                metrics[f"samples/{name}/base"] = found.mean_before
                metrics[f"samples/{name}/win_rate"] = found.win_rate
        return metrics

    # ---- Where ----

    def _keep(self, column: SampleColumn, images: list[Image.Image], first: bool = False) -> None:
        self.columns.insert(0 if first else len(self.columns), column)
        if not self._is_first():
            return
        self.files.write(self.columns, column, images)
        made = f"{self.medium.capitalize()}s"
        alt = f"{made} of equal prompts and seeds by step of training, with their scores; means at the top"
        self.run.add_card_image(CardImage(f"{FOLDER}/{STRIP_NAME}", alt=alt))
        shown = range(min(len(self.rows), MAX_ROWS))
        log_images(
            self.run.callbacks(),
            [f"{row:02d}_{self.rows[row][0][:40]}" for row in shown],
            [self._caption(row, column) for row in shown],
            images[: len(shown)],
            column.step or 0,
        )

    def _caption(self, row: int, column: SampleColumn) -> str:
        prompt, seed = self.rows[row]
        parts = [f"{prompt} (seed {seed})"]
        for name, values in column.scores.items():
            before = (
                "" if column is self.base or self.base is None else f" (base {_shown(self.base.scores[name][row])})"
            )
            parts.append(f"{name} {_shown(values[row])}{before}")
        return ", ".join(parts)


def read_sample_prompts(given: list[str] | str) -> list[str]:
    """
    Return the prompts to sample.

    Args:
        given (`list[str]` or `str`): Prompts; or one text file, table or named set that holds them.

    Returns:
        `list[str]`

    Raises:
        DataError: for a file or set that cannot be read, or a blank prompt.
    """
    prompts = [given] if isinstance(given, str) else list(given)
    if not prompts:
        raise DataError("`prompts` of sampling is empty: give at least one prompt.")
    if len(prompts) == 1:
        path = Path(prompts[0])
        if prompt_set(prompts[0]) or path.suffix.lower() in _TABLES or path.is_file():
            return load_prompts(prompts[0]).texts
    bad = [f"row {row}: {cause}" for row, prompt in enumerate(prompts) if (cause := prompt_problem(prompt))]
    if bad:
        raise DataError(f"`prompts` of sampling: {len(bad)} of {len(prompts)} cannot be used ({', '.join(bad[:5])}).")
    return prompts


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


@contextlib.contextmanager
def _undelayed(control: TrainerControl) -> Iterator[None]:
    """Keep a log line that is due: writing one of ours would tell Trainer that it was written."""
    due = control.should_log
    try:
        yield
    finally:
        control.should_log = due


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Leave the global random states of Python, NumPy and torch as they are, and compute no gradient."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
