"""Real processes on a CPU: more or fewer of them, a NaN on one that is left out on all, a frozen one that is named."""

import json
import os
import re
import shutil
import signal
import sys
import time
from itertools import chain

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.launch.processes import (
    PROGRAM,
    SCRIPT,
    alone,
    assert_same_log,
    flags_for,
    launch,
    lines,
    records_of,
    succeed,
    torchrun,
    write_parquet,
)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("launch"), pytest.mark.timeout(3600)]


@pytest.fixture
def place(tmp_path):
    write_parquet(tmp_path / "data" / "train.parquet", np.random.default_rng(1).normal(size=27))
    return tmp_path


def together(place, flags, processes, watch=None):
    records = place / "records"
    records.mkdir()
    done = succeed(torchrun(PROGRAM, records, processes, *flags, processes=processes), place, watch)
    return records_of(records, processes=processes), done


def assert_same_weights(one, two):
    ours, theirs = (load_file(folder / "pytorch_lora_weights.safetensors") for folder in (one, two))
    assert ours.keys() == theirs.keys()
    for name in ours:
        # A twentieth of an update at this rate: where a gradient is nearly 0, Adam makes its rounding that large.
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=5e-5)


def test_three_processes_train_what_one_process_trains(place):
    """Two updates of 12 rows an epoch, and two of the next; the reference moves in between."""
    options = {"reference_update": "epoch"}
    records, _ = together(place, flags_for(place / "data", place / "three", 4, **options), processes=3)
    whole = alone(place / "alone", flags_for(place / "data", place / "one", 12, **options))
    parts = [sorted(chain(*rows)) for rows in zip(*(record["row_ids"] for record in records), strict=True)]
    assert parts == [sorted(rows) for rows in whole["row_ids"]]
    assert len({record["threshold"] for record in [whole, *records]}) == 1
    for record in records:
        assert_same_log(lines(whole), lines(record))
    assert_same_weights(place / "one", place / "three")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_another_number_of_processes_is_refused_by_name_and_goes_on_to_the_same_weights_if_allowed(
    place, before, after
):
    """Four updates of 12 rows, the last two shared among another number of processes."""

    def run(processes, folder, **options):
        settings = {"save_strategy": "steps", "save_steps": 2, **options}
        flags = flags_for(place / "data", place / folder, 12 // processes, **settings)
        start = torchrun(processes=processes) if processes > 1 else [sys.executable]
        return launch([*start, SCRIPT, *flags], place)

    assert run(before, "whole").returncode == 0
    shutil.copytree(place / "whole", place / "cut")
    shutil.rmtree(place / "cut" / "checkpoint-4")
    (place / "cut" / "pytorch_lora_weights.safetensors").unlink()
    refused = run(after, "cut", resume_from_checkpoint="true")
    assert refused.returncode != 0
    assert f"world_size from {before} to {after}" in refused.err and "--allow_changed" in refused.err
    assert not (place / "cut" / "pytorch_lora_weights.safetensors").exists()
    done = run(after, "cut", resume_from_checkpoint="true", allow_changed="all")
    assert done.returncode == 0, done.err[-3000:]
    assert_same_weights(place / "whole", place / "cut")
    assert f"world_size from {before} to {after}" in (place / "cut" / "README.md").read_text()


def test_an_update_that_is_nan_on_one_of_two_processes_is_left_out_on_both(place):
    options = {"on_nan": "skip", "max_steps": 5}
    flags = ["broken", *flags_for(place / "data", place / "two", 4, **options)]
    records, done = together(place, flags, processes=2)
    whole = alone(place / "alone", ["broken", *flags_for(place / "data", place / "one", 8, **options)])
    for record in records:
        counts = [line["skipped_updates"] for line in lines(record)]
        assert counts == [0, 1, 1, 1, 1]
        assert_same_log(lines(whole)[2:], lines(record)[2:])
    assert_same_weights(place / "one", place / "two")
    state = json.loads((place / "two" / "tgol_state.json").read_text())
    assert state["skipped_updates"] == 1
    assert done.err.count("1 updates were left out") >= 1


def test_a_process_that_is_frozen_is_named_within_a_minute_and_the_run_goes_on_with_it(place):
    seen = {}

    def watch(said):
        if "frozen" in said:
            seen.setdefault("frozen", time.monotonic())
        named = re.search(r"Process 1 \(.*, pid (\d+)\) has given no sign of life for (\d+) s", said)
        if named and "named" not in seen:
            seen["named"], seen["seconds"] = time.monotonic(), int(named[2])
            os.kill(int(named[1]), signal.SIGCONT)

    flags = ["frozen", *flags_for(place / "data", place / "two", 4)]
    records, _ = together(place, flags, 2, watch)
    assert seen["named"] - seen["frozen"] < 60
    assert seen["seconds"] >= 40
    assert [line["step"] for line in lines(records[0])] == [1, 2, 3, 4]
