"""Fill a store with what is missing in it: shared by processes, in files of bounded size, with a progress bar."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, compress
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from tqdm.auto import tqdm

from .store import TensorStore

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

Encoded: TypeAlias = dict[str, torch.Tensor]
EncodedPrompts: TypeAlias = dict[str, list[torch.Tensor]]
Entry: TypeAlias = Mapping[str, torch.Tensor | list[torch.Tensor]]
"""What is kept for a key: the first of each name."""

_SHARD_BYTES = 256 * 2**20
_SHARD_SECONDS = 60.0
"""What a job that is killed loses at most."""


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
        """Return the processes of a training run; `wait` returns when all of them have called it."""
        return cls(
            process_index=args.process_index,
            world_size=args.world_size,
            local_process_index=args.local_process_index,
            local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", args.world_size)),
            num_loaders=args.dataloader_num_workers,
            progress=not args.disable_tqdm,
            wait=wait,
        )


def fill(
    store: TensorStore,
    keys: np.ndarray,
    make: Callable[[np.ndarray], Iterator[Entry]],
    what: str,
    workers: Workers,
    verb: str = "Encoding",
    batch_size: int = 1,
) -> None:
    """
    Write the entries that are missing: by all processes, then by those of a machine with a disk of its own.

    Args:
        store ([`TensorStore`]): The store.
        keys (`numpy.ndarray`): (N, 2) uint64, all different.
        make (`Callable[[numpy.ndarray], Iterator[dict[str, torch.Tensor]]]`):
            Yields the entries, with a first dimension of 1, for (M,) places in `keys`: whole batches.
        what (`str`): What an entry is made of, for the progress bar: `"image"`.
        workers ([`Workers`]): Processes that share the work.
        verb (`str`, *optional*, defaults to `"Encoding"`): What is done, for the progress bar.
        batch_size (`int`, *optional*, defaults to 1):
            Entries that are made together. They may differ in the last bit with what they are made with, so a batch
            of which anything is missing is made as a whole: a job that was killed goes on with the same batches.

    Raises:
        OSError: if the disk does not hold what is missing.
    """
    shares = [(workers.process_index, workers.world_size)]
    if workers.world_size > workers.local_world_size:
        shares.append((workers.local_process_index, workers.local_world_size))
    for index, count in shares:
        missing = store.missing(keys)
        workers.wait()  # nobody writes before everybody has looked
        share = np.flatnonzero(keys[:, 0] % count == index)  # the same, whatever a process found on the disk
        batches = np.arange(len(share)) // batch_size
        mine = share[np.isin(batches, batches[missing[share]])]
        if mine.size:
            made = compress(make(mine), missing[mine])
            _write(store, keys[mine[missing[mine]]], made, what, workers, f"{verb} {missing.sum()} {what}s")
        workers.wait()
        if missing.any():
            store.refresh()


def _write(
    store: TensorStore,
    keys: np.ndarray,
    made: Iterator[Entry],
    what: str,
    workers: Workers,
    title: str,
) -> None:
    entries: list[Encoded] = []
    start, size, began = 0, 0, time.monotonic()
    hidden = not workers.progress or workers.process_index > 0
    first = next(made)
    _announce(store.folder, title, len(keys) * workers.world_size * store.bytes_of(first), workers)
    for entry in tqdm(chain([first], made), total=len(keys), desc=title, unit=what, disable=hidden):
        entries.append({name: value[0].cpu() for name, value in entry.items()})
        size += store.bytes_of(entry)
        if size >= _SHARD_BYTES or time.monotonic() - began >= _SHARD_SECONDS:
            store.write(keys[start : start + len(entries)], entries)
            start, entries, size, began = start + len(entries), [], 0, time.monotonic()
    if entries:
        store.write(keys[start:], entries)


def _announce(folder: Path, title: str, wanted: int, workers: Workers) -> None:
    """Say what will be written, and refuse what the disk does not hold."""
    free = shutil.disk_usage(folder).free
    if wanted > free:
        raise OSError(
            f"{title} once takes about {_text(wanted)}, and the disk of {folder} has {_text(free)} left. Set "
            "`cache_dir` to a folder on a larger disk, or `cache=False` to encode at each step."
        )
    if workers.process_index == 0:
        logger.info("%s once: about %s in %s.", title, _text(wanted), folder)


def _text(number: float) -> str:
    """Return a number of bytes as a short text."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
