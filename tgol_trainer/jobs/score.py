"""Score a dataset of images or videos: add one column per reward, in shards that survive a kill."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
import torch
from tqdm.auto import tqdm

from tgol_trainer._files import write_json
from tgol_trainer.data import Columns, DataError, ImageError, VideoError, frame_rate, open_image, read_video
from tgol_trainer.data.files import NotAFileError, open_file, read_url
from tgol_trainer.rewards import (
    Clip,
    MeanOverFrames,
    Medium,
    RewardFunction,
    reward_facts,
    reward_takes,
    score_columns,
)
from tgol_trainer.sources.loading import AnyDataset
from tgol_trainer.sources.shards import REWARDS, SCORED, read_rewards

from .shards import Shards, process_share, write_parquet

logger = logging.getLogger(__name__)

WEIGHTED = "weighted_sum"
_MADE_OF = "made_of_blake2b"
_BATCH_SIZES = {"image": 32, "video": 2}

Loaders = Mapping[str, Callable[[], RewardFunction]]
Scores = Mapping[str, Sequence[float | None]]


@dataclasses.dataclass(frozen=True)
class ScoringSettings:
    """
    How a dataset is scored.

    Args:
        columns ([`Columns`], *optional*): Names of the prompt and image columns.
        video_column (`str`, *optional*):
            Column of videos, scored instead of images; by default `columns.video`, or `"video"` without images.
        mean_over_frames (`int`, *optional*):
            Score videos also with rewards of images: the mean over this number of frames ([`MeanOverFrames`]).
        weights (`Mapping[str, float]`, *optional*):
            Columns of the rewards to weights: adds the column `weighted_sum`, `None` where one of them is.
        one_at_a_time (`bool`, *optional*, defaults to `False`):
            Keep one reward in memory at a time and decode the images once for each.
        shard_size (`int`, *optional*, defaults to 1024): Rows per shard.
        batch_size (`int`, *optional*): Images or videos per call of a reward; 32 images or 2 videos by default.
        num_workers (`int`, *optional*, defaults to 2): Threads that decode images and videos.
        made_of (`Mapping[str, str]`, *optional*):
            Column of a reward to a fingerprint of what decides its scores; `output_dir` keeps it, and scores that were
            made of something else are refused there.
    """

    columns: Columns = dataclasses.field(default_factory=Columns)
    video_column: str | None = None
    mean_over_frames: int | None = None
    weights: Mapping[str, float] = dataclasses.field(default_factory=dict)
    one_at_a_time: bool = False
    shard_size: int = 1024
    batch_size: int | None = None
    num_workers: int = 2
    made_of: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raise a [`DataError`] for a size below 1, with which no row would ever be scored."""
        for name in ("shard_size", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"`{name}` is {value}; it must be at least 1.")


@dataclasses.dataclass(frozen=True)
class Source:
    """The columns of prompts and of images or videos (`medium`) that are read, and the frames that are averaged."""

    prompt: str
    visual: str
    medium: str
    mean_over_frames: int | None


def score_dataset(
    dataset: datasets.Dataset,
    rewards: Loaders,
    output_dir: str | Path,
    settings: ScoringSettings | None = None,
    *,
    share: tuple[int, int] | None = None,
    progress: bool = True,
    report: bool = True,
) -> dict[str, int]:
    """
    Add one float64 column per reward and write the dataset as Parquet shards.

    The scores of a shard are kept as soon as they are made (`.scores/<reward>/`), so a kill loses at most one shard of
    one reward, and a reward that is added later is scored alone. Rows whose image cannot be decoded get `None`
    in all columns and are counted. Memory holds one shard of encoded images and one batch of decoded ones, with all
    frames of a video. A reward with a method `columns` adds several columns, see [`RewardFunction`].

    Args:
        dataset (`datasets.Dataset`): With columns of prompts and of images or videos; other columns are kept.
        rewards (`Mapping[str, Callable]`):
            Column name to a function without arguments that loads the reward; it is called if scores are missing.
        output_dir (`str` or `Path`):
            Holds `data/train-*.parquet`, `tgol_score.json` and `rewards.json` ([`read_rewards`]);
            `datasets.load_dataset(output_dir)` reads it.
        settings ([`ScoringSettings`], *optional*): Columns, weights, sizes of shards and batches.
        share (`tuple[int, int]`, *optional*):
            Number of this process and number of processes; by default from the environment ([`process_share`]).
        progress (`bool`, *optional*, defaults to `True`): Show one bar per group of rewards, over this process's rows.
        report (`bool`, *optional*, defaults to `True`): Warn of rows without a score.

    Returns:
        `dict[str, int]`: column name to the number of this process's rows without a score.

    Raises:
        DataError: if no reward is given, if a column is missing or the name of a reward is taken, if a reward scores
            images and the rows hold videos or the other way round, if a reward gave no row a score, or if `output_dir`
            was begun with another dataset or other shards.
    """
    settings = settings or ScoringSettings()
    settings.check()
    source = source_of(dataset.column_names, settings)
    check_rewards(dataset, list(rewards), source, settings.weights)
    check_made_of(Path(output_dir), settings.made_of)
    dataset = _undecoded(dataset, source)
    work = _Work(dataset, _shards(dataset, Path(output_dir), source, settings.shard_size), source, settings)
    mine = work.shards.share(*(share or process_share()))
    for loaders in rewards_in_turn(rewards, settings.one_at_a_time):
        work.score(loaders, mine, progress)
    if share is None:
        work.refuse_silence(list(rewards), mine)
    missing = work.assemble(list(rewards), mine)
    if report:
        report_missing(missing, work.shards.count(mine), source.medium)
    return missing


def score_one_shard(
    rows: datasets.Dataset, rewards: Loaders, folder: Path, settings: ScoringSettings, *, report: bool
) -> Path:
    """Score rows that become one shard, in a folder of its own where a kill loses one reward at most."""
    settings = dataclasses.replace(settings, shard_size=len(rows), weights={}, one_at_a_time=False)
    score_dataset(rows, rewards, folder, settings, share=(0, 1), progress=False, report=report)
    return next((folder / "data").glob("*.parquet"))


def rewards_in_turn(rewards: Loaders, one_at_a_time: bool) -> Iterator[Loaders]:
    """Yield groups of rewards that are in memory together: each is loaded when first called, and freed afterwards."""
    for group in [[name] for name in rewards] if one_at_a_time else [list(rewards)]:
        loaders: dict[str, Callable[[], RewardFunction]] = {name: functools.cache(rewards[name]) for name in group}
        yield loaders
        loaders.clear()
        if one_at_a_time:  # the models of the next group need the memory
            free_memory()


def free_memory() -> None:
    """Give the memory of models that nobody holds any more back to the system and the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def source_of(names: Sequence[str], settings: ScoringSettings) -> Source:
    """Return which of a dataset's columns are read."""
    columns, mean_over_frames = settings.columns, settings.mean_over_frames
    video = settings.video_column or columns.video
    if video is None and columns.image not in names and "video" in names:
        video = "video"
    if video is None:
        if mean_over_frames is not None:
            raise DataError(
                f"`mean_over_frames`: the column {columns.image!r} holds images. Leave it out, or name a column of "
                "videos (`video_column`)."
            )
        return Source(columns.prompt, columns.image, "image", None)
    if mean_over_frames is not None and mean_over_frames < 1:
        raise DataError(f"`mean_over_frames` is {mean_over_frames}; it must be at least 1.")
    return Source(columns.prompt, video, "video", mean_over_frames)


def _fitting(name: str, reward: RewardFunction, source: Source) -> RewardFunction:
    """Return the reward in a form that scores what the rows hold."""
    takes = reward_takes(reward)
    _check_takes(name, takes, source)
    if takes == f"{source.medium}s" or source.mean_over_frames is None:
        return reward
    return MeanOverFrames(reward, source.mean_over_frames)


def check_medium(rewards: Loaders, videos: bool, settings: ScoringSettings | None = None) -> None:
    """
    Raise a [`DataError`] for a reward that does not score what a pipeline draws, before it draws for hours.

    Args:
        rewards (`Mapping[str, Callable]`):
            As in [`score_dataset`]. Those without an attribute `takes` ([`RewardLoader`]) are not looked at.
        videos (`bool`): Whether the pipeline draws videos.
        settings ([`ScoringSettings`], *optional*): With `mean_over_frames`.
    """
    source = source_of(["prompt", "video" if videos else "image"], settings or ScoringSettings())
    for name, load in rewards.items():
        if takes := getattr(load, "takes", None):
            _check_takes(name, takes, source)


def _check_takes(name: str, takes: Medium, source: Source) -> None:
    """Refuse a reward of videos for images, and one of images for videos without a mean over frames."""
    if takes == f"{source.medium}s" or (takes == "images" and source.mean_over_frames is not None):
        return
    if takes == "videos":
        raise DataError(
            f"`rewards`: {name!r} scores videos, and {source.visual!r} is a column of images. Leave it out, or name a "
            "column of videos (`video_column`)."
        )
    raise DataError(
        f"`rewards`: {name!r} scores images, and {source.visual!r} is a column of videos. Ask for its mean over "
        "frames (`mean_over_frames=8`, which ignores motion), or name a reward of videos. "
        'A function of your own that takes lists of frames says so by an attribute: my_reward.takes = "videos".'
    )


def _undecoded(dataset: datasets.Dataset, source: Source) -> datasets.Dataset:
    feature = dataset.features[source.visual]
    if source.medium == "image":
        return dataset.cast_column(source.visual, datasets.Image(decode=False))
    if isinstance(feature, (datasets.Video, datasets.Value, dict)):
        return dataset.cast_column(source.visual, datasets.Video(decode=False))
    if isinstance(feature, datasets.List) and isinstance(feature.feature, datasets.Image):  # frames
        return dataset.cast_column(source.visual, datasets.List(datasets.Image(decode=False)))
    return dataset


def check_rewards(dataset: AnyDataset, rewards: Sequence[str], source: Source, weights: Mapping[str, float]) -> None:
    """Raise a [`DataError`] for columns that are missing or taken, and for weights of no reward."""
    if not rewards:
        raise DataError("`rewards`: none is given. Name at least one, such as `jpeg_compressibility`.")
    absent = [name for name in (source.prompt, source.visual) if name not in dataset.column_names]
    if absent:
        raise DataError(
            f"dataset: no column {' and '.join(map(repr, absent))}; the columns are {dataset.column_names}. Name "
            "yours: Columns(prompt=..., image=...), and `video_column` for videos."
        )
    taken = [name for name in (*rewards, *([WEIGHTED] if weights else [])) if name in dataset.column_names]
    if taken:
        raise DataError(f"`rewards`: the dataset already has a column {taken[0]!r}. Rename or remove it first.")
    wrong = [name for name in rewards if Path(name).name != name or name.startswith(".")]
    if wrong:
        raise DataError(f"`rewards`: {wrong[0]!r} cannot be a column and folder name. Leave out slashes.")
    unknown = [
        name for name in weights if not any(name == reward or name.startswith(f"{reward}_") for reward in rewards)
    ]
    if unknown:
        raise DataError(f"`weights`: {unknown[0]!r} is not a column of these rewards: {', '.join(rewards)}.")


def check_made_of(folder: Path, made_of: Mapping[str, str]) -> None:
    """Raise a [`DataError`] where a folder holds scores of a reward that were made of something else."""
    before = read_rewards(folder)
    for name in made_of:
        if before.get(name, {}).get(_MADE_OF, made_of[name]) != made_of[name]:
            raise DataError(
                f"`output_dir`: the scores of {name!r} in {folder} come from another function or other options. Give "
                "another folder for these."
            )


def _fingerprint(name: str, made_of: Mapping[str, str]) -> dict[str, str]:
    return {_MADE_OF: made_of[name]} if name in made_of else {}


def _shards(dataset: datasets.Dataset, folder: Path, source: Source, shard_size: int) -> Shards:
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.select_columns([source.prompt]).with_format("arrow").iter(10_000):
        digest.update("\0".join(str(prompt) for prompt in batch[source.prompt].to_pylist()).encode())
    settings: dict[str, Any] = {"columns": [source.prompt, source.visual], "prompts_blake2b": digest.hexdigest()}
    if source.medium == "video":
        settings["mean_over_frames"] = source.mean_over_frames
    return Shards(folder, len(dataset), shard_size, SCORED, settings)


@dataclasses.dataclass(frozen=True)
class _Work:
    """A dataset, its images not decoded, and the shards that its scores are written to."""

    dataset: datasets.Dataset
    shards: Shards
    source: Source
    settings: ScoringSettings

    def part(self, reward: str, shard: int) -> Path:
        """Return the file of the scores of one reward for one shard."""
        return self.shards.folder / ".scores" / reward / f"{shard:05d}.parquet"

    def score(self, loaders: Loaders, mine: Sequence[int], progress: bool) -> None:
        """Score the shards that lack one of the rewards, which are in memory together."""
        wanted = {shard: [name for name in loaders if not self.part(name, shard).exists()] for shard in mine}
        wanted = {shard: names for shard, names in wanted.items() if names}
        missing = [name for name in loaders if any(name in names for names in wanted.values())]
        if not missing:
            return
        rewards = {name: _fitting(name, loaders[name](), self.source) for name in missing}
        total, title = self.shards.count(wanted), f"Scoring ({', '.join(missing)})"
        for name, reward in rewards.items():
            if hasattr(reward, "starting"):
                reward.starting(sum(self.shards.count([shard]) for shard, names in wanted.items() if name in names))
        with tqdm(total=total, desc=title, unit=self.source.medium, disable=not progress) as bar:
            for shard, names in wanted.items():
                self._score_shard(shard, {name: rewards[name] for name in names}, missing, bar)

    def _score_shard(self, shard: int, rewards: dict[str, RewardFunction], names: Sequence[str], bar: tqdm) -> None:
        source, row = self.source, self.shards.rows(shard).start
        rows = self.dataset.select(self.shards.rows(shard)).select_columns([source.prompt, source.visual])
        batch_size = self.settings.batch_size
        batch_size = _BATCH_SIZES[source.medium] if batch_size is None else batch_size
        open_one = _opened if source.medium == "image" else _opened_video
        scores: dict[str, dict[str, list[float | None]]] = {name: {} for name in rewards}
        with ThreadPoolExecutor(max(1, self.settings.num_workers)) as pool:
            for batch in rows.iter(batch_size):
                prompts = [prompt or "" for prompt in batch[source.prompt]]
                images = list(pool.map(open_one, batch[source.visual]))
                for name, reward in rewards.items():
                    found = score_columns(reward, images, prompts, batch_size=batch_size, first_row=row)
                    for ending, values in found.items():
                        scores[name].setdefault(name + ending, []).extend(values)
                row += len(images)
                bar.update(len(images))
        for name, columns in scores.items():
            others = {*self.dataset.column_names, *names} - {name}
            taken = [column for column in columns if column in others]
            if taken:
                raise DataError(
                    f"`rewards`: {name!r} would write the column {taken[0]!r}, which is there. Rename it first."
                )
            features = datasets.Features({column: datasets.Value("float64") for column in columns})
            file = self.part(name, shard)
            write_parquet(file, datasets.Dataset.from_dict(columns, features=features))
            facts = {**dataclasses.asdict(reward_facts(rewards[name])), **_fingerprint(name, self.settings.made_of)}
            write_json(file.with_name("facts.json"), facts)
        note_rewards(self.shards.folder, self._facts())

    def _facts(self) -> dict[str, Any]:
        found = {}
        for file in sorted((self.shards.folder / ".scores").glob("*/facts.json")):
            first = min(file.parent.glob("*.parquet"), default=None)
            names = pyarrow.parquet.read_schema(first).names if first else []
            found[file.parent.name] = {**json.loads(file.read_text(encoding="utf-8")), "columns": names}
        return found

    def refuse_silence(self, rewards: list[str], mine: Sequence[int]) -> None:
        """Raise a [`DataError`] for a reward that gave no row a score; other processes may have rows that have one."""
        for name in rewards if mine else ():
            parts = [pyarrow.parquet.read_table(file) for file in self.part(name, 0).parent.glob("*.parquet")]
            if not any(column.null_count < len(part) for part in parts for column in part.columns):
                raise DataError(no_scores(name, sum(map(len, parts))))

    def assemble(self, rewards: list[str], mine: Sequence[int]) -> dict[str, int]:
        """Write the shards that lack a column or the present weighted sum; return how many rows have no score."""
        weights = self.settings.weights
        note_rewards(self.shards.folder, self._facts() | weighted_facts(weights))
        missing = dict.fromkeys(rewards, 0)
        for shard in mine:
            found: dict[str, list[float | None]] = {}
            for name in rewards:
                # Not read by `datasets`, which would keep a copy in its cache.
                found |= pyarrow.parquet.read_table(self.part(name, shard)).to_pydict()
            if weights:
                found[WEIGHTED] = weighted(found, weights)
            for name, values in found.items():
                missing[name] = missing.get(name, 0) + values.count(None)
            path = self.shards.path(shard)
            names = pyarrow.parquet.read_schema(path).names if path.exists() else []
            if not set(found) <= set(names) or (weights and _column(path, WEIGHTED) != found[WEIGHTED]):
                earlier = [name for name in names if name not in self.dataset.column_names]
                scores = {name: _column(path, name) for name in earlier} | found
                self.shards.write(shard, self._assembled(self.dataset.select(self.shards.rows(shard)), scores))
        return missing

    def _assembled(self, rows: datasets.Dataset, scores: Scores) -> datasets.Dataset:
        """Return the rows with their images or videos as bytes, and the columns of scores behind."""
        visual = self.source.visual
        features = datasets.Features({**rows.features, **{name: datasets.Value("float64") for name in scores}})
        if self.source.medium == "image":
            features[visual] = datasets.Image()
        content: dict[str, Any] = {name: list(rows[name]) for name in rows.column_names}
        content[visual] = [_with_bytes(value) for value in content[visual]]
        return datasets.Dataset.from_dict({**content, **scores}, features=features)


def _column(path: Path, name: str) -> list[float | None]:
    return pyarrow.parquet.read_table(path, columns=[name])[name].to_pylist()


def weighted_facts(weights: Mapping[str, float]) -> dict[str, Any]:
    """Return the entry of the weighted sum in `rewards.json`; nothing without weights."""
    scale = " + ".join(f"{weight:g} * {name}" for name, weight in weights.items())
    facts = {"name": WEIGHTED, "model_id": None, "revision": None, "scale": scale, "columns": [WEIGHTED]}
    return {WEIGHTED: facts} if weights else {}


def note_rewards(folder: Path, facts: dict[str, Any]) -> None:
    """Add facts of rewards to the `rewards.json` that [`read_rewards`] reads; every process writes the same."""
    before = read_rewards(folder)
    if before != before | facts:
        write_json(folder / REWARDS, before | facts)


def _opened(value: Any) -> Any:
    try:
        return open_image(value)
    except ImageError:
        return None


def _opened_video(value: Any) -> Clip | None:
    try:
        return Clip(read_video(value, None, lambda frame: frame), frame_rate(value))
    except VideoError:
        return None


def weighted(found: Scores, weights: Mapping[str, float]) -> list[float | None]:
    """Return the sum of columns times weights, `None` where one of them is `None`."""
    absent = [name for name in weights if name not in found]
    if absent:
        raise DataError(f"`weights`: {absent[0]!r} is not a column of these rewards: {', '.join(found)}.")
    rows = zip(*(found[name] for name in weights), strict=True)
    return [
        None if None in row else sum(weight * value for weight, value in zip(weights.values(), row, strict=True))
        for row in rows
    ]


def _with_bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_bytes(frame) for frame in value]
    if not isinstance(value, dict) or value.get("bytes") is not None:
        return value
    path = str(value.get("path") or "")
    try:
        with read_url(path) if "://" in path else open_file(path) as file:
            return {"bytes": file.read(), "path": Path(path.partition("::")[0]).name}
    except (OSError, NotAFileError):
        return None


def no_scores(name: str, num_rows: int) -> str:
    """Return the error of a reward that gave no row a score."""
    return (
        f"`rewards`: {name!r} gave none of the {num_rows} rows a score. Of a judge, `pattern` must match its answers, "
        "which are shown above; `tgol check` lists images that cannot be decoded. Mend that and give another "
        "`output_dir`: answers are kept."
    )


def report_missing(missing: Mapping[str, int], num_rows: int, medium: str) -> None:
    """Warn of rows without a score, for each column."""
    for name, count in missing.items():
        if count:
            logger.warning(
                "%s: %d of %d rows have no score (%s that cannot be decoded, or a reward that gave none). "
                "Training leaves them out with `on_bad_sample='skip'`.",
                *(name, count, num_rows, "an image" if medium == "image" else "a video"),
            )
