"""Start several processes on a CPU as a launcher does, and read what they saw."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from tests.launch import train as program
from tgol_trainer.shapes import PROMPTS

ROOT = Path(__file__).parents[2]
SCRIPT = str(ROOT / "scripts" / "train_tgol.py")
PROGRAM = str(ROOT / "tests" / "launch" / "train.py")
IDLE, BUSY = 240, 900
"""A launch hangs that uses no processor for so long on the clock, or so much of it; the longest takes 80 s.

On a busy machine it may take any time on the clock alone.
"""


# ---- Starting processes ----


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(command, cwd, watch=None, **environment):
    """
    Run a launcher; returns its exit code and output. What it started ends with it, also if it hangs.

    `watch` is called again and again with what was written on standard error so far.
    """
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    mine |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(cwd / "datasets_cache")}
    # Into files: a pipe stays open, and waiting for its end takes for ever, while any process that inherited it lives.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, cwd=cwd, env={**mine, **environment}, stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True
        )
        used, worked = 0.0, time.monotonic()
        while process.poll() is None and used < BUSY and time.monotonic() - worked < IDLE:
            time.sleep(0.1)
            if abs(processor_time(process.pid) - used) > 1:
                used, worked = processor_time(process.pid), time.monotonic()
            if watch is not None:
                err.seek(0)
                watch(err.read())
        if process.poll() is None:
            # torchrun's workers have sessions of their own, so ending its process group would leave them.
            for each in [*psutil.Process(process.pid).children(recursive=True), process]:
                each.kill()
            process.wait()
        out.seek(0)
        err.seek(0)
        done = SimpleNamespace(returncode=process.returncode, out=out.read(), err=err.read())
    if done.returncode == -signal.SIGKILL:
        pytest.fail(f"no end, {used:.0f} s of the processor\n{tail(done)}")
    return done


def processor_time(pid):
    """Return the seconds of the processor that the processes took that another one started."""
    total = 0.0
    with contextlib.suppress(psutil.NoSuchProcess):
        for each in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                times = each.cpu_times()
                total += times.user + times.system
    return total


def tail(done):
    return f"--- stdout\n{done.out[-3000:]}\n--- stderr\n{done.err[-6000:]}"


def succeed(command, cwd, watch=None, **environment):
    done = launch(command, cwd, watch, **environment)
    if done.returncode:
        pytest.fail(f"exit code {done.returncode}\n{tail(done)}")
    return done


def torchrun(*arguments, processes=2):
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    return [*start, "--master_port", free_port(), *map(str, arguments)]


def records_of(folder, run=0, processes=2):
    files = [folder / f"run-{run}-process-{rank}.json" for rank in range(processes)]
    records = [json.loads(file.read_text()) for file in files]
    # First of all: were there two, or did one train alone?
    assert [(record["process"], record["world_size"]) for record in records] == [
        (rank, processes) for rank in range(processes)
    ]
    return records


def alone(folder, flags):
    """The same program in this process."""
    folder.mkdir()
    program.run_group(folder, 1, flags)
    return records_of(folder, processes=1)[0]


# ---- Data and runs ----


def write_parquet(file, scores, seed=0, prompts=PROMPTS):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (len(scores), 32, 32, 3), dtype=np.uint8)
    rows = {
        "prompt": [prompts[index % len(prompts)] for index in range(len(scores))],
        "image": [Image.fromarray(image) for image in images],
        "score": [float(score) for score in scores],
    }
    features = Features({"prompt": Value("string"), "image": ImageFeature(), "score": Value("float64")})
    file.parent.mkdir(exist_ok=True)
    Dataset.from_dict(rows, features=features).to_parquet(file)


def flags_for(data, output, batch, **settings):
    settings = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3, **settings}
    settings |= {"model_name_or_path": "shapes", "dataset_name": data, "output_dir": output, "use_cpu": "true"}
    settings |= {"per_device_train_batch_size": batch, "report_to": "none", "disable_tqdm": "true"}
    lists = {name: value if isinstance(value, list) else [value] for name, value in settings.items()}
    return [text for name, values in lists.items() for text in (f"--{name}", *map(str, values))]


def lines(record, key="loss"):
    return [line for line in record["log_history"] if key in line]


TIMING = ("_runtime", "_per_second", "model_preparation_time")


def assert_same_log(one, two):
    """
    Every key of every line, but for durations.

    An implicit reward is the difference of two errors of about 0.1, divided by T = 0.001: where it is nearly 0, what
    float32 rounds off the errors, 1e-7 of them, is a hundredth of a thousandth of reward.
    """
    assert len(one) == len(two) > 0
    for line, other in zip(one, two, strict=True):
        values = {key: value for key, value in line.items() if not key.endswith(TIMING)}
        assert values.keys() == {key for key in other if not key.endswith(TIMING)}
        for key, value in values.items():
            rounding = 1e-4 if "rewards/" in key else 1e-6
            assert other[key] == pytest.approx(value, rel=1e-3, abs=rounding), (line["step"], key)
