"""Order rows so that images of one prompt, or of one size, come in one batch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


class GroupSampler(torch.utils.data.Sampler[int]):
    """
    Give every row once per epoch, in blocks of `group_size` rows that share a group as far as the groups go.

    Each group's rows are shuffled and cut into blocks. The rest of a group, fewer rows than a block, stays together:
    rests of several groups fill blocks, largest first, and rows that no block can take close the epoch, where the end
    of a batch may part them. Blocks are shuffled. A batch size that is a multiple of `group_size` never cuts a whole
    block, on any number of processes. The order depends on seed and epoch alone, so a resumed run goes on with it.

    Args:
        groups (`numpy.ndarray`): (N,) integers, equal ones form a group.
        group_size (`int`): Rows of a block, at least 2.
        seed (`int`, *optional*, defaults to 0): Seed of the order.
    """

    def __init__(self, groups: np.ndarray, group_size: int, seed: int = 0) -> None:
        self.groups, self.group_size, self.seed, self.epoch = np.asarray(groups), group_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.groups))
        order = order[np.argsort(self.groups[order], kind="stable")]
        blocks: list[np.ndarray] = []
        rests: list[np.ndarray] = []
        for rows in np.split(order, np.flatnonzero(np.diff(self.groups[order])) + 1):
            whole = len(rows) - len(rows) % self.group_size
            blocks += np.split(rows[:whole], whole // self.group_size) if whole else []
            if whole < len(rows):
                rests.append(rows[whole:])
        packed = _packed([rests[index] for index in rng.permutation(len(rests))], self.group_size)
        blocks += [block for block in packed if len(block) == self.group_size]
        shuffled = [blocks[index] for index in rng.permutation(len(blocks))]
        for block in [*shuffled, *(block for block in packed if len(block) < self.group_size)]:
            yield from block.tolist()


class SizeSampler(torch.utils.data.Sampler[int]):
    """
    Give rows in batches of one training size.

    The rows of a size are ordered by another sampler and cut into batches. What is left of a size, fewer rows than a
    batch, is left out of this pass or filled up with rows of the same size. Batches are shuffled. The order depends on
    seed and epoch alone.

    Args:
        resolutions (`numpy.ndarray`): (N, 2) heights and widths.
        batch_size (`int`): Rows of a batch.
        drop_last (`bool`): Leave out what does not fill a batch; otherwise fill it up, and every row is given.
        seed (`int`, *optional*): Seed of the order; `None` keeps the order of the rows within a size, and of sizes.
        groups (`numpy.ndarray`, *optional*): (N,) integers; rows of one group stay together as in [`GroupSampler`].
        group_size (`int`, *optional*): Rows of a block of one group; needed with `groups`.
    """

    def __init__(
        self,
        resolutions: np.ndarray,
        batch_size: int,
        drop_last: bool,
        seed: int | None = None,
        groups: np.ndarray | None = None,
        group_size: int | None = None,
    ) -> None:
        self.batch_size, self.drop_last, self.seed, self.epoch = batch_size, drop_last, seed, 0
        self.groups, self.group_size = groups, group_size
        _, numbers = np.unique(resolutions, axis=0, return_inverse=True)
        order = np.argsort(numbers.reshape(-1), kind="stable")
        self.parts = np.split(order, np.flatnonzero(np.diff(numbers.reshape(-1)[order])) + 1)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __len__(self) -> int:
        size = self.batch_size
        return sum(len(rows) // size * size if self.drop_last else -(-len(rows) // size) * size for rows in self.parts)

    def __iter__(self) -> Iterator[int]:
        rng = None if self.seed is None else np.random.default_rng([self.seed, self.epoch])
        batches: list[np.ndarray] = []
        for number, rows in enumerate(self.parts):
            order = rows
            if self.groups is not None and self.group_size is not None:
                inner = GroupSampler(self.groups[rows], self.group_size, 0 if self.seed is None else self.seed)
                inner.set_epoch(self.epoch * len(self.parts) + number)
                order = rows[list(inner)]
            elif rng is not None:
                order = rng.permutation(rows)
            if not self.drop_last:
                order = np.resize(order, -(-len(order) // self.batch_size) * self.batch_size)  # repeats from the start
            whole = len(order) // self.batch_size
            batches += list(order[: whole * self.batch_size].reshape(whole, self.batch_size))
        places = np.arange(len(batches)) if rng is None else rng.permutation(len(batches))
        for place in places:
            yield from batches[place].tolist()


def innermost_sampler(loader: DataLoader) -> Any:
    """
    Return the sampler of rows under the wrappers around the batches of a loader.

    accelerate's `set_epoch` does not pass two wrappers. A loader of several processes has two after a resume in
    mid-epoch: the sampler would then give the order of another epoch.

    Args:
        loader (`torch.utils.data.DataLoader`): A loader with batches of rows.
    """
    batches: Any = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


def _packed(rests: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Fill each block with the largest rests that still fit."""
    by_length: dict[int, list[np.ndarray]] = {}
    for rest in rests:
        by_length.setdefault(len(rest), []).append(rest)
    blocks = []
    while by_length:
        parts: list[np.ndarray] = []
        space = size
        while fitting := [length for length in by_length if length <= space]:
            length = max(fitting)
            parts.append(by_length[length].pop())
            space -= length
            if not by_length[length]:
                del by_length[length]
        blocks.append(np.concatenate(parts))
    return blocks
