"""Keep the reference's errors on fixed draws, so that a training step needs one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from tgol_trainer.data import Collator, ScoredDataset, decode_prompts

from .filling import Encoded, Workers, fill
from .store import TensorStore, key_of, keys_of

_VERSION = 2
"""Raise it when the same reference and draw give another error."""


class ReferenceErrors:
    """
    Keep the reference's error of each image on a few fixed draws in safetensors files.

    An entry is found again by the content of the image and the prompt, the row, the draw, and `key`.

    Args:
        folder (`Path`): Folder of the cache.
        key (`Sequence[str]`): Everything else that an error depends on: networks, and settings of the draws.
        collator ([`Collator`]): Makes batches.
        workers ([`Workers`], *optional*): Processes that share the work.
    """

    def __init__(
        self, folder: Path | str, key: Sequence[str], collator: Collator, workers: Workers | None = None
    ) -> None:
        self.collator, self.workers = collator, workers or Workers()
        self.store = TensorStore(Path(folder) / f"references-{key_of(_VERSION, *key).hex()}")

    def read(self, inputs: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        """
        Return the reference's errors of a batch.

        Args:
            inputs (`dict[str, torch.Tensor]`): A batch of [`data.Collator`], of rows that were added.
            step (`int`): The step that keys the draw.

        Returns:
            `torch.Tensor`: (B,) float32, on the CPU.
        """
        prompts = decode_prompts(inputs["prompt_bytes"], inputs["prompt_length"])
        images = inputs["image_key"].cpu().numpy().view(np.uint64)
        groups = inputs["group"].tolist() if "group" in inputs else [0] * len(prompts)
        rows = zip(images.tolist(), inputs["resolution"].tolist(), inputs["row_id"].tolist(), groups, strict=True)
        return self.store.read(_keys(rows, prompts, step))["error"]

    def add(
        self,
        rows: ScoredDataset,
        steps: Sequence[int],
        error: Callable[[dict[str, torch.Tensor], int], torch.Tensor],
        batch_size: int,
    ) -> None:
        """
        Compute the errors that are missing. Every process must call it.

        Args:
            rows ([`ScoredDataset`]): Rows that are in the encoding cache.
            steps (`Sequence[int]`): The steps that key the draws.
            error (`Callable[[dict, int], torch.Tensor]`):
                Returns the reference's (B,) float32 errors of a batch on the draw of a step.
            batch_size (`int`): Rows of a batch.
        """
        prompts, number_of_rows = rows.prompts, len(rows)
        groups = rows.group_ids or [0] * number_of_rows
        sizes = [self.collator.resolution] * number_of_rows if rows.resolutions is None else rows.resolutions.tolist()
        facts = list(zip(rows.image_keys.tolist(), map(list, sizes), rows.row_ids.tolist(), groups, strict=True))
        _, size = np.unique(np.array(sizes), axis=0, return_inverse=True)
        parts = [np.flatnonzero(size.reshape(-1) == number) for number in range(int(size.max()) + 1)]
        for number, step in enumerate(steps, 1):
            for part in parts:  # a batch holds images of one size

                def make(wanted: np.ndarray, step: int = step, part: np.ndarray = part) -> Iterator[Encoded]:
                    loader = DataLoader(
                        Subset(rows, part[wanted].tolist()),
                        batch_size=batch_size,
                        collate_fn=self.collator,
                        num_workers=self.workers.num_loaders,
                        generator=torch.Generator(),  # else filling would draw from the global one
                    )
                    for inputs in loader:
                        yield from ({"error": value[None]} for value in error(inputs, step))

                keys = _keys([facts[row] for row in part], [prompts[row] for row in part], step)
                verb = f"Draw {number} of {len(steps)}: computing"
                fill(self.store, keys, make, "reference error", self.workers, verb)


def _keys(rows: Iterable[tuple[Any, ...]], prompts: Sequence[str], step: int) -> np.ndarray:
    """Return (N, 2) keys of rows, each its image's key, size, number and group."""
    return keys_of([f"{step}|{row}|{prompt}" for row, prompt in zip(rows, prompts, strict=True)])
