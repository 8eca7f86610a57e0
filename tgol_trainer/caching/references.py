"""Keep the reference's errors on fixed draws, so that a training step needs one forward pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset

from tgol_trainer.data import Collator, ScoredDataset, decode_prompts

from .filling import Encoded, Workers, fill
from .store import TensorStore, key_of

_VERSION = 3
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
        facts = [inputs[name] for name in ("image_key", "resolution", "row_id", "group") if name in inputs]
        rows = _row_keys(np.column_stack([fact.cpu().numpy() for fact in facts]), prompts)
        return self.store.read(rows ^ _step_key(step))["error"]

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
        sizes = np.full((len(rows), 2), self.collator.resolution)
        if rows.resolutions is not None:
            sizes = rows.resolutions
        groups = [] if rows.group_ids is None else [np.array(rows.group_ids)]
        keys = _row_keys(np.column_stack([rows.image_keys.view(np.int64), sizes, rows.row_ids, *groups]), rows.prompts)
        _, size = np.unique(sizes, axis=0, return_inverse=True)
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

                verb = f"Draw {number} of {len(steps)}: computing"
                of_step = keys[part] ^ _step_key(step)
                fill(self.store, of_step, make, "reference error", self.workers, verb, batch_size)


def _row_keys(facts: np.ndarray, prompts: Sequence[str]) -> np.ndarray:
    """Return (N, 2) uint64 keys of (N, M) int64 facts about rows, and their prompts."""
    keys = bytearray()
    for fact, prompt in zip(np.ascontiguousarray(facts, dtype=np.int64), prompts, strict=True):
        digest = hashlib.blake2b(fact.tobytes(), digest_size=16)
        digest.update(prompt.encode("utf-8", "surrogatepass"))
        keys += digest.digest()
    return np.frombuffer(keys, dtype=np.uint64).reshape(-1, 2)


def _step_key(step: int) -> np.ndarray:
    """Return (2,) uint64, which makes the keys of a step of those of rows."""
    return np.frombuffer(key_of("step", step), dtype=np.uint64)
