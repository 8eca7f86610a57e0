"""Encode the images and prompts of a run once, and keep the result on disk."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from tgol_trainer.data import Collator, ScoredDataset
from tgol_trainer.families import ModelFamily

from .fingerprint import component_fingerprint
from .store import TensorStore, key_of, keys_of

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

Encoded: TypeAlias = dict[str, torch.Tensor]

_VERSION = 1
"""Raise it when the same image or prompt is encoded to something else."""
_SHARD_BYTES = 256 * 2**20
_SHARD_SECONDS = 60.0
"""What a job that is killed loses at most."""
_MIRROR = np.frombuffer(bytearray(key_of("mirrored")), dtype=np.uint64)


@dataclasses.dataclass(frozen=True)
class Workers:
    """
    Who fills a cache.

    Args:
        process_index (`int`, *optional*, defaults to 0): Number of this process.
        world_size (`int`, *optional*, defaults to 1): Number of processes that share the work.
        local_process_index (`int`, *optional*, defaults to 0): Number of this process on its machine.
        local_world_size (`int`, *optional*, defaults to 1): Number of processes on this machine.
        num_loaders (`int`, *optional*, defaults to 0): Processes that decode images for this one.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar on the first process.
        wait (`Callable[[], None]`, *optional*): Returns when every process has called it.
    """

    process_index: int = 0
    world_size: int = 1
    local_process_index: int = 0
    local_world_size: int = 1
    num_loaders: int = 0
    progress: bool = True
    wait: Callable[[], None] = lambda: None

    @classmethod
    def of_run(cls, args: TrainingArguments, wait: Callable[[], None]) -> Workers:
        """Return the processes of a training run."""
        return cls(
            process_index=args.process_index,
            world_size=args.world_size,
            local_process_index=args.local_process_index,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)),
            num_loaders=args.dataloader_num_workers,
            progress=not args.disable_tqdm,
            wait=wait,
        )


class EncodingCache:
    """
    Keep what the autoencoder and the text encoders make of images and prompts in safetensors files.

    An entry is found again by the content of image or prompt, size and preprocessing, and of the networks' weights and
    the tokenizers' files, so it is never stale. Every image and every distinct prompt is encoded by itself, as
    training without a cache does, so both give the same. A job that was killed continues.

    Args:
        family ([`ModelFamily`]): The model that encodes.
        folder (`Path`): Folder of the cache. Runs may share it. It may be deleted between runs.
        collator ([`Collator`]): Turns rows into pixels.
        workers ([`Workers`], *optional*): Processes that share the work.
    """

    def __init__(
        self, family: ModelFamily, folder: Path | str, collator: Collator, workers: Workers | None = None
    ) -> None:
        self.family, self.collator, self.workers = family, collator, workers or Workers()
        self.medium = "image" if collator.num_frames is None else "video"
        pipeline, kind = family.pipeline, type(family).__name__
        autoencoder = component_fingerprint(getattr(pipeline, family.autoencoder_name))
        images = key_of(_VERSION, kind, autoencoder, str(collator.resolution), collator.num_frames or 0)
        self.images = TensorStore(Path(folder) / f"{self.medium}s-{images.hex()}")
        parts = [
            component_fingerprint(component)
            for name, component in pipeline.components.items()
            if name.startswith(("text_encoder", "tokenizer")) and component is not None
        ]
        # Settings of the pipeline itself, such as how SDXL encodes an empty prompt.
        settings = {
            name: value
            for name, value in pipeline.config.items()
            if name not in pipeline.components and not name.startswith("_")
        }
        prompts = key_of(_VERSION, kind, str(family.token_limits), str(sorted(settings.items())), *parts)
        # Wan pads its embeddings with zeros, which need no space.
        self.prompts = TensorStore(Path(folder) / f"prompts-{prompts.hex()}", ragged=("encoder_hidden_states",))

    # ---- Reading ----

    def read_images(self, keys: np.ndarray, mirrored: Sequence[bool]) -> Encoded:
        """
        Return what the autoencoder made of images, on the CPU.

        Args:
            keys (`numpy.ndarray`): (B, 2) uint64, the images' keys; see [`data.ScoredDataset`].
            mirrored (`Sequence[bool]`): B times, whether the mirror image is wanted.

        Returns:
            `dict[str, torch.Tensor]`: B rows, as [`ModelFamily.encode`] returns them.
        """
        return self.images.read(np.where(np.asarray(mirrored)[:, None], keys ^ _MIRROR, keys))

    def read_prompts(self, prompts: Sequence[str]) -> Encoded:
        """Return N rows for N prompts, as [`ModelFamily.encode_prompts`] returns them, on the CPU."""
        return self.prompts.read(keys_of(prompts))

    # ---- Filling ----

    def add(self, rows: ScoredDataset, prompts: Iterable[str], *, mirrored: bool = False) -> None:
        """
        Encode the images of rows, and prompts, as far as they are missing. Every process must call it.

        Args:
            rows ([`ScoredDataset`]): Rows whose images are wanted.
            prompts (`Iterable[str]`): Every prompt that training will ask for.
            mirrored (`bool`, *optional*, defaults to `False`): Encode the mirror image of each image too.

        Raises:
            OSError: if the disk does not hold what is missing.
            DataError: for an image that can no longer be opened.
        """
        family = self.family
        texts = list(dict.fromkeys(prompts))
        keys = keys_of(texts)

        def encode_prompts(wanted: np.ndarray) -> Iterator[Encoded]:
            with family.present(*family.text_encoder_names, alone=True):
                for index in wanted:
                    yield family.encode_prompts([texts[index]])

        self._fill(self.prompts, keys, encode_prompts, "prompt")

        rows = copy.copy(rows)
        rows.encoded = False
        image_keys, first = np.unique(rows.image_keys, axis=0, return_index=True)
        order = np.argsort(first)  # in the order of the rows, which is that on the disk
        image_keys, first = image_keys[order], first[order]

        def encode_images(wanted: np.ndarray, mirror: bool = False) -> Iterator[Encoded]:
            loader = DataLoader(
                Subset(rows, first[wanted].tolist()),
                batch_size=1,
                collate_fn=self.collator,
                num_workers=self.workers.num_loaders,
            )
            with family.present(family.autoencoder_name, alone=True):
                for batch in loader:
                    pixels = batch["pixel_values"]
                    yield family.encode(pixels.flip(-1) if mirror else pixels)

        self._fill(self.images, image_keys, encode_images, self.medium)
        if mirrored:
            mirror = lambda wanted: encode_images(wanted, mirror=True)  # noqa: E731
            self._fill(self.images, image_keys ^ _MIRROR, mirror, f"mirrored {self.medium}")

    def _fill(
        self, store: TensorStore, keys: np.ndarray, encode: Callable[[np.ndarray], Iterator[Encoded]], what: str
    ) -> None:
        """Write the entries that are missing: by all processes, then by those of a machine with a disk of its own."""
        workers = self.workers
        shares = [(workers.process_index, workers.world_size)]
        if workers.world_size > workers.local_world_size:
            shares.append((workers.local_process_index, workers.local_world_size))
        for index, count in shares:
            wanted = np.flatnonzero(store.missing(keys))
            workers.wait()  # nobody writes before everybody has looked
            mine = wanted[index::count]
            if mine.size:
                self._write(store, keys[mine], encode(mine), wanted.size, what)
            workers.wait()
            store.refresh()

    def _write(self, store: TensorStore, keys: np.ndarray, encoded: Iterator[Encoded], total: int, what: str) -> None:
        entries: list[Encoded] = []
        start, size, began = 0, 0, time.monotonic()
        hidden = not self.workers.progress or self.workers.process_index > 0
        for entry in tqdm(encoded, total=len(keys), desc=f"Encoding {what}s", unit=what, disable=hidden):
            if not start and not entries:
                self._announce(store.folder, total, _bytes_of(entry), what)
            entries.append({name: value[0].cpu() for name, value in entry.items()})
            size += _bytes_of(entry)
            if size >= _SHARD_BYTES or time.monotonic() - began >= _SHARD_SECONDS:
                store.write(keys[start : start + len(entries)], entries)
                start, entries, size, began = start + len(entries), [], 0, time.monotonic()
        if entries:
            store.write(keys[start:], entries)

    def _announce(self, folder: Path, number: int, size: int, what: str) -> None:
        """Say what will be written, and refuse what the disk does not hold."""
        wanted, free = number * size, shutil.disk_usage(folder).free
        if wanted > free:
            raise OSError(
                f"Caching {number} {what}s takes up to {_text(wanted)}, and the disk of {folder} has {_text(free)} "
                "left. Set `cache_dir` to a folder on a larger disk, or `cache=False` to encode at each step."
            )
        if self.workers.process_index == 0:
            logger.info("Encoding %d %ss once: up to %s in %s.", number, what, _text(wanted), folder)


def encode_batch(
    family: ModelFamily,
    cache: EncodingCache | None,
    inputs: dict[str, torch.Tensor],
    prompts: list[str],
    mirrored: Sequence[bool],
    resolution: tuple[int, int],
) -> tuple[Encoded, Encoded]:
    """
    Return the conditioning and the encoded images of a batch, from the cache where its rows are in it.

    Args:
        family ([`ModelFamily`]): The model.
        cache ([`EncodingCache`], *optional*): The cache.
        inputs (`dict[str, torch.Tensor]`): A batch of [`data.Collator`].
        prompts (`list[str]`): B prompts.
        mirrored (`Sequence[bool]`): B times, whether the mirror image is wanted.
        resolution (`tuple[int, int]`): (height, width) of the pixels.

    Returns:
        `tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]`: what [`ModelFamily.condition`] and
        [`ModelFamily.encode`] return.
    """
    if cache is not None and "image_key" in inputs:
        encoded = cache.read_images(inputs["image_key"].cpu().numpy().view(np.uint64), mirrored)
        return family.condition(prompts, inputs["geometry"], resolution, cache.read_prompts), encoded
    images = zip(inputs["pixel_values"], mirrored, strict=True)
    encoded = family.encode(torch.stack([image.flip(-1) if mirror else image for image, mirror in images]))
    return family.condition(prompts, inputs["geometry"], resolution), encoded


def _bytes_of(encoded: Encoded) -> int:
    return sum(value.numel() * value.element_size() for value in encoded.values())


def _text(number: float) -> str:
    """Return a number of bytes as a short text."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
