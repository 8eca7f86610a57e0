"""Generate, score and measure images of a base model and its adapters on the same prompts and seeds, in shards."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
import torch
from PIL import Image
from tqdm.auto import tqdm

from tgol_trainer._spacing import evenly_spaced
from tgol_trainer.data import DataError, ImageError, VideoError, open_image, read_video
from tgol_trainer.evaluation import (
    MEASURES,
    SPREADS,
    Gallery,
    ModelRows,
    encode_preview,
    encode_thumbnail,
    makes_videos,
    measure_image,
    pixel_descriptor,
)
from tgol_trainer.evaluation.measures import MEASURED_FRAMES, SPREAD
from tgol_trainer.sources.shards import read_rewards

from .generate import IMAGE_BATCH_SIZE, GenerationSettings, generate_dataset, whole_batches
from .score import Loaders, ScoringSettings, check_medium, free_memory, note_rewards, rewards_in_turn, score_one_shard
from .shards import Shards, process_share, prompts_digest, weights_digest

RECORD = "tgol_evaluate.json"
SHARD_SIZE = 64
FEATURES = "feature_spread"
_OWN = ("prompt", "seed", "image_index", *MEASURES, *SPREADS, "thumbnail", "preview")

LoadPipeline = Callable[[str | None], tuple[Any, str | None]]
ImageFeatures = Callable[[list[Image.Image]], Any]


@dataclasses.dataclass(frozen=True)
class EvaluationJob:
    """
    The models that are compared, and the folder of their images and results.

    `output_dir/images/MODEL` holds the images as [`generate_dataset`] writes them, `output_dir/results/MODEL` one
    row per image with scores, measures and small copies, both as Parquet shards. A shard that exists is not made
    again, so the same call continues after a kill, and any number of processes share the work.

    Args:
        output_dir (`Path`): Made if missing.
        models (`Mapping[str, str | None]`):
            Name of a model, fit for a folder, to its adapter, a folder or Hub id; `None` for the base model, which
            comes first.
        prompts (`Sequence[str]`): Prompts.
        settings ([`GenerationSettings`], *optional*):
            How the images are generated. `adapter` is filled in for each model; `model` is the base model.
    """

    output_dir: Path
    models: Mapping[str, str | None]
    prompts: Sequence[str]
    settings: GenerationSettings = dataclasses.field(default_factory=GenerationSettings)

    @functools.cached_property
    def shards(self) -> dict[str, Shards]:
        """The shards of results of each model. The first access claims the folder."""
        settings = self.settings
        batch_size = IMAGE_BATCH_SIZE if settings.batch_size is None else settings.batch_size
        shard_size = SHARD_SIZE if settings.shard_size is None else settings.shard_size
        if settings.images_per_prompt < 1 or shard_size < 1 or batch_size < 1:
            raise DataError("`images_per_prompt`, `batch_size` and `shard_size` must be at least 1.")
        record = {
            "model": settings.model,
            "seed": settings.seed,
            "batch_size": settings.batch_size,
            "images_per_prompt": settings.images_per_prompt,
            "prompts_blake2b": prompts_digest(self.prompts),
            **settings.given_sampling(),
        }
        return {
            name: Shards(
                self.output_dir / "results" / name,
                len(self.prompts) * settings.images_per_prompt,
                whole_batches(shard_size, batch_size),
                RECORD,
                {**record, "adapter": adapter, "weights_blake2b": weights_digest(adapter)},
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
                if not set(columns) <= set(_column_names(shards.path(shard))):
                    yield name, shard

    def _count(self, wanted: Sequence[tuple[str, int]]) -> int:
        return sum(self.shards[name].count([shard]) for name, shard in wanted)

    def generate(self, load: LoadPipeline, wanted: Sequence[tuple[str, int]], progress: bool) -> None:
        """Generate the images that are missing for the wanted results, (model, shard) each."""
        missing = [(name, shard) for name, shard in wanted if not self.images(name, shard).exists()]
        total = self._count(missing)
        # What the models make is known when the first is loaded.
        with tqdm(total=total, desc="Generating", unit="sample", disable=not (progress and total)) as bar:
            for name, adapter in self.models.items():
                mine = [shard for other, shard in missing if other == name]
                if not mine:
                    continue
                shards, folder = self.shards[name], self.output_dir / "images" / name
                pipeline, revision = load(adapter)
                bar.unit = "video" if makes_videos(pipeline) else "image"
                settings = dataclasses.replace(
                    self.settings, adapter=adapter, revision=revision, shard_size=shards.shard_size
                )
                for shard in mine:
                    share = (shard, shards.num_shards)  # this shard and no other
                    generate_dataset(pipeline, self.prompts, folder, settings, share=share, progress=False)
                    bar.update(shards.count([shard]))
                del pipeline
                free_memory()

    def score(
        self,
        rewards: Loaders,
        wanted: Sequence[tuple[str, int]],
        settings: ScoringSettings,
        *,
        features: ImageFeatures | None,
        keep_images: bool,
        progress: bool,
    ) -> None:
        """Score and measure the images of one or more wanted results, (model, shard) each; write their rows."""
        total = self._count(wanted) * (len(rewards) if settings.one_at_a_time else 1)
        unit = _visual(_column_names(self.images(*wanted[0])))
        with tqdm(total=total, desc="Scoring", unit=unit, disable=not progress) as bar:
            for loaders in rewards_in_turn(rewards, settings.one_at_a_time):
                for name, shard in wanted:
                    self._score_shard(name, shard, loaders, settings)
                    bar.update(self._count([(name, shard)]))
        for name, shard in wanted:
            self._finish(name, shard, features, keep_images)

    def _work(self, name: str, shard: int) -> Path:
        return self.shards[name].folder / ".work" / f"{shard:05d}"

    def _score_shard(self, name: str, shard: int, loaders: Loaders, settings: ScoringSettings) -> None:
        scored = _column_names(self.shards[name].path(shard))
        missing = {column: load for column, load in loaders.items() if column not in scored}
        if not missing:
            return
        rows = datasets.Dataset(pyarrow.parquet.read_table(self.images(name, shard)))
        # Without the other columns, their names are free for rewards.
        rows = rows.select_columns(["prompt", _visual(rows.column_names)])
        score_one_shard(rows, missing, self._work(name, shard), settings, report=True)

    def _finish(self, name: str, shard: int, features: ImageFeatures | None, keep_images: bool) -> None:
        """Write the results of a shard, then delete what they were made from."""
        path, shards, work = self.images(name, shard), self.shards[name], self._work(name, shard)
        images = pyarrow.parquet.read_table(path)
        visual = _visual(images.column_names)
        content: dict[str, list[Any]] = {
            "prompt": images["prompt"].to_pylist(),
            "seed": images["seed"].to_pylist(),
            "image_index": images[f"{visual}_index"].to_pylist(),
        }
        content |= _columns_except(shards.path(shard), _OWN)
        for file in work.glob("data/*.parquet"):
            content |= _columns_except(file, ("prompt", visual))
        content |= _measured(images[visual].to_pylist(), visual, features)
        kinds = {"prompt": "string", "seed": "int64", "image_index": "int64", "thumbnail": "binary"}
        kinds |= {"preview": "binary", SPREAD: "binary"}
        types: dict[str, Any] = {column: datasets.Value(kinds.get(column, "float64")) for column in content}
        if FEATURES in content:
            types[FEATURES] = datasets.List(datasets.Value("float32"))
        shards.write(shard, datasets.Dataset.from_dict(content, features=datasets.Features(types)))
        note_rewards(shards.folder, read_rewards(work))
        shutil.rmtree(work, ignore_errors=True)
        if not keep_images:
            path.unlink(missing_ok=True)

    def rows(self, name: str, scores: Sequence[str], trained: frozenset[str] | None) -> ModelRows:
        """Read the results of a model, all shards of which exist: the given columns of scores, and all measures."""
        known = set(_column_names(self.shards[name].path(0)))
        table = self._read(name, [*scores, *((MEASURES.keys() | SPREADS.keys()) & known)])
        return ModelRows(
            name,
            {score: table[score] for score in scores},
            {measure: table[measure] for measure in MEASURES if measure in table},
            {spread: [_descriptor(value) for value in table[spread]] for spread in SPREADS if spread in table},
            trained,
            "video" if "motion" in table else "image",  # motion is measured of videos alone, and of each
        )

    def gallery(self, categories: Sequence[str] | None) -> Gallery:
        """Return the small copies of all images, with one category per prompt; larger copies are read when indexed."""
        facts = self._read(next(iter(self.models)), ["prompt", "image_index"])
        per_row = [category for category in categories or () for _ in range(self.settings.images_per_prompt)]
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
        first = self.shards[next(iter(self.models))].path(0)
        columns = [column for column in _column_names(first) if column not in _OWN]
        return [
            column
            for reward in rewards
            for column in columns
            if column == reward or (column.startswith(f"{reward}_") and column not in rewards)
        ]

    def _read(self, name: str, columns: Sequence[str]) -> dict[str, list[Any]]:
        shards = self.shards[name]
        files = [shards.path(shard) for shard in range(shards.num_shards)]
        return pyarrow.concat_tables(pyarrow.parquet.read_table(file, columns=columns) for file in files).to_pydict()


class _Previews(Sequence):  # type: ignore[type-arg]
    """The larger images of a model; one shard at a time is in memory."""

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


def _measured(values: Sequence[Any], visual: str, features: ImageFeatures | None) -> dict[str, list[Any]]:
    """Return measures, descriptors and small copies of images or videos; `None` for one that cannot be opened."""
    measures = [name for name in MEASURES if name != "motion" or visual == "video"]
    content: dict[str, list[Any]] = {name: [] for name in ("thumbnail", "preview", SPREAD, *measures)}
    middles: list[Image.Image | None] = []
    for value in values:
        frames = _frames(value, visual)
        found = measure_image(frames) if frames else {}
        for name in measures:
            content[name].append(found.get(name))
        content[SPREAD].append(pixel_descriptor(frames).tobytes() if frames else None)
        content["thumbnail"].append(encode_thumbnail(frames) if frames else None)
        content["preview"].append(encode_preview(frames) if frames else None)
        middles.append(frames[len(frames) // 2] if frames and features is not None else None)
    if features is not None:
        good = [image for image in middles if image is not None]
        vectors = iter(torch.as_tensor(features(good)).detach().float().tolist() if good else [])
        content[FEATURES] = [None if image is None else next(vectors) for image in middles]
    return content


def _frames(value: Any, visual: str) -> list[Image.Image]:
    """Return an image, or the measured frames of a video; nothing if it cannot be opened."""
    try:
        if visual == "image":
            return [open_image(value).convert("RGB")]
        frames = read_video(value, None, lambda frame: frame)
    except (ImageError, VideoError):
        return []
    return [frames[place] for place in evenly_spaced(len(frames), MEASURED_FRAMES)]


def _descriptor(value: Any) -> np.ndarray | None:
    if value is None:
        return None
    return np.frombuffer(value, dtype=np.uint8) if isinstance(value, bytes) else np.asarray(value, dtype=np.float32)


def _visual(names: Sequence[str]) -> str:
    return "video" if "video" in names else "image"


def _column_names(path: Path) -> list[str]:
    return pyarrow.parquet.read_schema(path).names if path.exists() else []


def _columns_except(path: Path, known: Sequence[str]) -> dict[str, list[Any]]:
    names = [name for name in _column_names(path) if name not in known]
    return pyarrow.parquet.read_table(path, columns=names).to_pydict() if names else {}


def run_evaluation(
    job: EvaluationJob,
    load: LoadPipeline,
    rewards: Loaders,
    settings: ScoringSettings | None = None,
    *,
    features: Callable[[], ImageFeatures] | None = None,
    share: tuple[int, int] | None = None,
    keep_images: bool = True,
    progress: bool = True,
) -> int:
    """
    Do this process's share of an evaluation.

    Args:
        job ([`EvaluationJob`]): The models, prompts and settings of generation.
        load (`Callable`):
            Takes an adapter, or `None` for the base model, and returns the pipeline and the model's revision. Called
            once for each model that lacks images.
        rewards (`Mapping[str, Callable]`):
            Name of a score to a function without arguments that loads its reward, called once, when it is needed.
        settings ([`ScoringSettings`], *optional*):
            Size of batches, mean over frames, and whether rewards are in memory one at a time.
        features (`Callable`, *optional*):
            Loads a function `(images) -> (n, D)` array or tensor, when it is needed, for the spread of features across
            seeds. Of a video, the middle frame is taken.
        share (`tuple[int, int]`, *optional*):
            Number of this process and number of processes; by default from the environment ([`process_share`]).
        keep_images (`bool`, *optional*, defaults to `True`):
            Keep the images; otherwise each shard of images is deleted when its results are written.
        progress (`bool`, *optional*, defaults to `True`): Show bars over the images that are generated and scored.

    Returns:
        `int`: shards that other processes have not completed yet; the process that finds none writes the report.

    Raises:
        DataError: for numbers out of range, an `output_dir` begun with other settings, or, before anything is drawn, a
            reward of images for a pipeline of videos or the other way round.
    """
    columns = ["thumbnail", *rewards, *([FEATURES] if features is not None else [])]
    wanted = list(job.incomplete(columns, share or process_share()))
    settings = settings or ScoringSettings()

    def load_fitting(adapter: str | None) -> tuple[Any, str | None]:
        pipeline, revision = load(adapter)
        check_medium(rewards, makes_videos(pipeline), settings)
        return pipeline, revision

    job.generate(load_fitting, wanted, progress)
    if wanted:
        computed = features() if features is not None else None
        job.score(rewards, wanted, settings, features=computed, keep_images=keep_images, progress=progress)
    return len(list(job.incomplete(columns)))
