"""Images of the same prompts and seeds during training: drawn, scored, logged, and kept as a strip."""

from __future__ import annotations

import contextlib
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
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from tgol_trainer import adapters
from tgol_trainer.config import TGOLConfig
from tgol_trainer.data import DataError
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
from tgol_trainer.saving.card import CardImage
from tgol_trainer.sources import load_prompts, prompt_set

from .files import FOLDER, MAX_ROWS, STRIP_NAME, SampleColumn, SampleFiles
from .trackers import log_images

logger = logging.getLogger(__name__)

RewardFuncs: TypeAlias = str | RewardFunction | Sequence[str | RewardFunction]

SAMPLE_METRICS: dict[str, str] = {
    "samples/<reward>/mean": "mean score of the images of `sample_prompts`",
    "samples/<reward>/base": "the same of the base model's images of equal prompts and seeds",
    "samples/<reward>/win_rate": "share of images that score higher than the base model's; ties count one half",
}
"""What is logged for each of `reward_funcs` where images are drawn; evaluation adds the prefix `eval_`."""

_FRAMES_SCORED = 8
_TABLES = {".txt", ".csv", ".jsonl", ".json", ".parquet"}


class SampleCallback(TrainerCallback):
    """
    Draw `sample_prompts` at chosen steps without disturbing what is trained.

    Every process draws and scores its share of the batches, then all meet once in `gather`, whatever they drew; the
    first process writes and logs. Weights, gradients, random state, training flags, active adapters and scheduler are
    afterwards as they were.

    Args:
        trainer ([`TGOLTrainer`]):
            Its `args` hold the prompts and settings; without prompts nothing is ever done.
        reward_funcs (`str`, `Callable` or a list of them, *optional*):
            As for [`TGOLTrainer`]. Models are loaded at once, on the trainer's device.
        gather (`Callable[[list], list]`):
            Joins the lists of all processes, such as `accelerate.utils.gather_object`.

    Raises:
        ValueError: for an unknown reward, two of one name, one that scores another medium than the model makes, or a
            `metric_for_best_model` that is none of the keys logged.
        DataError: for prompts that cannot be read.
    """

    def __init__(
        self, trainer: Trainer | Any, reward_funcs: RewardFuncs | None, gather: Callable[[list[Any]], list[Any]]
    ) -> None:
        args: TGOLConfig = trainer.args
        self.trainer = trainer
        self.gather = gather
        self.makes_videos = trainer.family.num_frames is not None
        prompts = read_sample_prompts(args.sample_prompts)
        self.rows = [(prompt, seed) for prompt in prompts for seed in args.sample_seeds]
        if reward_funcs and not self.rows:
            logger.warning("`reward_funcs` score the images of `sample_prompts`, of which there are none.")
        with _undisturbed():
            self.rewards = self._load_rewards(reward_funcs, args) if self.rows else {}
        height, width = trainer.collator.resolution
        own = trainer.family.origin.call_arguments
        steps, guidance = args.sample_num_inference_steps, args.sample_guidance_scale
        self.sampling: dict[str, Any] = {
            "num_inference_steps": own.get("num_inference_steps") if steps is None else steps,
            "guidance_scale": own.get("guidance_scale") if guidance is None else guidance,
            "height": height,
            "width": width,
        }
        if self.makes_videos:
            self.sampling["num_frames"] = trainer.family.num_frames
        self.files = SampleFiles(
            args.output_dir,
            [prompt for prompt, _ in self.rows],
            {"seeds": [seed for _, seed in self.rows], "batch_size": args.per_device_eval_batch_size, **self.sampling},
        )
        self.columns: list[SampleColumn] = []
        self.base: SampleColumn | None = None
        self.latest: tuple[int, dict[str, float]] | None = None
        self.moved = bool(args.adapter_name_or_path and args.reference == "base")
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        self.at_evaluation = args.sample_steps is None or "samples/" in metric
        if metric.startswith("samples/"):
            self._check_metric(metric)

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
            if self.makes_videos and reward_takes(reward) == "images":
                reward = MeanOverFrames(reward, _FRAMES_SCORED)
            elif not self.makes_videos and reward_takes(reward) == "videos":
                raise ValueError(f"`reward_funcs`: {name!r} scores videos, and this model makes images.")
            rewards[name] = reward
        return rewards

    def _check_metric(self, metric: str) -> None:
        known = [key.replace("<reward>", name) for name in self.rewards for key in SAMPLE_METRICS]
        if metric not in known:
            found = f"Known are {', '.join(known)}." if known else "Give `sample_prompts` and `reward_funcs`."
            raise ValueError(f"`metric_for_best_model` is {metric!r}, which will not be logged. {found}")

    # ---- When ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take over what an earlier part of the run left, draw the base if it is missing, and log step 0."""
        if not self.rows:
            return
        if self.trainer.is_world_process_zero():
            found = [self.files.read(state.global_step, list(self.rewards))]
        else:
            found = []
        self.columns, self.latest = self.gather(found)[0], None
        self.moved = self.moved or state.global_step > 0
        self.base = next((column for column in self.columns if column.step is None), None)
        with _kept(control):
            if self.base is None:
                self._draw_base()
            if state.global_step == 0:
                self._sample(0)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample every `sample_steps` updates and after the last."""
        self.moved, every = True, self.trainer.args.sample_steps
        due = every is not None and state.global_step % every == 0
        if self.rows and (due or state.global_step >= state.max_steps):
            with _kept(control):
                self._sample(state.global_step)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sample where training stops before its last step; later, in `on_train_end`, trackers are closed."""
        if self.rows and control.should_training_stop:
            with _kept(control):
                self._sample(state.global_step)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Lay the strip beside the checkpoint's card, which shows it."""
        strip = self.files.folder / STRIP_NAME
        if self.rows and args.should_save and strip.exists():
            target = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", FOLDER)
            target.mkdir(parents=True, exist_ok=True)
            shutil.copy(strip, target / STRIP_NAME)

    def evaluate(self) -> dict[str, float]:
        """
        Return the scores for an evaluation at this moment, keys as in `SAMPLE_METRICS`; empty where none are wanted.

        During training the images join the strip; else they are drawn, scored and dropped.
        """
        if not (self.rows and self.rewards and self.at_evaluation):
            return {}
        if self.trainer.is_in_train:
            with _kept(self.trainer.control):
                return self._sample(self.trainer.state.global_step)
        if self.base is None:
            self._draw_base(keep=False)
        return self._compare(self._draw("Sampling")[1])

    # ---- What ----

    def _sample(self, step: int) -> dict[str, float]:
        if self.latest is not None and self.latest[0] == step:
            return self.latest[1]
        trainer = self.trainer
        if self.base is not None and not self.moved:
            scores = self.base.scores
        else:
            images, scores = self._draw(f"Sampling (step {step})")
            self._keep(SampleColumn(step, scores), images)
        metrics = self._compare(scores)
        self.latest = (step, metrics)
        if metrics:
            trainer.log(dict(metrics))
        return metrics

    def _draw_base(self, keep: bool = True) -> None:
        trainer = self.trainer
        if trainer.reference_model is not None and trainer._reference_epoch:
            logger.warning(
                "The base model's images in %s are gone, and the reference has moved since: the strip goes on "
                "without them and without win rates.",
                self.files.folder,
            )
            return
        with self._base_model():
            images, scores = self._draw("Sampling (base)")
        self.base = SampleColumn(None, scores)
        if keep:
            self._keep(self.base, images, first=True)

    @contextlib.contextmanager
    def _base_model(self) -> Iterator[None]:
        trainer, family = self.trainer, self.trainer.family
        policy = family.denoiser
        if trainer.reference_model is None and trainer.args.reference == "base":
            with adapters.base_policy(policy):
                yield
            return
        if not self.moved:  # the policy is its reference, and runs in the precision of every later step
            yield
            return
        with trainer.reference_policy() as reference:
            setattr(family.pipeline, family.denoiser_name, reference)
            try:
                yield
            finally:
                setattr(family.pipeline, family.denoiser_name, policy)

    def _draw(self, description: str) -> tuple[list[Image.Image], dict[str, list[float | None]]]:
        """Return the images of all rows and their scores, the same on every process."""
        trainer, args = self.trainer, self.trainer.args
        starts = range(0, len(self.rows), args.per_device_eval_batch_size)
        # A sharded network is called by all processes or by none, so there each draws everything.
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        mine = starts if sharded else starts[args.process_index :: args.world_size]
        hidden = args.disable_tqdm or not trainer.is_world_process_zero()
        parts = []
        with tqdm(total=len(mine), desc=description, unit="batch", leave=False, disable=hidden) as bar, _undisturbed():
            for start in mine:
                parts.append((start, *self._draw_batch(self.rows[start : start + args.per_device_eval_batch_size])))
                bar.update()
        images: list[Image.Image] = []
        scores: dict[str, list[float | None]] = {name: [] for name in self.rewards}
        for _, drawn, found in sorted(
            {part[0]: part for part in self.gather(parts)}.values(), key=lambda part: part[0]
        ):
            images += drawn
            for name, values in found.items():
                scores[name] += values
        return images, scores

    def _draw_batch(self, rows: list[tuple[str, int]]) -> tuple[list[Image.Image], dict[str, list[float | None]]]:
        prompts, seeds = [prompt for prompt, _ in rows], [seed for _, seed in rows]
        options = {"batch_size": len(rows), "progress": False, **self.sampling}
        pipeline = self.trainer.family.pipeline
        if self.makes_videos:
            clips = [Clip(frames) for frames in generate_videos(pipeline, prompts, seeds, **options)]
            return [frame_row(clip) for clip in clips], self._score(clips, prompts)
        images = generate_images(pipeline, prompts, seeds, **options)
        return images, self._score(images, prompts)

    def _score(self, made: Sequence[Any], prompts: list[str]) -> dict[str, list[float | None]]:
        return {name: score_images(reward, made, prompts) for name, reward in self.rewards.items()}

    def _compare(self, scores: dict[str, list[float | None]]) -> dict[str, float]:
        metrics: dict[str, float] = {}
        prompts = [prompt for prompt, _ in self.rows]
        for name, values in scores.items():
            base = self.base.scores[name] if self.base is not None else values
            if all(old is None or new is None for old, new in zip(base, values, strict=True)):
                logger.warning("The reward %r scored no pair of images, so nothing of it is logged.", name)
                continue
            found = compare_scores(name, base, values, prompts, trained=False, num_resamples=1)
            metrics[f"samples/{name}/mean"] = found.mean_after
            if self.base is not None:
                metrics[f"samples/{name}/base"] = found.mean_before
                metrics[f"samples/{name}/win_rate"] = found.win_rate
        return metrics

    # ---- Where ----

    def _keep(self, column: SampleColumn, images: list[Image.Image], first: bool = False) -> None:
        trainer = self.trainer
        self.columns.insert(0 if first else len(self.columns), column)
        if not trainer.is_world_process_zero():
            return
        self.files.write(self.columns, column, images)
        trainer.card_extras.setdefault(
            "pictures",
            [
                CardImage(
                    f"{FOLDER}/{STRIP_NAME}",
                    alt="Images of equal prompts and seeds by step of training, with their scores; means at the top",
                )
            ],
        )
        shown = range(min(len(self.rows), MAX_ROWS))
        log_images(
            trainer.callback_handler.callbacks,
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


def read_sample_prompts(given: list[str] | str | None) -> list[str]:
    """
    Return the prompts to draw.

    Args:
        given (`list[str]` or `str`, *optional*):
            Prompts; or one text file, table or named set that holds them.

    Returns:
        `list[str]`

    Raises:
        DataError: for a file or set that cannot be read, or a blank prompt.
    """
    prompts = [given] if isinstance(given, str) else list(given or ())
    if len(prompts) == 1:
        path = Path(prompts[0])
        if prompt_set(prompts[0]) or path.suffix.lower() in _TABLES or path.is_file():
            return load_prompts(prompts[0]).texts
    bad = [f"row {row}: {cause}" for row, prompt in enumerate(prompts) if (cause := prompt_problem(prompt))]
    if bad:
        raise DataError(f"`sample_prompts`: {len(bad)} of {len(prompts)} cannot be used ({', '.join(bad[:5])}).")
    return prompts


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"


@contextlib.contextmanager
def _kept(control: TrainerControl) -> Iterator[None]:
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
