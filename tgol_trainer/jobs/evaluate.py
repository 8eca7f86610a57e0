"""A base model and its adapters on the same prompts and seeds: images, scores and measures in resumable shards."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from PIL import Image
from tqdm.auto import tqdm

from tgol_trainer.data import DataError, ImageError, VideoError, open_image, read_video
from tgol_trainer.evaluation import (
    MEASURES,
    SPREADS,
    Gallery,
    ModelRows,
    encode_preview,
    encode_thumbnail,
    measure_image,
    pixel_descriptor,
)
from tgol_trainer.evaluation.measures import MEASURED_FRAMES, SPREAD
from tgol_trainer.rewards import RewardFunction
from tgol_trainer.sources.shards import read_rewards

from .generate import generate_dataset
from .score import note_rewards, score_dataset
from .shards import Shards, process_share, weights_digest

logger = logging.getLogger(__name__)

RECORD = "tgol_evaluate.json"
SHARD_SIZE = 64
FEATURES = "feature_spread"
_OWN = ("prompt", "seed", "image_index", *MEASURES, *SPREADS, "thumbnail", "preview")


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
    """
    What is compared, and the folder where it is done.

    `output_dir/images/MODEL` holds the images as [`generate_dataset`] writes them, `output_dir/results/MODEL` one
    row an image with scores, measures and small copies, both as Parquet shards. A shard that is there is not made
    again, so the same call continues after a kill, and any number of processes share the work.

    Args:
        output_dir (`Path`):
            Made if missing.
        models (`Mapping[str, str | None]`):
            Name of a model, fit for a folder, to its adapter, a folder or Hub id; `None` for the base model, which
            comes first.
        prompts (`Sequence[str]`):
            Prompts.
        images_per_prompt (`int`, *optional*, defaults to 1):
            Images of each prompt, with seeds of their own.
        seed (`int`, *optional*, defaults to 0):
            Seed of the run.
        batch_size (`int`, *optional*):
            Images a call of the pipeline; the default of [`generate_dataset`] otherwise.
        shard_size (`int`, *optional*, defaults to 64):
            Images a shard; rounded up to whole batches.
        model (`str`, *optional*, defaults to `""`):
            Name of the base model, written in every row of images.
        sampling (`Mapping[str, Any]`, *optional*):
            `num_inference_steps`, `guidance_scale`, `height`, `width` and whatever else [`generate_dataset`] takes.
    """

    output_dir: Path
    models: Mapping[str, str | None]
    prompts: Sequence[str]
    images_per_prompt: int = 1
    seed: int = 0
    batch_size: int | None = None
    shard_size: int = SHARD_SIZE
    model: str = ""
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def shards(self) -> dict[str, Shards]:
        """The shards of results of each model; made when first asked for, which claims the folder."""
        if self.images_per_prompt < 1 or self.shard_size < 1 or (self.batch_size or 1) < 1:
            raise DataError("`images_per_prompt`, `batch_size` and `shard_size` must be at least 1.")
        batch = self.batch_size or 1
        digest = hashlib.blake2b("\0".join(self.prompts).encode(), digest_size=16).hexdigest()
        settings = {
            "model": self.model,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "images_per_prompt": self.images_per_prompt,
            "prompts_blake2b": digest,
            **self.sampling,
        }
        count, size = len(self.prompts) * self.images_per_prompt, -(-self.shard_size // batch) * batch
        return {
            name: Shards(
                self.output_dir / "results" / name,
                *(count, size, RECORD),
                {**settings, "adapter": adapter, "weights_blake2b": weights_digest(adapter)},
            )
            for name, adapter in self.models.items()
        }

    def images(self, name: str, shard: int) -> Path:
        """Return the file of images of a shard."""
        return self.output_dir / "images" / name / "data" / self.shards[name].path(shard).name

    def incomplete(self, columns: Sequence[str], share: tuple[int, int] = (0, 1)) -> Iterator[tuple[str, int]]:
        """Yield (model, shard) of a process's share whose results lack one of the columns."""
        for name, shards in self.shards.items():
            for shard in shards.share(*share):
                path = shards.path(shard)
                if not path.exists() or not set(columns) <= set(pyarrow.parquet.read_schema(path).names):
                    yield name, shard

    def generate(
        self,
        load: Callable[[str | None], tuple[Any, str | None]],
        wanted: Sequence[tuple[str, int]],
        *,
        progress: bool = True,
    ) -> None:
        """
        Make the images that are missing.

        Args:
            load (`Callable`):
                Takes an adapter, or `None` for the base model, and returns the pipeline and the model's revision.
                Called once a model that lacks images.
            wanted (`Sequence[tuple[str, int]]`):
                (model, shard) of the results that are to be made.
            progress (`bool`, *optional*, defaults to `True`):
                Show a bar over all images that are missing.
        """
        missing = [(name, shard) for name, shard in wanted if not self.images(name, shard).exists()]
        total = sum(len(self.shards[name].rows(shard)) for name, shard in missing)
        with tqdm(total=total, desc="Generating", unit="image", disable=not (progress and total)) as bar:
            for name, adapter in self.models.items():
                mine = [shard for other, shard in missing if other == name]
                if not mine:
                    continue
                pipeline, revision = load(adapter)
                for shard in mine:
                    generate_dataset(
                        pipeline,
                        self.prompts,
                        self.output_dir / "images" / name,
                        model=self.model,
                        revision=revision,
                        adapter=adapter,
                        images_per_prompt=self.images_per_prompt,
                        seed=self.seed,
                        shard_size=self.shards[name].shard_size,
                        share=(shard, self.shards[name].num_shards),  # this shard and no other
                        progress=False,
                        **({} if self.batch_size is None else {"batch_size": self.batch_size}),
                        **self.sampling,
                    )
                    bar.update(len(self.shards[name].rows(shard)))
                del pipeline
                _free_memory()

    def score(
        self,
        rewards: Mapping[str, Callable[[], RewardFunction]],
        wanted: Sequence[tuple[str, int]],
        *,
        features: Callable[[list[Image.Image]], Any] | None = None,
        one_at_a_time: bool = False,
        keep_images: bool = True,
        progress: bool = True,
        **options: Any,
    ) -> None:
        """
        Score and measure the images, and write the rows of the results.

        Args:
            rewards (`Mapping[str, Callable]`):
                Name of a score to a function without arguments that loads its reward, called once, when it is needed.
            wanted (`Sequence[tuple[str, int]]`):
                (model, shard) of the results that are to be made.
            features (`Callable`, *optional*):
                `(images) -> (n, D)` array or tensor, for the spread of features across seeds; of a video, the middle
                frame is taken.
            one_at_a_time (`bool`, *optional*, defaults to `False`):
                Keep one reward in memory at a time.
            keep_images (`bool`, *optional*, defaults to `True`):
                Keep the images; else each shard of them is deleted when its results are written.
            progress (`bool`, *optional*, defaults to `True`):
                Show a bar over all images, and rewards where these take turns.
            options (`Any`):
                Further arguments of [`score_dataset`].
        """
        groups = [[name] for name in rewards] if one_at_a_time else [list(rewards)]
        total = len(groups) * sum(len(self.shards[name].rows(shard)) for name, shard in wanted)
        with tqdm(total=total, desc="Scoring", unit="image", disable=not (progress and total)) as bar:
            for group in groups:
                loaders = {name: functools.cache(rewards[name]) for name in group}
                for name, shard in wanted:
                    scored = set(_names(self.shards[name].path(shard)))
                    missing = {column: load for column, load in loaders.items() if column not in scored}
                    if missing:
                        self._score_shard(name, shard, missing, options)
                    bar.update(len(self.shards[name].rows(shard)))
                del loaders
                if one_at_a_time:
                    _free_memory()
        for name, shard in wanted:
            self._finish(name, shard, features, keep_images)

    def _work(self, name: str, shard: int) -> Path:
        return self.shards[name].folder / ".work" / f"{shard:05d}"

    def _score_shard(
        self, name: str, shard: int, rewards: Mapping[str, Callable[[], RewardFunction]], options: dict[str, Any]
    ) -> None:
        """Score one shard in a folder of its own, where a kill loses one reward at most."""
        rows = datasets.Dataset(pyarrow.parquet.read_table(self.images(name, shard)))
        visual = "video" if "video" in rows.column_names else "image"
        # Nothing but what is scored: the names of rewards are free then.
        rows = rows.select_columns(["prompt", visual])
        for column, load in rewards.items():
            score_dataset(
                rows,
                {column: load},
                self._work(name, shard) / column,
                shard_size=len(rows),
                share=(0, 1),
                progress=False,
                **options,
            )

    def _finish(self, name: str, shard: int, features: Callable[[list[Image.Image]], Any] | None, keep: bool) -> None:
        """Bring together what is known of a shard, then delete what it was made from."""
        path, shards = self.images(name, shard), self.shards[name]
        images = pyarrow.parquet.read_table(path)
        visual = "video" if "video" in images.column_names else "image"
        content: dict[str, list[Any]] = {
            "prompt": images["prompt"].to_pylist(),
            "seed": images["seed"].to_pylist(),
            "image_index": images[f"{visual}_index"].to_pylist(),
        }
        if shards.path(shard).exists():
            before = pyarrow.parquet.read_table(shards.path(shard))
            content |= {column: before[column].to_pylist() for column in before.column_names if column not in _OWN}
        facts: dict[str, Any] = {}
        for folder in sorted(self._work(name, shard).glob("*")):
            scored = pyarrow.parquet.read_table(next((folder / "data").glob("*.parquet")))
            for column in scored.column_names:
                if column not in ("prompt", visual):
                    content[column] = scored[column].to_pylist()
            facts |= read_rewards(folder)
        content |= _looked_at(images[visual].to_pylist(), visual, features)
        kinds = {"prompt": "string", "seed": "int64", "image_index": "int64", "thumbnail": "binary"}
        kinds |= {"preview": "binary", SPREAD: "binary"}
        types = {column: datasets.Value(kinds.get(column, "float64")) for column in content}
        if FEATURES in content:
            types[FEATURES] = datasets.List(datasets.Value("float32"))  # type: ignore[assignment]
        shards.write(shard, datasets.Dataset.from_dict(content, features=datasets.Features(types)))
        note_rewards(shards.folder, facts)
        shutil.rmtree(self._work(name, shard), ignore_errors=True)
        if not keep:
            path.unlink(missing_ok=True)

    def rows(self, name: str, scores: Sequence[str], trained: frozenset[str] | None) -> ModelRows:
        """
        Read the results of a model, all shards of which are there.

        Args:
            name (`str`):
                Which model.
            scores (`Sequence[str]`):
                Columns of scores.
            trained (`frozenset[str]`, *optional*):
                As [`ModelRows`] has it.

        Returns:
            [`ModelRows`]
        """
        known = set(_names(self.shards[name].path(0)))
        measures = [measure for measure in MEASURES if measure in known]
        spreads = [spread for spread in SPREADS if spread in known]
        table = self._read(name, [*scores, *measures, *spreads])
        descriptors = {
            spread: [None if value is None else _descriptor(value) for value in table[spread]] for spread in spreads
        }
        return ModelRows(
            name,
            {score: table[score] for score in scores},
            {measure: table[measure] for measure in measures},
            descriptors,
            trained,
        )

    def gallery(self, categories: Sequence[str] | None) -> Gallery:
        """
        Return the small copies of all images; the larger ones are read when they are asked for.

        Args:
            categories (`Sequence[str]`, *optional*):
                One a prompt.

        Returns:
            [`Gallery`]
        """
        first = next(iter(self.models))
        facts = self._read(first, ["prompt", "image_index"])
        per_row = [category for category in categories or () for _ in range(self.images_per_prompt)]
        return Gallery(
            facts["prompt"],
            facts["image_index"],
            [self._read(name, ["thumbnail"])["thumbnail"] for name in self.models],
            [_Previews(self.shards[name]) for name in self.models],
            per_row or None,
        )

    def reward_facts(self) -> dict[str, dict[str, Any]]:
        """Return model, revision and scale of each reward that was computed here."""
        found: dict[str, dict[str, Any]] = {}
        for shards in self.shards.values():
            found |= read_rewards(shards.folder)
        return found

    def score_columns(self, rewards: Sequence[str]) -> list[str]:
        """Return the columns of the given rewards, among them those that a reward adds under longer names."""
        first = self.shards[next(iter(self.models))]
        columns = [column for column in _names(first.path(0)) if column not in _OWN]
        return [
            column
            for reward in rewards
            for column in columns
            if column == reward or (column.startswith(f"{reward}_") and column not in rewards)
        ]

    def _read(self, name: str, columns: Sequence[str]) -> dict[str, list[Any]]:
        content: dict[str, list[Any]] = {column: [] for column in columns}
        shards = self.shards[name]
        for shard in range(shards.num_shards):
            table = pyarrow.parquet.read_table(shards.path(shard), columns=list(columns))
            for column in columns:
                content[column] += table[column].to_pylist()
        return content


class _Previews(Sequence):  # type: ignore[type-arg]
    """The larger images of a model, of which one shard at a time is in memory."""

    def __init__(self, shards: Shards) -> None:
        self.shards = shards
        self.loaded: tuple[int, list[bytes | None]] = (-1, [])

    def __len__(self) -> int:
        return self.shards.num_rows

    def __getitem__(self, row: Any) -> Any:
        if not 0 <= row < len(self):
            raise IndexError(row)
        shard, place = divmod(row, self.shards.shard_size)
        if self.loaded[0] != shard:
            table = pyarrow.parquet.read_table(self.shards.path(shard), columns=["preview"])
            self.loaded = (shard, table["preview"].to_pylist())
        return self.loaded[1][place]


def _looked_at(
    values: Sequence[Any], visual: str, features: Callable[[list[Image.Image]], Any] | None
) -> dict[str, list[Any]]:
    """Return measures, descriptors and small copies of images or videos; `None` for what cannot be opened."""
    content: dict[str, list[Any]] = {"thumbnail": [], "preview": [], SPREAD: []}
    content |= {name: [] for name in MEASURES if name != "motion" or visual == "video"}
    middles: list[Image.Image | None] = []
    for value in values:
        frames = _frames(value, visual)
        measured = measure_image(frames) if frames else {}
        for name in content.keys() & set(MEASURES):
            content[name].append(measured.get(name))
        content[SPREAD].append(pixel_descriptor(frames).tobytes() if frames else None)
        content["thumbnail"].append(encode_thumbnail(frames) if frames else None)
        content["preview"].append(encode_preview(frames) if frames else None)
        middles.append(frames[len(frames) // 2] if frames and features is not None else None)
    if features is not None:
        good = [image for image in middles if image is not None]
        found = np.asarray(_to_numpy(features(good)), dtype=np.float32).tolist() if good else []
        places = iter(found)
        content[FEATURES] = [None if image is None else next(places) for image in middles]
    return content


def _frames(value: Any, visual: str) -> list[Image.Image]:
    try:
        if visual == "image":
            return [open_image(value).convert("RGB")]
        frames = read_video(value, None, lambda frame: frame)
    except (ImageError, VideoError):
        return []
    places = np.linspace(0, len(frames) - 1, min(len(frames), MEASURED_FRAMES)).round().astype(int)
    return [frames[place] for place in places]


def _to_numpy(values: Any) -> Any:
    return values.detach().float().cpu().numpy() if hasattr(values, "detach") else values


def _descriptor(value: Any) -> np.ndarray:
    return np.frombuffer(value, dtype=np.uint8) if isinstance(value, bytes) else np.asarray(value, dtype=np.float32)


def _names(path: Path) -> list[str]:
    return pyarrow.parquet.read_schema(path).names if path.exists() else []


def _free_memory() -> None:
    gc.collect()
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def run_evaluation(
    job: EvaluationJob,
    load: Callable[[str | None], tuple[Any, str | None]],
    rewards: Mapping[str, Callable[[], RewardFunction]],
    *,
    features: Callable[[], Callable[[list[Image.Image]], Any]] | None = None,
    share: tuple[int, int] | None = None,
    **options: Any,
) -> int:
    """
    Do this process's share of an evaluation.

    Args:
        job ([`EvaluationJob`]):
            What is compared.
        load (`Callable`):
            As in [`EvaluationJob.generate`].
        rewards (`Mapping[str, Callable]`):
            As in [`EvaluationJob.score`].
        features (`Callable`, *optional*):
            Loads the features for [`EvaluationJob.score`], when they are needed.
        share (`tuple[int, int]`, *optional*):
            Number of this process and how many there are; by default those of the environment ([`process_share`]).
        options (`Any`):
            Further arguments of [`EvaluationJob.score`].

    Returns:
        `int`: shards that other processes are still to complete; whoever finds none writes the report.

    Raises:
        DataError: for numbers out of range, or an `output_dir` begun with other settings.
    """
    columns = ["thumbnail", *rewards, *([FEATURES] if features is not None else [])]
    wanted = list(job.incomplete(columns, share or process_share()))
    job.generate(load, wanted, progress=options.get("progress", True))
    if wanted:
        job.score(rewards, wanted, features=features() if features is not None else None, **options)
    return len(list(job.incomplete(columns)))
