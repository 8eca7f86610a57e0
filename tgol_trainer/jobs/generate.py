"""Prompts to a dataset of images or videos, each from a seed of its own, in shards that survive a kill."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from tgol_trainer.data import DataError, encode_video
from tgol_trainer.evaluation import generate_images, generate_videos, makes_videos
from tgol_trainer.sources.shards import GENERATED

from .shards import Shards, process_share, weights_digest

SAMPLING = ("num_inference_steps", "guidance_scale", "height", "width")


@dataclasses.dataclass(frozen=True)
class _Medium:
    """What is made: its name, the feature that holds it, and how many by default."""

    name: str
    feature: Any
    shard_size: int
    batch_size: int


_IMAGE = _Medium("image", datasets.Image(), 256, 8)
# Undecoded, since the decoder of `datasets` is another package; a clip takes minutes and megabytes.
_VIDEO = _Medium("video", datasets.Video(decode=False), 8, 1)


def image_seed(seed: int, prompt: str, index: int) -> int:
    """
    Return the seed of one image: a hash of the run's seed, the prompt and the number of the image.

    It depends on nothing else, so more prompts, more images a prompt or another order leave it as it is.

    Args:
        seed (`int`):
            Seed of the run.
        prompt (`str`):
            The prompt.
        index (`int`):
            Number of the image among those of this prompt, from 0.

    Returns:
        `int`: in 0..2**63 - 1.
    """
    digest = hashlib.blake2b(f"{seed}\0{index}\0{prompt}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generate_dataset(
    pipeline: Any,
    prompts: Sequence[str],
    output_dir: str | Path,
    *,
    model: str,
    revision: str | None = None,
    adapter: str | None = None,
    images_per_prompt: int = 1,
    seed: int = 0,
    shard_size: int | None = None,
    batch_size: int | None = None,
    fps: int = 16,
    share: tuple[int, int] | None = None,
    progress: bool = True,
    **sampling: Any,
) -> list[Path]:
    """
    Make `images_per_prompt` images, or videos with a pipeline of videos, of every prompt and write Parquet shards.

    A video is an MP4 file in the column `video`, without loss ([`encode_video`]), beside its `fps` and `num_frames`.
    The same arguments give the same images whatever the number of processes, starts or kills: each image has its
    own seed ([`image_seed`]) and the batches of a shard are the same wherever it is made. A shard that exists is not
    made again.

    Args:
        pipeline (`DiffusionPipeline`):
            Any text-to-image or text-to-video pipeline, its adapter loaded.
        prompts (`Sequence[str]`):
            Prompts, in order; a prompt that stands twice gets twice the images, all different.
        output_dir (`str` or `Path`):
            Holds `data/train-*.parquet` and `tgol_generate.json`; `datasets.load_dataset(output_dir)` reads it.
        model (`str`):
            Name of the model, written in every row.
        revision (`str`, *optional*):
            Its revision, written in every row.
        adapter (`str`, *optional*):
            Its name, written in every row. Other weights in the same folder do not continue what these began.
        images_per_prompt (`int`, *optional*, defaults to 1):
            Images a prompt.
        seed (`int`, *optional*, defaults to 0):
            Seed of the run.
        shard_size (`int`, *optional*):
            Images a shard, which a kill can lose; rounded up to whole batches. 256 by default, 8 of videos.
        batch_size (`int`, *optional*):
            Images a call of the pipeline. Part of the settings: another moves pixels by up to a grey level. 8 by
            default, 1 of videos.
        fps (`int`, *optional*, defaults to 16):
            Frames a second of a video; 16 is Wan 2.1's.
        share (`tuple[int, int]`, *optional*):
            Number of this process and how many there are; by default those of the environment ([`process_share`]).
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar with rate and time left, over this process's images.
        sampling (`Any`):
            `num_inference_steps`, `guidance_scale`, `height`, `width` and, of videos, `num_frames`.

    Returns:
        `list[Path]`: the shards of this process.

    Raises:
        DataError: for no or blank prompts, numbers below 1, or an `output_dir` begun with other settings.
        TypeError: for an argument that is none of these, as `num_frames` is to a pipeline of images.
    """
    medium = _VIDEO if makes_videos(pipeline) else _IMAGE
    batch_size = medium.batch_size if batch_size is None else batch_size
    shard_size = medium.shard_size if shard_size is None else shard_size
    _check(prompts, images_per_prompt=images_per_prompt, batch_size=batch_size, fps=fps)
    options = _options(sampling, medium)
    facts = {"model": model, "revision": revision, "adapter": adapter}
    settings = {"seed": seed, "batch_size": batch_size, **options, **({"fps": fps} if medium is _VIDEO else {})}
    shards = _shards(Path(output_dir), prompts, images_per_prompt, shard_size, {**facts, **settings})
    mine, numbered = list(shards.share(*(share or process_share()))), _numbered(prompts, images_per_prompt)
    with _bar(shards, mine, medium, progress) as bar:
        for shard in (shard for shard in mine if not shards.path(shard).exists()):
            rows = [numbered[row] for row in shards.rows(shard)]
            seeds = [image_seed(seed, prompt, index) for prompt, index in rows]
            draw = _drawn if medium is _IMAGE else partial(_drawn_videos, fps=fps)
            made = draw(pipeline, rows, seeds, batch_size, options, bar)
            shards.write(shard, _table(rows, made, seeds, medium, {**facts, "settings": json.dumps(settings)}))
    return [shards.path(shard) for shard in mine]


def _shards(
    folder: Path, prompts: Sequence[str], images_per_prompt: int, shard_size: int, settings: dict[str, Any]
) -> Shards:
    digest = hashlib.blake2b("\0".join(prompts).encode(), digest_size=16).hexdigest()
    settings = {**settings, "images_per_prompt": images_per_prompt, "prompts_blake2b": digest}
    settings["weights_blake2b"] = weights_digest(settings["adapter"])
    batch_size = settings["batch_size"]
    whole = -(-shard_size // batch_size) * batch_size if shard_size > 0 else shard_size
    return Shards(folder, len(prompts) * images_per_prompt, whole, GENERATED, settings)


def _options(sampling: dict[str, Any], medium: _Medium) -> dict[str, Any]:
    known = SAMPLING if medium is _IMAGE else (*SAMPLING, "num_frames")
    unknown = sampling.keys() - set(known)
    if unknown:
        raise TypeError(f"`{sorted(unknown)[0]}` is no argument; sampling of {medium.name}s takes {', '.join(known)}.")
    return {name: sampling.get(name) for name in known}


def _check(prompts: Sequence[str], **numbers: int) -> None:
    blank = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
    if not prompts or blank:
        cause = f"prompts {blank[:5]} of {len(prompts)} are blank (counted from 0)" if blank else "there are none"
        raise DataError(f"`prompts`: {cause}. Give one text an image.")
    for name, number in numbers.items():
        if number < 1:
            raise DataError(f"`{name}` is {number}; it must be at least 1.")


def _drawn(
    pipeline: Any, rows: list[tuple[str, int]], seeds: list[int], batch_size: int, options: dict[str, Any], bar: tqdm
) -> dict[str, list[Any]]:
    """Return the images of one shard, in batches that begin with it."""
    images = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        texts = [prompt for prompt, _ in rows[part]]
        images += generate_images(pipeline, texts, seeds[part], batch_size=batch_size, progress=False, **options)
        bar.update(len(texts))
    return {"image": images}


def _drawn_videos(
    pipeline: Any,
    rows: list[tuple[str, int]],
    seeds: list[int],
    batch_size: int,
    options: dict[str, Any],
    bar: tqdm,
    *,
    fps: int,
) -> dict[str, list[Any]]:
    """Return the columns of one shard of videos, each encoded as soon as it is there: frames are large."""
    made: dict[str, list[Any]] = {"video": [], "fps": [], "num_frames": []}
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        texts = [prompt for prompt, _ in rows[part]]
        videos = generate_videos(pipeline, texts, seeds[part], batch_size=batch_size, progress=False, **options)
        made["video"] += [{"bytes": encode_video(frames, fps), "path": None} for frames in videos]
        made["fps"] += [float(fps)] * len(videos)
        made["num_frames"] += [len(frames) for frames in videos]
        bar.update(len(texts))
    return made


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
    columns = {
        "prompt": [prompt for prompt, _ in rows],
        **made,
        "seed": seeds,
        f"{medium.name}_index": [index for _, index in rows],
        **{name: [value] * len(rows) for name, value in facts.items()},
    }
    kinds = {"prompt": "string", "fps": "float64", "num_frames": "int64", "seed": "int64"}
    kinds |= {f"{medium.name}_index": "int64", **dict.fromkeys(facts, "string")}
    features = {name: medium.feature if name == medium.name else datasets.Value(kinds[name]) for name in columns}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _bar(shards: Shards, mine: list[int], medium: _Medium, progress: bool) -> tqdm:
    done = sum(len(shards.rows(shard)) for shard in mine if shards.path(shard).exists())
    total = sum(len(shards.rows(shard)) for shard in mine)
    return tqdm(total=total, initial=done, desc="Generating", unit=medium.name, disable=not progress)
