"""Prompts to a dataset of pictures, each from a seed of its own, in shards that survive a kill."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from tgol_trainer.data import DataError
from tgol_trainer.evaluation import generate_images

from .shards import Shards, process_share

RECORD = "tgol_generate.json"
SAMPLING = ("num_inference_steps", "guidance_scale", "height", "width")

FEATURES = {
    "prompt": datasets.Value("string"),
    "image": datasets.Image(),
    "seed": datasets.Value("int64"),
    "image_index": datasets.Value("int64"),
    "model": datasets.Value("string"),
    "revision": datasets.Value("string"),
    "adapter": datasets.Value("string"),
    "settings": datasets.Value("string"),
}


def image_seed(seed: int, prompt: str, index: int) -> int:
    """
    Return the seed of one picture: a hash of the run's seed, the prompt and the number of the picture.

    It depends on nothing else, so more prompts, more pictures a prompt or another order leave it as it is.

    Args:
        seed (`int`):
            Seed of the run.
        prompt (`str`):
            The prompt.
        index (`int`):
            Number of the picture among those of this prompt, from 0.

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
    shard_size: int = 256,
    batch_size: int = 8,
    share: tuple[int, int] | None = None,
    progress: bool = True,
    **sampling: Any,
) -> list[Path]:
    """
    Make `images_per_prompt` pictures of every prompt and write them as Parquet shards.

    The same arguments give the same pictures whatever the number of processes, starts or kills: each picture has its
    own seed ([`image_seed`]) and the batches of a shard are the same wherever it is made. A shard that exists is not
    made again.

    Args:
        pipeline (`DiffusionPipeline`):
            Any text-to-image pipeline, its adapter loaded.
        prompts (`Sequence[str]`):
            Prompts, in order; a prompt that stands twice gets twice the pictures, all different.
        output_dir (`str` or `Path`):
            Holds `data/train-*.parquet` and `tgol_generate.json`; `datasets.load_dataset(output_dir)` reads it.
        model (`str`):
            Name of the model, written in every row.
        revision (`str`, *optional*):
            Its revision, written in every row.
        adapter (`str`, *optional*):
            Name of the adapter, written in every row.
        images_per_prompt (`int`, *optional*, defaults to 1):
            Pictures a prompt.
        seed (`int`, *optional*, defaults to 0):
            Seed of the run.
        shard_size (`int`, *optional*, defaults to 256):
            Pictures a shard, which is what a kill can lose; rounded up to whole batches.
        batch_size (`int`, *optional*, defaults to 8):
            Pictures a call of the pipeline. Part of the settings: another moves pixels by up to a grey level.
        share (`tuple[int, int]`, *optional*):
            Number of this process and how many there are; by default those of the environment ([`process_share`]).
        progress (`bool`, *optional*, defaults to `True`):
            Show a bar with rate and time left, over this process's pictures.
        sampling (`Any`):
            `num_inference_steps`, `guidance_scale`, `height` and `width` of [`generate_images`].

    Returns:
        `list[Path]`: the shards of this process.

    Raises:
        DataError: for no or blank prompts, numbers below 1, or an `output_dir` begun with other settings.
    """
    _check(prompts, images_per_prompt, batch_size)
    options = _options(sampling)
    facts = {"model": model, "revision": revision, "adapter": adapter}
    settings = {"seed": seed, "batch_size": batch_size, **options}
    digest = hashlib.blake2b("\0".join(prompts).encode(), digest_size=16).hexdigest()
    shards = Shards(
        Path(output_dir),
        len(prompts) * images_per_prompt,
        -(-shard_size // batch_size) * batch_size if shard_size > 0 else shard_size,
        RECORD,
        {**facts, **settings, "images_per_prompt": images_per_prompt, "prompts_blake2b": digest},
    )
    mine = list(shards.share(*(share or process_share())))
    numbered = _numbered(prompts, images_per_prompt)
    with _bar(shards, mine, progress) as bar:
        for shard in (shard for shard in mine if not shards.path(shard).exists()):
            rows = [numbered[row] for row in shards.rows(shard)]
            seeds = [image_seed(seed, prompt, index) for prompt, index in rows]
            images = _drawn(pipeline, rows, seeds, batch_size, options, bar)
            shards.write(shard, _table(rows, images, seeds, {**facts, "settings": json.dumps(settings)}))
    return [shards.path(shard) for shard in mine]


def _options(sampling: dict[str, Any]) -> dict[str, Any]:
    unknown = sampling.keys() - set(SAMPLING)
    if unknown:
        raise TypeError(f"`{sorted(unknown)[0]}` is no argument; sampling takes {', '.join(SAMPLING)}.")
    return {name: sampling.get(name) for name in SAMPLING}


def _check(prompts: Sequence[str], images_per_prompt: int, batch_size: int) -> None:
    blank = [row for row, prompt in enumerate(prompts) if not prompt.strip()]
    if not prompts or blank:
        cause = f"prompts {blank[:5]} of {len(prompts)} are blank (counted from 0)" if blank else "there are none"
        raise DataError(f"`prompts`: {cause}. Give one text a picture.")
    if images_per_prompt < 1 or batch_size < 1:
        raise DataError(
            f"`images_per_prompt` is {images_per_prompt} and `batch_size` {batch_size}; both must be at least 1."
        )


def _drawn(
    pipeline: Any, rows: list[tuple[str, int]], seeds: list[int], batch_size: int, options: dict[str, Any], bar: tqdm
) -> list[Any]:
    """Return the pictures of one shard, in batches that begin with it."""
    images = []
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        texts = [prompt for prompt, _ in rows[part]]
        images += generate_images(pipeline, texts, seeds[part], batch_size=batch_size, progress=False, **options)
        bar.update(len(texts))
    return images


def _numbered(prompts: Sequence[str], images_per_prompt: int) -> list[tuple[str, int]]:
    """Return (prompt, number of the picture) of every row; repeats of a prompt count on."""
    used: dict[str, int] = {}
    rows = []
    for prompt in prompts:
        first = used.get(prompt, 0)
        used[prompt] = first + images_per_prompt
        rows += [(prompt, index) for index in range(first, first + images_per_prompt)]
    return rows


def _table(
    rows: list[tuple[str, int]], images: list[Any], seeds: list[int], facts: dict[str, str | None]
) -> datasets.Dataset:
    columns = {
        "prompt": [prompt for prompt, _ in rows],
        "image": images,
        "seed": seeds,
        "image_index": [index for _, index in rows],
        **{name: [value] * len(rows) for name, value in facts.items()},
    }
    return datasets.Dataset.from_dict(columns, features=datasets.Features(FEATURES))


def _bar(shards: Shards, mine: list[int], progress: bool) -> tqdm:
    done = sum(len(shards.rows(shard)) for shard in mine if shards.path(shard).exists())
    total = sum(len(shards.rows(shard)) for shard in mine)
    return tqdm(total=total, initial=done, desc="Generating", unit="image", disable=not progress)
