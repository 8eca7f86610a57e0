"""Make a dataset of images or videos from prompts, in shards that survive a kill, with one seed per image."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from tgol_trainer.data import DataError, encode_video
from tgol_trainer.evaluation import generate_images, generate_videos, makes_videos, takes_negative_prompts
from tgol_trainer.families import frame_rate
from tgol_trainer.sources.shards import GENERATED

from .shards import Shards, process_share, prompts_digest, weights_digest

logger = logging.getLogger(__name__)

SAMPLING = ("num_inference_steps", "guidance_scale", "height", "width")
IMAGE_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
    """
    How images or videos are generated, and the facts that are written in every row.

    Args:
        model (`str`, *optional*, defaults to `""`): Name of the model, written in every row.
        revision (`str`, *optional*): Revision of the model, written in every row.
        adapter (`str`, *optional*):
            Folder or Hub id of the adapter, written in every row. Other weights in the same folder do not continue
            what these began.
        images_per_prompt (`int`, *optional*, defaults to 1): Images or videos per prompt.
        seed (`int`, *optional*, defaults to 0): Seed of the run, from which each image gets its own ([`image_seed`]).
        shard_size (`int`, *optional*):
            Images per shard, which a kill can lose; rounded up to whole batches. 256 by default, 8 for videos, and 64
            in an [`EvaluationJob`].
        batch_size (`int`, *optional*):
            Images per call of the pipeline. Another batch size moves pixels by up to a grey level, so it is one of the
            settings that a folder keeps. 8 by default, 1 for videos.
        num_inference_steps (`int`, *optional*):
            Denoising steps. `None` leaves the pipeline's own default, as for the next four.
        guidance_scale (`float`, *optional*): Strength of classifier-free guidance.
        negative_prompt (`str`, *optional*):
            What guidance leads away from, the same for all prompts. Qwen-Image guides only where it is given one.
        height (`int`, *optional*): Height in pixels.
        width (`int`, *optional*): Width in pixels.
        num_frames (`int`, *optional*): Frames of a video; only for a pipeline of videos.
        fps (`int`, *optional*): Frames per second of a video; by default the rate of the model's own.
    """

    model: str = ""
    revision: str | None = None
    adapter: str | None = None
    images_per_prompt: int = 1
    seed: int = 0
    shard_size: int | None = None
    batch_size: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    fps: int | None = None

    def given_sampling(self) -> dict[str, Any]:
        """Return the sampling settings, `fps` among them, that are not left to their default."""
        values = {name: getattr(self, name) for name in (*SAMPLING, "num_frames", "fps", "negative_prompt")}
        return {name: value for name, value in values.items() if value is not None}


def _video_columns(videos: list[Any], fps: int) -> dict[str, list[Any]]:
    return {
        "video": [{"bytes": encode_video(frames, fps), "path": None} for frames in videos],
        "fps": [float(fps)] * len(videos),
        "num_frames": [len(frames) for frames in videos],
    }


@dataclasses.dataclass(frozen=True)
class _Medium:
    """How images or videos are generated and stored."""

    name: str
    generate: Callable[..., list[Any]]
    columns: Callable[[list[Any], int], dict[str, list[Any]]]
    features: dict[str, Any]
    sampling: tuple[str, ...]
    shard_size: int
    batch_size: int


_IMAGE = _Medium(
    "image",
    generate_images,
    lambda images, _: {"image": images},
    {"image": datasets.Image()},
    SAMPLING,
    shard_size=256,
    batch_size=IMAGE_BATCH_SIZE,
)
_VIDEO = _Medium(
    "video",
    generate_videos,
    _video_columns,
    # Not decoded, since the decoder of `datasets` is another package.
    {"video": datasets.Video(decode=False), "fps": datasets.Value("float64"), "num_frames": datasets.Value("int64")},
    (*SAMPLING, "num_frames"),
    shard_size=8,  # a clip takes minutes and megabytes
    batch_size=1,
)


def image_seed(seed: int, prompt: str, index: int) -> int:
    """
    Return the seed of one image, in 0..2**63 - 1: a hash of the run's seed, the prompt and the number of the image
    among the images of this prompt. It does not change with more prompts, more images per prompt or another order.
    """
    digest = hashlib.blake2b(f"{seed}\0{index}\0{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generate_dataset(
    pipeline: Any,
    prompts: Sequence[str],
    output_dir: str | Path,
    settings: GenerationSettings | None = None,
    *,
    share: tuple[int, int] | None = None,
    progress: bool = True,
) -> list[Path]:
    """
    Generate images of every prompt, or videos with a pipeline of videos, and write them as Parquet shards.

    A video is an MP4 file in the column `video`, without loss ([`encode_video`]), beside its `fps` and `num_frames`.
    The same arguments give the same images with any number of processes, starts and kills: each image has its
    own seed ([`image_seed`]), and the batches of a shard are the same wherever it is made. A shard that exists is not
    made again.

    Args:
        pipeline (`DiffusionPipeline`): Any text-to-image or text-to-video pipeline, its adapter loaded.
        prompts (`Sequence[str]`): Prompts, in order; a prompt that stands twice gets twice the images, all different.
        output_dir (`str` or `Path`):
            Holds `data/train-*.parquet` and `tgol_generate.json`; `datasets.load_dataset(output_dir)` reads it.
        settings ([`GenerationSettings`], *optional*):
            Number of images, seed, sampling, sizes of shards and batches, names of the model and the adapter.
        share (`tuple[int, int]`, *optional*):
            Number of this process and number of processes; by default from the environment ([`process_share`]).
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar with rate and time left, over this process's images.

    Returns:
        `list[Path]`: the shards of this process.

    Raises:
        DataError: for no or blank prompts, numbers below 1, or an `output_dir` begun with other settings.
        TypeError: if `num_frames` is given for a pipeline of images, or `negative_prompt` for one that takes none.
    """
    settings = settings or GenerationSettings()
    medium = _VIDEO if makes_videos(pipeline) else _IMAGE
    if settings.num_frames is not None and medium is _IMAGE:
        raise TypeError(f"`num_frames` is given, but {type(pipeline).__name__} makes images. Leave it out.")
    batch_size = medium.batch_size if settings.batch_size is None else settings.batch_size
    fps = frame_rate(pipeline) if settings.fps is None else settings.fps
    _check(prompts, images_per_prompt=settings.images_per_prompt, batch_size=batch_size, fps=fps)
    sampling = {name: getattr(settings, name) for name in medium.sampling} | _negative_prompt(pipeline, settings)
    facts = {name: getattr(settings, name) for name in ("model", "revision", "adapter")}
    recorded = {"seed": settings.seed, "batch_size": batch_size, **sampling}
    recorded |= {"fps": fps} if medium is _VIDEO else {}
    numbered = _numbered(prompts, settings.images_per_prompt)
    shards = Shards(
        Path(output_dir),
        len(numbered),
        whole_batches(medium.shard_size if settings.shard_size is None else settings.shard_size, batch_size),
        GENERATED,
        {
            **facts,
            **recorded,
            "images_per_prompt": settings.images_per_prompt,
            "prompts_blake2b": prompts_digest(prompts),
            "weights_blake2b": weights_digest(settings.adapter),
        },
    )
    mine = shards.share(*(share or process_share()))
    missing = [shard for shard in mine if not shards.path(shard).exists()]
    options = {"batch_size": batch_size, "progress": False, **sampling}
    total = shards.count(mine)
    done, told = total - shards.count(missing), False
    with tqdm(total=total, initial=done, desc="Generating", unit=medium.name, disable=not progress) as bar:
        for shard in missing:
            rows = [numbered[row] for row in shards.rows(shard)]
            seeds = [image_seed(settings.seed, prompt, index) for prompt, index in rows]
            made: dict[str, list[Any]] = {name: [] for name in medium.features}
            for start in range(0, len(rows), batch_size):
                part = slice(start, start + batch_size)
                outputs = medium.generate(pipeline, [prompt for prompt, _ in rows[part]], seeds[part], **options)
                told = told or _tell_of_size(outputs[0], settings, type(pipeline).__name__)
                for name, values in medium.columns(outputs, fps).items():  # encoded at once: frames are large
                    made[name] += values
                bar.update(len(outputs))
            shards.write(shard, _table(rows, made, seeds, medium, {**facts, "settings": json.dumps(recorded)}))
    return [shards.path(shard) for shard in mine]


def _tell_of_size(output: Any, settings: GenerationSettings, pipeline: str) -> bool:
    """Warn where an image, or the first frame of a video, has another size than was asked for; return whether so."""
    width, height = (output[0] if isinstance(output, list) else output).size
    asked = settings.width or width, settings.height or height
    if asked != (width, height):
        logger.warning(
            "%s drew %d×%d pixels (width×height) where %d×%d were asked for: it has sizes of its own. Train at what "
            "was drawn; the recorded settings have what was asked for.",
            *(pipeline, width, height, *asked),
        )
    return asked != (width, height)


def _negative_prompt(pipeline: Any, settings: GenerationSettings) -> dict[str, str]:
    if settings.negative_prompt is None:
        return {}
    if not takes_negative_prompts(pipeline):
        raise TypeError(f"{type(pipeline).__name__} takes no negative prompt: leave `negative_prompt` out.")
    return {"negative_prompt": settings.negative_prompt}


def whole_batches(shard_size: int, batch_size: int) -> int:
    """Return the size of a shard, rounded up to whole batches."""
    return -(-shard_size // batch_size) * batch_size


def _check(prompts: Sequence[str], **numbers: int) -> None:
    blank = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
    if not prompts or blank:
        cause = f"prompts {blank[:5]} of {len(prompts)} are blank (counted from 0)" if blank else "there are none"
        raise DataError(f"`prompts`: {cause}. Give at least one text; none may be blank.")
    for name, number in numbers.items():
        if number < 1:
            raise DataError(f"`{name}` is {number}; it must be at least 1.")


def _numbered(prompts: Sequence[str], images_per_prompt: int) -> list[tuple[str, int]]:
    """Return (prompt, number of the image) of every row; repeats of a prompt count on."""
    used: dict[str, int] = {}
    rows = []
    for prompt in prompts:
        first = used.get(prompt, 0)
        used[prompt] = first + images_per_prompt
        rows += [(prompt, index) for index in range(first, first + images_per_prompt)]
    return rows


def _table(
    rows: list[tuple[str, int]],
    made: dict[str, list[Any]],
    seeds: list[int],
    medium: _Medium,
    facts: dict[str, str | None],
) -> datasets.Dataset:
    text, integer = datasets.Value("string"), datasets.Value("int64")
    features = {"prompt": text, **medium.features, "seed": integer, f"{medium.name}_index": integer}
    features |= dict.fromkeys(facts, text)
    columns = {
        "prompt": [prompt for prompt, _ in rows],
        **made,
        "seed": seeds,
        f"{medium.name}_index": [index for _, index in rows],
        **{name: [value] * len(rows) for name, value in facts.items()},
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))
