"""Train in rounds: generate images with the policy, score them, fit the threshold, train, and move the reference."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from tgol_trainer._files import write_json
from tgol_trainer.config import TGOLConfig, size_of
from tgol_trainer.evaluation import makes_videos
from tgol_trainer.families import FamilySettings
from tgol_trainer.families.skeleton import check_size
from tgol_trainer.jobs import GenerationSettings, ScoringSettings, check_medium, generate_dataset, score_dataset
from tgol_trainer.rewards import RewardFunction
from tgol_trainer.saving.hub import checkpoints
from tgol_trainer.trainer import TGOLTrainer

logger = logging.getLogger(__name__)

RECORD = "rounds.json"
_SEEDS_APART = 10_000


def train_rounds(
    model: str,
    args: TGOLConfig,
    prompts: Sequence[str],
    rewards: Mapping[str, Callable[[], RewardFunction]],
    load: Callable[[str | None], tuple[Any, str | None]],
    *,
    num_rounds: int,
    sampling: Mapping[str, Any] | None = None,
    trainer_options: Mapping[str, Any] | None = None,
) -> TGOLTrainer | None:
    """
    Train in rounds on images of the policy itself (paper, Algorithm 1, with line 15 after each round).

    Round r generates images of every prompt with the policy that round r - 1 left, scores them, fits threshold and
    normalisation to these scores, and trains as `args` say, with the policy it began with as reference.
    `round-r/` keeps the images (`pictures/`), the scores (`scored/`) and the adapter. `rounds.json` keeps the mean
    score of the images, the threshold and the seconds of each round. The same call continues after a kill: it skips
    rounds that are recorded, and does not make images and scores again that are there.

    Args:
        model (`str`): Hub id, folder or the name of an embedded model.
        args ([`TGOLConfig`]):
            Settings of each round. `output_dir` gets the last round's adapter and card. With several rewards,
            `score_column` names the one to train on.
        prompts (`Sequence[str]`): Prompts whose images are generated in each round.
        rewards (`Mapping[str, Callable]`): Name to a function that loads the reward.
        load (`Callable`):
            Takes the folder of an adapter, or `None` for the base model. Returns the pipeline and its revision.
        num_rounds (`int`): Number of rounds in all, at least 1.
        sampling (`Mapping[str, Any]`, *optional*):
            Fields of [`GenerationSettings`], such as `images_per_prompt` (here 8 by default) and `guidance_scale`;
            where `args` set `resolution` or `num_frames`, these are drawn. And `mean_over_frames`, as of
            [`ScoringSettings`].
        trainer_options (`Mapping[str, Any]`, *optional*):
            Further arguments of [`TGOLTrainer`]: `peft_config` (of the first round; later ones continue its adapter)
            and `quantization_config`.

    Returns:
        [`TGOLTrainer`]: that of the last round; `None` if all rounds were there.

    Raises:
        ValueError: for settings that do not go with rounds or with the model, with the remedy; of a size, before
            weights are loaded where configs tell.
    """
    images = {"images_per_prompt": 8, **_trained_size(args), **(sampling or {})}
    score = _checked(args, rewards, num_rounds, images["images_per_prompt"])
    output = Path(args.output_dir)
    records = _recorded(output)
    if len(records) < num_rounds:
        _check_size(model, args, images)
    policy: Path | None = None
    trainer: TGOLTrainer | None = None
    for number in range(num_rounds):
        folder = output / f"round-{number}"
        if number < len(records):
            policy = folder / "adapter"
            continue
        start = time.time()
        logger.info("Round %d of %d: sampling from %s.", number + 1, num_rounds, policy or model)
        rows = _samples(load, rewards, prompts, folder, model, policy, args.seed + _SEEDS_APART * number, images)
        options = dict(trainer_options or {})
        if policy is not None:
            options.pop("peft_config", None)
        trainer = TGOLTrainer(model, _round_arguments(args, folder, policy, score), rows, **options)
        trainer.train(resume_from_checkpoint=bool(checkpoints(folder)))
        policy = folder / "adapter"
        trainer.save_model(str(policy))
        if number == num_rounds - 1:
            trainer.create_model_card(model_name=output.name)
            trainer.save_model(str(output))
        facts = {**_facts(trainer, rows, score), "seconds": round(time.time() - start, 1)}
        records.append({"round": number, **facts})
        write_json(output / RECORD, records)
    if trainer is None:
        logger.info("All %d rounds are there. A larger number adds rounds.", num_rounds)
    return trainer


def _samples(
    load: Callable[[str | None], tuple[Any, str | None]],
    rewards: Mapping[str, Callable[[], RewardFunction]],
    prompts: Sequence[str],
    folder: Path,
    model: str,
    policy: Path | None,
    seed: int,
    options: Mapping[str, Any],
) -> datasets.Dataset:
    """Return scored images of the policy; images that are there are not made again."""
    sampling = dict(options)
    scoring = ScoringSettings(mean_over_frames=sampling.pop("mean_over_frames", None))
    with _without_bars_of_files():
        pipeline, revision = load(None if policy is None else str(policy))
        check_medium(rewards, makes_videos(pipeline), scoring)
        settings = GenerationSettings(model=model, revision=revision, seed=seed, **sampling)
        generate_dataset(pipeline, prompts, folder / "pictures", settings)
        del pipeline
        score_dataset(read_shards(folder / "pictures"), rewards, folder / "scored", scoring)
        return read_shards(folder / "scored")


def _trained_size(args: TGOLConfig) -> dict[str, int]:
    """Return the size and the frames that the run set, under the names of [`GenerationSettings`]."""
    found = {} if args.num_frames is None else {"num_frames": args.num_frames}
    return found | dict(zip(("height", "width"), size_of(args.resolution) or (), strict=False))


def _check_size(model: str, args: TGOLConfig, images: Mapping[str, Any]) -> None:
    """Refuse a size or a number of frames, trained or drawn, that the model does not take."""
    sizes = {"resolution": args.resolution, **{name: images.get(name) for name in ("height", "width")}}
    for frames in {args.num_frames, images.get("num_frames")}:
        settings = FamilySettings(num_frames=frames, expert=args.expert)
        check_size(model, args.pipeline_kwargs, settings, **sizes)


@contextlib.contextmanager
def _without_bars_of_files() -> Iterator[None]:
    # `datasets` shows a bar for each file it reads or writes, over ours.
    shown = datasets.utils.logging.is_progress_bar_enabled()
    datasets.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()


def _recorded(output: Path) -> list[dict[str, Any]]:
    file = output / RECORD
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def _facts(trainer: TGOLTrainer, rows: datasets.Dataset, score: str) -> dict[str, Any]:
    scores = np.asarray([value for value in rows[score] if value is not None])
    logger.info("Mean %s of the %ss: %.5g.", score, trainer.columns.medium, scores.mean())
    threshold = trainer.threshold.to_dict() if trainer.threshold else None
    return {"num_pictures": int(scores.size), "mean_score": float(scores.mean()), "threshold": threshold}


def _checked(args: TGOLConfig, rewards: Mapping[str, Any], num_rounds: int, images_per_prompt: int) -> str:
    """Return the name of the score to train on."""
    if num_rounds < 1 or images_per_prompt < 1:
        raise ValueError(
            f"`num_rounds` and `images_per_prompt` must be at least 1, got {num_rounds} and {images_per_prompt}."
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "Rounds run in one process. With several processes, call `tgol generate`, `tgol score` and `tgol train "
            "--adapter_name_or_path PREVIOUS --reference initial` for each round."
        )
    if args.full_finetuning or args.adapter_name_or_path or args.reference_update != "never":
        raise ValueError(
            "Rounds train an adapter that starts from the base model, and move the reference in between: leave "
            "`full_finetuning`, `adapter_name_or_path` and `reference_update` at their defaults."
        )
    if args.score_columns:
        raise ValueError(
            "Rounds train on one score: leave out `score_columns`, and give one reward that adds several by weight."
        )
    if not rewards:
        raise ValueError("Rounds score what they sample: give `reward_funcs`.")
    if len(rewards) > 1 and args.score_column not in rewards:
        raise ValueError(
            f"`score_column` is {args.score_column!r}, and the rewards are {', '.join(rewards)}. Set it to the reward "
            "to train on."
        )
    return args.score_column if args.score_column in rewards else next(iter(rewards))


def _round_arguments(args: TGOLConfig, folder: Path, policy: Path | None, score: str) -> TGOLConfig:
    """Return the arguments of one round: its folder, and the policy it starts from, which is its reference."""
    changed = copy.deepcopy(args)
    changed.output_dir, changed.score_column = str(folder), score
    changed.push_to_hub = False  # the last round's adapter is pushed once, from `output_dir`
    changed.seed = changed.data_seed = args.seed + _SEEDS_APART * int(folder.name.rpartition("-")[2])
    if changed.threshold_strategy == "oracle":
        changed.reference_samples = True  # the images are the reference's own
    if policy is not None:
        changed.adapter_name_or_path, changed.reference = str(policy), "initial"
    return changed


def read_shards(folder: Path) -> datasets.Dataset:
    """Return the rows of the shards in `folder/data`, in order."""
    files = sorted(map(str, (folder / "data").glob("train-*.parquet")))
    return datasets.load_dataset("parquet", data_files=files, split="train")
