"""A process that stops answering is reported within a minute, one that is merely slow to save is not."""

import pytest

from tgol_trainer.saving.heartbeat import PERIOD, SILENCE, Watch


class Dictionary(dict):
    def set(self, key, value):
        self[key] = value.encode()


@pytest.fixture
def three():
    store = Dictionary()
    return [Watch(store, rank, 3) for rank in range(3)]


def pass_time(watches, seconds, alive, start=0.0):
    """What each process says while those alive beat; by rank and time."""
    said, now = [], start
    while now < start + seconds:
        now += PERIOD
        for rank in alive:
            watches[rank].beat()
        for rank in alive:
            said += [(rank, now - start, text) for text in watches[rank].look(now)]
    return said


def test_a_frozen_process_is_named_once_within_a_minute_by_the_first(three):
    assert pass_time(three, 60, alive=(0, 1, 2)) == []
    said = pass_time(three, 300, alive=(0, 2), start=60)
    [(rank, seconds, text)] = said
    assert rank == 0 and seconds <= 60
    assert text.startswith("Process 1 (") and "no sign of life for" in text and "resume_from_checkpoint true" in text


def test_the_second_process_reports_the_first(three):
    said = pass_time(three, 120, alive=(1, 2))
    assert [(rank, text.split(" (")[0]) for rank, _, text in said] == [(1, "Process 0")]


def test_a_process_that_waits_for_its_data_is_named_and_so_is_that_it_goes_on(three):
    three[0].begun = three[1].begun = 7
    three[2].begun = 6
    [(_, seconds, text)] = pass_time(three, 120, alive=(0, 1, 2))
    assert SILENCE <= seconds <= 60
    assert text.startswith("Process 2 (") and "has not begun a batch that others began" in text
    three[2].begun = 7
    [(_, _, text)] = pass_time(three, 60, alive=(0, 1, 2), start=120)
    assert text.startswith("Process 2 (") and text.endswith("goes on.")


def test_processes_that_wait_for_a_long_save_of_the_first_are_not_reported(three):
    for watch in three:
        watch.begun = 4
    assert pass_time(three, 900, alive=(0, 1, 2)) == []
