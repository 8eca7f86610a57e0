"""Passes over a stream: whole updates, one end for all processes, counts of what repeats and of what is left out."""

import json
import multiprocessing
from itertools import chain
from types import SimpleNamespace

import pytest
import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader

from tgol_trainer.data import DataError, StreamPasses
from tgol_trainer.data import passes as module


class Rows(torch.utils.data.IterableDataset):
    """So many numbers, from `start` on; shifted by the pass."""

    def __init__(self, count, start=0):
        self.count, self.start, self.number = count, start, 0

    def set_epoch(self, number):
        self.number = number

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for row in range(first, self.count, step):
            yield {"row_id": torch.tensor(self.start + 1000 * self.number + row)}


def passes_over(rows, size=4, accumulation=1, drop_last=True, workers=0, **options):
    loader = DataLoader(rows, batch_size=size, num_workers=workers)
    return StreamPasses(rows, loader, size, accumulation, drop_last, **options)


def ids(batches):
    return [batch["row_id"].tolist() for batch in batches]


def test_a_pass_gives_whole_updates_counts_them_and_says_what_is_left_out(caplog):
    caplog.set_level("INFO", logger="tgol_trainer")
    passes = passes_over(Rows(15), size=2, accumulation=3)
    assert ids(passes) == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert "a pass over the stream trains 12 different rows, and leaves out 3 that fill no update of 6" in caplog.text
    caplog.clear()
    batches, places = iter(passes), []
    for _ in range(6):
        assert next(batches)["row_id"][0] >= 1000
        places.append((passes.number, passes.updates))
    assert places == [(1, 0), (1, 0), (1, 1), (1, 1), (1, 1), (1, 2)]  # an update counts with its last batch
    assert list(batches) == [] and (passes.number, passes.updates) == (2, 0)
    assert not caplog.text  # once


def test_rows_that_workers_leave_at_their_ends_are_left_out_and_counted_or_trained(caplog):
    caplog.set_level("INFO", logger="tgol_trainer")
    rows = passes_over(Rows(13), workers=2)  # 7 and 6 rows
    assert sorted(chain(*ids(rows))) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert "leaves out 5 that" in caplog.text
    assert sorted(chain(*ids(passes_over(Rows(13), drop_last=False)))) == list(range(13))


def one_of_two(rank, counts, passes, folder, options):
    store = torch.distributed.FileStore(str(folder / "store"), len(counts))
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=len(counts))
    logged = []

    def note(text, *values):
        logged.append(text % values)

    module.logger = SimpleNamespace(info=note, warning=note)
    found = passes_over(Rows(counts[rank], start=100 * rank), rank=rank, world_size=len(counts), **options)
    try:
        seen = [ids(found) for _ in range(passes)]
    except DataError as error:
        seen = str(error)
    (folder / f"{rank}.json").write_text(json.dumps([seen, logged]))
    torch.distributed.destroy_process_group()


def together(folder, counts, passes=1, **options):
    """What each of several processes reads, and what the first one says."""
    fork = multiprocessing.get_context("fork")
    jobs = [
        fork.Process(target=one_of_two, args=(rank, counts, passes, folder, options)) for rank in range(len(counts))
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
    assert not any(job.is_alive() for job in jobs), "they wait for each other"
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(counts))]
    return [seen for seen, _ in results], results[0][1]


def test_processes_end_a_pass_together_and_the_shorter_part_repeats_with_its_numbers_said(tmp_path):
    (short, long), said = together(tmp_path, [9, 21], passes=2)
    assert long == [[list(range(p + 100 + 4 * i, p + 104 + 4 * i)) for i in range(5)] for p in (0, 1000)]
    wanted = [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert short[0] == [*wanted, *wanted, wanted[0]]
    assert short[1] == [[row + 1000 for row in batch] for batch in short[0]]
    [line] = said
    assert "trains 28 different rows, and leaves out 2 that" in line
    assert "process 0: 8 rows, 12 repeated; process 1: 20 rows, 0 repeated" in line


def test_equal_parts_repeat_nothing_and_no_warning_is_given(tmp_path):
    (left, right), [line] = together(tmp_path, [8, 8], accumulation=2)
    assert (left, right) == ([[[0, 1, 2, 3], [4, 5, 6, 7]]], [[[100, 101, 102, 103], [104, 105, 106, 107]]])
    assert line == "train_dataset: a pass over the stream trains 16 different rows."


@pytest.mark.parametrize("rows", [0, 3], ids=["empty", "shorter than a batch"])
def test_a_process_whose_part_fills_no_update_is_an_error_on_all_and_nobody_waits(tmp_path, rows):
    found, _ = together(tmp_path, [8, rows])
    assert all("that process 1 reads fills no update of 4 rows" in text for text in found)


def test_a_stream_that_can_be_read_once_is_not_read_again_for_ever():
    def once(given=[]):  # noqa: B006 - remembers that it was read
        if not given:
            given.append(True)
            yield {"row_id": 0}

    rows = IterableDataset.from_generator(once)
    passes = passes_over(rows, size=1)
    assert ids(passes) == [[0]] and ids(passes) == []
