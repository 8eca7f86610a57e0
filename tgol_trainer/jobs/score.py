"""A dataset of images or videos to the same dataset with a column a reward, in shards that survive a kill."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from tqdm.auto import tqdm

from tgol_trainer.data import Columns, DataError, ImageError, VideoError, frame_rate, open_image, read_video
from tgol_trainer.rewards import Clip, MeanOverFrames, RewardFunction, reward_facts, reward_takes, score_columns
from tgol_trainer.sources.loading import AnyDataset
from tgol_trainer.sources.shards import REWARDS, SCORED, read_rewards

from .shards import Shards, process_share, write_atomically, write_parquet

logger = logging.getLogger(__name__)

WEIGHTED = "weighted_sum"
_BATCH_SIZES = {"image": 32, "video": 2}


@dataclasses.dataclass(frozen=True)
class Source:
    """
    The columns that are read, and how.

    Args:
        prompt (`str`):
            Column of prompts.
        visual (`str`):
            Column of images or videos.
        medium (`str`):
            `"image"` or `"video"`.
        mean_over_frames (`int`, *optional*):
            As in [`score_dataset`].
    """

    prompt: str
    visual: str
    medium: str
    mean_over_frames: int | None


def score_dataset(
    dataset: datasets.Dataset,
    rewards: Mapping[str, Callable[[], RewardFunction]],
    output_dir: str | Path,
    *,
    columns: Columns | None = None,
    one_at_a_time: bool = False,
    shard_size: int = 1024,
    batch_size: int | None = None,
    num_workers: int = 2,
    share: tuple[int, int] | None = None,
    progress: bool = True,
    video_column: str | None = None,
    mean_over_frames: int | None = None,
    weights: Mapping[str, float] | None = None,
    report: bool = True,
) -> dict[str, int]:
    """
    Add one float64 column a reward and write the dataset as Parquet shards.

    The scores of a shard are kept as soon as they are made (`.scores/<reward>/`), so a kill loses at most one shard of
    one reward, and a reward that is asked for later is scored alone. Rows whose image cannot be decoded get `None`
    everywhere and are counted. Memory holds one shard of encoded images and one batch of decoded ones, of a video all
    frames. A reward with a method `columns` adds several columns, as [`RewardFunction`] says.

    Args:
        dataset (`datasets.Dataset`):
            With columns of prompts and of images or videos; other columns are kept.
        rewards (`Mapping[str, Callable]`):
            Column name to a function without arguments that loads the reward; it is called when scores are missing.
        output_dir (`str` or `Path`):
            Holds `data/train-*.parquet`, `tgol_score.json` and `rewards.json` ([`read_rewards`]);
            `datasets.load_dataset(output_dir)` reads it.
        columns ([`Columns`], *optional*):
            Names of the prompt and image columns.
        one_at_a_time (`bool`, *optional*, defaults to `False`):
            Keep one reward in memory at a time and decode the images once for each.
        shard_size (`int`, *optional*, defaults to 1024):
            Rows a shard.
        batch_size (`int`, *optional*):
            Images or videos a call of a reward; 32 images or 2 videos by default.
        num_workers (`int`, *optional*, defaults to 2):
            Threads that decode images and videos.
        share (`tuple[int, int]`, *optional*):
            Number of this process and how many there are; by default those of the environment ([`process_share`]).
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar a group of rewards, over this process's rows.
        video_column (`str`, *optional*):
            Column of videos, scored in place of images. By default `columns.video`, or `"video"` where no images are.
        mean_over_frames (`int`, *optional*):
            Score videos with rewards of images as well: the mean over so many frames ([`MeanOverFrames`]).
        weights (`Mapping[str, float]`, *optional*):
            Columns of these rewards to weights: adds the column `weighted_sum`, `None` where one of them is.
        report (`bool`, *optional*, defaults to `True`):
            Warn of rows without a score.

    Returns:
        `dict[str, int]`: column name to the number of this process's rows without a score.

    Raises:
        DataError: if no reward is given, if a column is missing or the name of a reward is taken, if a reward scores
            images and the rows hold videos or the other way round, or if `output_dir` was begun with another dataset
            or other shards.
    """
    source, weights = source_of(dataset, columns or Columns(), video_column, mean_over_frames), weights or {}
    check_rewards(dataset, list(rewards), source, weights)
    batch_size = _BATCH_SIZES[source.medium] if batch_size is None else batch_size
    dataset = _undecoded(dataset, source)
    shards = _shards(dataset, Path(output_dir), source, shard_size)
    mine = list(shards.share(*(share or process_share())))
    work = (dataset, shards, source, batch_size, num_workers, progress)
    for group in [[name] for name in rewards] if one_at_a_time else [list(rewards)]:
        _score_group({name: rewards[name] for name in group}, mine, *work)
        if one_at_a_time:
            gc.collect()  # the next group's models need the room
    missing = _assemble(dataset, list(rewards), shards, mine, source, weights)
    if report:
        report_missing(missing, sum(len(shards.rows(shard)) for shard in mine), source.medium)
    return missing


def _score_group(
    rewards: Mapping[str, Callable[[], RewardFunction]],
    mine: Sequence[int],
    dataset: datasets.Dataset,
    shards: Shards,
    source: Source,
    batch_size: int,
    num_workers: int,
    progress: bool,
) -> None:
    """Score the shards that lack one of the rewards, which are in memory together."""
    wanted = [shard for shard in mine if any(not _part(shards, name, shard).exists() for name in rewards)]
    missing = [name for name in rewards if any(not _part(shards, name, shard).exists() for shard in wanted)]
    if not missing:
        return
    loaded = {name: _fitting(name, rewards[name](), source) for name in missing}
    total = sum(len(shards.rows(shard)) for shard in wanted)
    with tqdm(total=total, desc=f"Scoring ({', '.join(missing)})", unit=source.medium, disable=not progress) as bar:
        for shard in wanted:
            _score_shard(dataset, loaded, shards, shard, source, batch_size, num_workers, bar)


def source_of(dataset: AnyDataset, columns: Columns, video_column: str | None, mean_over_frames: int | None) -> Source:
    """Return what is read of a dataset."""
    video = video_column or columns.video
    if video is None and columns.image not in dataset.column_names and "video" in dataset.column_names:
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
    """Return a reward that scores what the rows hold."""
    takes = reward_takes(reward)
    if takes == f"{source.medium}s":
        return reward
    if takes == "videos":
        raise DataError(
            f"`rewards`: {name!r} scores videos, and {source.visual!r} is a column of images. Leave it out, or name a "
            "column of videos (`video_column`)."
        )
    if source.mean_over_frames is not None:
        return MeanOverFrames(reward, source.mean_over_frames)
    raise DataError(
        f"`rewards`: {name!r} scores images, and {source.visual!r} is a column of videos. Ask for its mean over "
        "frames (`mean_over_frames=8`, which takes no notice of motion), or name a reward of videos. "
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
        raise DataError(f"`weights`: {unknown[0]!r} is no column of these rewards: {', '.join(rewards)}.")


def _shards(dataset: datasets.Dataset, folder: Path, source: Source, shard_size: int) -> Shards:
    digest = hashlib.blake2b(digest_size=16)
    for batch in dataset.select_columns([source.prompt]).with_format("arrow").iter(10_000):
        digest.update("\0".join(str(prompt) for prompt in batch[source.prompt].to_pylist()).encode())
    settings: dict[str, Any] = {"columns": [source.prompt, source.visual], "prompts_blake2b": digest.hexdigest()}
    if source.medium == "video":
        settings["mean_over_frames"] = source.mean_over_frames
    return Shards(folder, len(dataset), shard_size, SCORED, settings)


def _part(shards: Shards, name: str, shard: int) -> Path:
    return shards.folder / ".scores" / name / f"{shard:05d}.parquet"


def _score_shard(
    dataset: datasets.Dataset,
    rewards: dict[str, RewardFunction],
    shards: Shards,
    shard: int,
    source: Source,
    batch_size: int,
    num_workers: int,
    bar: tqdm,
) -> None:
    rows = dataset.select(shards.rows(shard))
    wanted = [name for name in rewards if not _part(shards, name, shard).exists()]
    scores: dict[str, dict[str, list[float | None]]] = {name: {} for name in wanted}
    row = shards.rows(shard).start
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        for batch in rows.select_columns([source.prompt, source.visual]).iter(batch_size):
            prompts = [prompt or "" for prompt in batch[source.prompt]]
            images = list(pool.map(_opened if source.medium == "image" else _opened_video, batch[source.visual]))
            for name in wanted:
                found = score_columns(rewards[name], images, prompts, batch_size=batch_size, first_row=row)
                for ending, values in found.items():
                    scores[name].setdefault(name + ending, []).extend(values)
            row += len(images)
            bar.update(len(images))
    for name, columns in scores.items():
        taken = [column for column in columns if column in rows.column_names or column in {*rewards} - {name}]
        if taken:
            raise DataError(
                f"`rewards`: {name!r} would write the column {taken[0]!r}, which is there. Rename it first."
            )
        features = datasets.Features({column: datasets.Value("float64") for column in columns})
        write_parquet(_part(shards, name, shard), datasets.Dataset.from_dict(columns, features=features))
        facts = json.dumps(dataclasses.asdict(reward_facts(rewards[name])), indent=2, ensure_ascii=False)
        write_atomically(_part(shards, name, shard).with_name("facts.json"), facts + "\n")
        note_rewards(shards.folder, _facts(shards.folder))


def _facts(folder: Path) -> dict[str, Any]:
    found = {}
    for file in sorted((folder / ".scores").glob("*/facts.json")):
        parts = sorted(file.parent.glob("*.parquet"))
        names = pyarrow.parquet.read_schema(parts[0]).names if parts else []
        found[file.parent.name] = {**json.loads(file.read_text(encoding="utf-8")), "columns": names}
    return found


def weighted_facts(weights: Mapping[str, float]) -> dict[str, Any]:
    """Return what [`read_rewards`] says of the weighted sum, nothing without weights."""
    scale = " + ".join(f"{weight:g} * {name}" for name, weight in weights.items())
    facts = {"name": WEIGHTED, "model_id": None, "revision": None, "scale": scale, "columns": [WEIGHTED]}
    return {WEIGHTED: facts} if weights else {}


def note_rewards(folder: Path, facts: dict[str, Any]) -> None:
    """Add what is known of rewards to what [`read_rewards`] reads; every process writes the same."""
    known = read_rewards(folder)
    if known != (known := known | facts):
        write_atomically(folder / REWARDS, json.dumps(known, indent=2, ensure_ascii=False) + "\n")


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


def _read_part(path: Path) -> dict[str, list[float | None]]:
    return pyarrow.parquet.read_table(path).to_pydict()  # `datasets` would keep a copy in its cache


def weighted(found: Mapping[str, list[float | None]], weights: Mapping[str, float]) -> list[float | None]:
    """Return the sum of columns times weights, `None` where one of them is."""
    absent = [name for name in weights if name not in found]
    if absent:
        raise DataError(f"`weights`: {absent[0]!r} is no column of these rewards: {', '.join(found)}.")
    rows = zip(*(found[name] for name in weights), strict=True)
    return [
        None if None in row else sum(weight * value for weight, value in zip(weights.values(), row, strict=True))
        for row in rows
    ]


def _has_columns(path: Path, found: Mapping[str, list[float | None]]) -> bool:
    """Return whether a shard has these columns, and the sum of the weights of now."""
    if not path.exists() or not set(found) <= set(pyarrow.parquet.read_schema(path).names):
        return False
    return WEIGHTED not in found or pyarrow.parquet.read_table(path, columns=[WEIGHTED]).to_pydict() == {
        WEIGHTED: found[WEIGHTED]
    }


def _assemble(
    dataset: datasets.Dataset,
    rewards: list[str],
    shards: Shards,
    mine: list[int],
    source: Source,
    weights: Mapping[str, float],
) -> dict[str, int]:
    """Write the shards that lack a column or have a sum of other weights; return how many rows have no score."""
    note_rewards(shards.folder, _facts(shards.folder) | weighted_facts(weights))
    missing = dict.fromkeys(rewards, 0)
    for shard in mine:
        found: dict[str, list[float | None]] = {}
        for name in rewards:
            found |= _read_part(_part(shards, name, shard))
        if weights:
            found[WEIGHTED] = weighted(found, weights)
        for name, values in found.items():
            missing[name] = missing.get(name, 0) + sum(value is None for value in values)
        if not _has_columns(shards.path(shard), found):
            before = _other_columns(shards.path(shard), dataset.column_names)
            shards.write(shard, _assembled(dataset.select(shards.rows(shard)), before | found, source))
    return missing


def _other_columns(path: Path, known: Sequence[str]) -> dict[str, list[float | None]]:
    """Return the scores of an earlier start that a shard holds."""
    names = [name for name in pyarrow.parquet.read_schema(path).names if name not in known] if path.exists() else []
    return pyarrow.parquet.read_table(path, columns=names).to_pydict() if names else {}


def _assembled(rows: datasets.Dataset, scores: dict[str, list[float | None]], source: Source) -> datasets.Dataset:
    """Return the rows with their images or videos as bytes and the score columns behind."""
    features = datasets.Features({**rows.features, **{name: datasets.Value("float64") for name in scores}})
    if source.medium == "image":
        features[source.visual] = datasets.Image()
    content: dict[str, Any] = {name: list(rows[name]) for name in rows.column_names}
    content[source.visual] = [_with_bytes(value) for value in content[source.visual]]
    return datasets.Dataset.from_dict({**content, **scores}, features=features)


def _with_bytes(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_bytes(frame) for frame in value]
    if not isinstance(value, dict) or value.get("bytes") is not None:
        return value
    if "://" in str(value.get("path")):
        from datasets.utils.file_utils import xopen

        try:
            with xopen(value["path"], "rb") as file:  # reads hf://, https:// and zip://a.png::hf://...
                return {"bytes": file.read(), "path": Path(value["path"].partition("::")[0]).name}
        except OSError:
            return None
    path = Path(value.get("path") or "")
    return {"bytes": path.read_bytes(), "path": path.name} if path.is_file() else None


def report_missing(missing: Mapping[str, int], num_rows: int, medium: str) -> None:
    """Warn of rows without a score, of each column."""
    for name, count in missing.items():
        if count:
            logger.warning(
                "%s: %d of %d rows have no score (%s that cannot be decoded, or a reward that gave none). "
                "Training leaves them out with `on_bad_sample='skip'`.",
                *(name, count, num_rows, "an image" if medium == "image" else "a video"),
            )
