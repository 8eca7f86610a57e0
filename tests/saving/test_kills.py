"""Runs that are killed with SIGKILL and started again end bit for bit as runs that were not."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import ROOT
from tests.helpers import quick
from tests.hub import LoopbackHub
from tests.kills import STEPS, killed, weights
from tgol_trainer.saving.checkpoints import flaws


def assert_same(result):
    assert not result["wrong"]
    whole = weights(result["whole"])
    for root in result["runs"]:
        found = weights(root)
        assert found.keys() == whole.keys()
        for file, tensors in whole.items():
            assert tensors.keys() == found[file].keys()
            assert all(torch.equal(value, found[file][name]) for name, value in tensors.items()), (root, file)


def assert_checkpoints_are_whole(root, steps=6):
    left = sorted(path.name for path in (root / "run").iterdir() if path.name.startswith(("checkpoint-", "_")))
    assert left == [f"checkpoint-{steps - 1}", f"checkpoint-{steps}"]
    assert not any(flaws(root / "run" / name) for name in left)


KILLS = [("lora", 10, 4), ("lora", 14, 6), ("full", 8, 6), ("cache", 10, 6), ("rounds", 10, 2)]
"""With the pushes 50 in the slow tests: at changes of files, where one could be half, and at any time."""


@pytest.mark.timeout(3600)  # on a busy machine
@pytest.mark.parametrize(("scenario", "kills", "steps"), quick(KILLS, KILLS[0]))
def test_a_run_that_is_killed_and_started_again_ends_bit_for_bit_as_one_that_was_not(
    tmp_path, monkeypatch, scenario, kills, steps
):
    monkeypatch.setitem(STEPS, "max_steps", steps)
    result = killed(scenario, tmp_path, kills, seed=kills)
    assert_same(result)
    for root in result["runs"] if scenario != "rounds" else []:
        assert_checkpoints_are_whole(tmp_path / root, steps)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_that_is_killed_while_it_pushes_ends_on_the_hub_as_on_the_disk(tmp_path):
    with LoopbackHub() as hub:
        environment = {**os.environ, **hub.environment(tmp_path / "home")}
        done = subprocess.run(
            [sys.executable, "-m", "tests.kills", str(tmp_path), "push", "8", "0"],
            cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert_same(result)
    assert all(result["pushed"])
    for root in result["runs"]:
        assert_checkpoints_are_whole(Path(root))


LEFT = """
import multiprocessing, time
from types import SimpleNamespace
from tgol_trainer.saving import stopping

callback = stopping.StopOnSignal()
loader = SimpleNamespace(dataset=None, worker_init_fn=None)
callback.on_train_begin(None, None, None, train_dataloader=loader)

def load():
    loader.worker_init_fn(0)
    print("loads", flush=True)
    time.sleep(3600)

multiprocessing.get_context("fork").Process(target=load, daemon=True).start()
time.sleep(1)
callback.restore()
"""


@pytest.mark.slow
def test_what_loads_data_and_takes_no_signal_does_not_keep_a_process_from_its_end():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LEFT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert (done.returncode, done.stdout) == (0, "loads\n"), done.stderr
