"""Read a stream pass by pass on all processes: whole updates, one end for all, and a place to go on at."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader

from .collator import Collator
from .images import DataError
from .streams import ScoredStream

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor]

_ENDED, _READY, _NOTHING = range(3)


class StreamPasses(torch.utils.data.IterableDataset):
    """
    The batches of a stream, one pass for each iteration, in whole updates.

    A pass ends on all processes at the same update: when every one of them has read its part. One whose part is
    shorter begins it again until then. After the first pass the rows that repeat, and those that are left out because
    they fill no batch or no update, are counted and said.

    Args:
        stream ([`ScoredStream`]): The part of this process.
        loader (`torch.utils.data.DataLoader`): Its batches, the last ones possibly not full.
        batch_size (`int`): Rows of a full batch.
        accumulation (`int`): Batches of an update.
        drop_last (`bool`): Leave out batches that are not full.
        rank (`int`, *optional*, defaults to 0): Number of the process.
        world_size (`int`, *optional*, defaults to 1): Number of processes; with several, every one of them must make
            this object, and iterate over it, at the same time.

    Attributes:
        number (`int`): Number of the pass that is read, or comes next, from 0.
        updates (`int`): Updates of that pass that were handed out.
    """

    def __init__(
        self,
        stream: ScoredStream,
        loader: DataLoader,
        batch_size: int,
        accumulation: int,
        drop_last: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.loader = stream, loader
        self.batch_size, self.accumulation, self.drop_last = batch_size, accumulation, drop_last
        self.rank, self.world_size = rank, world_size
        self.number = self.updates = 0
        self._said = False
        # Of its own, on the CPU: what processes tell each other must not wait for a device.
        self._group = torch.distributed.new_group(backend="gloo") if world_size > 1 else None

    def __iter__(self) -> Iterator[Batch]:
        self.updates = 0
        self.stream.set_epoch(self.number)
        part = _Part(self)
        for update in self._alone(part) if self._group is None else self._together(part):
            yield from update[:-1]
            self.updates += 1
            yield update[-1]
        self.number, self.updates = self.number + 1, 0

    def _alone(self, part: _Part) -> Iterator[list[Batch]]:
        while (update := part.next()) is not None:
            yield update
        self._say(part.state(None)[None])

    def _together(self, part: _Part) -> Iterator[list[Batch]]:
        update = part.next()
        told = self._tell(part, update)
        while True:
            states = told.read()
            self._check(states)
            if (states[:, 0] == _ENDED).all():
                break
            if update is None:
                update = part.again()
            following = part.next()
            told = self._tell(part, following)  # the answers arrive while the update is computed
            yield update
            update = following
        self._say(states)

    def _tell(self, part: _Part, update: list[Batch] | None) -> _Told:
        return _Told(part.state(update), self.rank, self.world_size, self._group)

    def _check(self, states: torch.Tensor) -> None:
        idle = (states[:, 0] == _NOTHING).nonzero().view(-1).tolist()
        if idle:
            raise DataError(
                f"train_dataset: the part of the stream that process {', '.join(map(str, idle))} reads fills no "
                f"update of {self.batch_size * self.accumulation} rows (`per_device_train_batch_size` × "
                f"`gradient_accumulation_steps`); the others would wait for it for ever. {_REMEDY}"
            )

    def _say(self, states: torch.Tensor) -> None:
        own, repeated, left = (states[:, index].tolist() for index in (1, 2, 3))
        if self._said or self.rank or not any(own):
            return
        self._said = True
        said = f"train_dataset: a pass over the stream trains {sum(own)} different rows"
        if sum(left):
            said += (
                f", and leaves out {sum(left)} that fill no update of {self.batch_size * self.accumulation} on their "
                "process"
            )
        if not sum(repeated):
            logger.info("%s.", said)
            return
        parts = "; ".join(
            f"process {rank}: {rows} rows, {again} repeated"
            for rank, (rows, again) in enumerate(zip(own, repeated, strict=True))
        )
        logger.warning(
            "%s. The parts of the processes differ, so that rows of the shorter ones repeat until the longest is read "
            "(%s). %s",
            *(said, parts, _REMEDY),
        )


_REMEDY = (
    "Use files with equally many rows, as many for each process, or a number of files that the processes do not "
    "divide: then they share rows instead of files."
)


class _Part:
    """What one process reads in a pass."""

    def __init__(self, passes: StreamPasses) -> None:
        self.passes = passes
        self.batches = iter(passes.loader)
        self.ended = False
        self.own = self.repeated = self.left = 0

    def next(self) -> list[Batch] | None:
        """Return the next update of the first reading; `None` after it."""
        if self.ended:
            return None
        update, left = self._read()
        self.left += left
        self.ended = update is None
        self.own += _rows(update)
        return update

    def again(self) -> list[Batch]:
        """Return the next update of further readings."""
        update, _ = self._read()
        if update is None:
            self.batches = iter(self.passes.loader)
            update, _ = self._read()
        if update is None:
            raise DataError(
                "train_dataset: the stream gave rows once and gives none when it is read again. Use a stream that "
                "can be read again for each pass."
            )
        self.repeated += _rows(update)
        return update

    def state(self, update: list[Batch] | None) -> torch.Tensor:
        """What the others are told: whether there is an update, and counts of rows."""
        code = _READY if update is not None else _ENDED if self.own else _NOTHING
        return torch.tensor([code, self.own, self.repeated, self.left])

    def _read(self) -> tuple[list[Batch] | None, int]:
        """Return an update, or `None`, and the number of rows that are left out before it or instead of it."""
        update: list[Batch] = []
        left = 0
        for batch in self.batches:
            rows = len(batch["row_id"])
            if rows < self.passes.batch_size and self.passes.drop_last:  # each worker has its own last batch
                left += rows
                continue
            update.append(batch)
            if len(update) == self.passes.accumulation:
                return update, left
        return None, left + _rows(update)


class _Told:
    """A message to all processes that is under way."""

    def __init__(self, state: torch.Tensor, rank: int, world_size: int, group: Any) -> None:
        self.states = torch.zeros(world_size, len(state), dtype=torch.int64)
        self.states[rank] = state
        self._work = torch.distributed.all_reduce(self.states, group=group, async_op=True)

    def read(self) -> torch.Tensor:
        """Wait for the messages of the others; return all, (processes, 4) int64."""
        self._work.wait()
        return self.states


def _rows(update: list[Batch] | None) -> int:
    return sum(len(batch["row_id"]) for batch in update or ())


def stream_passes(stream: ScoredStream, args: TrainingArguments, collate: Collator) -> StreamPasses:
    """
    Return the passes of this process over a stream.

    Args:
        stream ([`ScoredStream`]): The whole stream.
        args (`transformers.TrainingArguments`): Batches, processes, workers.
        collate ([`Collator`]): Makes a batch of rows.
    """
    part, size = stream.split(args.process_index, args.world_size), args.train_batch_size
    # Its own generator: a resumed run starts reading at another moment, and must leave the global one alone.
    generator = torch.Generator().manual_seed(args.data_seed)
    loader = DataLoader(
        part,
        batch_size=size,
        collate_fn=collate,
        generator=generator,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return StreamPasses(
        *(part, loader, size, args.gradient_accumulation_steps, args.dataloader_drop_last),
        rank=args.process_index,
        world_size=args.world_size,
    )
