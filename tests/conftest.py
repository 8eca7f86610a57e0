"""What every test needs: no network, one thread, quiet libraries."""

import atexit
import gc
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Read when huggingface_hub and datasets are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "TGOL_TESTS" not in os.environ:  # the first process: its workers share the folder
    os.environ["TGOL_TESTS"] = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="tgol-tests-")
    atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

import hypothesis
import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from tests.clips import encoded
from tgol_trainer import TGOLConfig

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts what runs in the background without it

# The same examples at each run: no test fails by chance, and a slow machine is no failure.
hypothesis.settings.register_profile("tests", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Refuse versions with which pytest-xdist does not see groups: each worker would make what a group shares."""
    if not getattr(config.option, "loadgroup", False):
        return
    if any("@" not in item.nodeid and item.get_closest_marker("xdist_group") for item in items):
        raise pytest.UsageError(f"pytest-xdist does not group tests with pytest {pytest.__version__}: use below 9.2.")


def pytest_collection_finish() -> None:
    """Leave what is imported by now out of garbage collection.

    Each `Trainer.train` ends with a full collection, which takes longer to look through the imported modules (0.3 s)
    than to train a tiny pipeline. They live until the process ends in any case.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture(autouse=True)
def _logging_as_imported() -> Iterator[None]:
    """What a command sets up for a terminal, in this process, would take the log from the tests after it."""

    def reset() -> None:
        for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "tgol_trainer"]:
            logger = logging.getLogger(name)
            logger.handlers, logger.propagate = [], True
            logger.setLevel(logging.NOTSET)

    reset()
    yield
    reset()


def scored_dataset(num_rows: int = 32, num_prompts: int = 5, seed: int = 0, side: int = 16) -> Dataset:
    """Random images with prompts and normal scores."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num_rows, side, side, 3), dtype=np.uint8)
    return Dataset.from_dict(
        {
            "prompt": [f"prompt number {index % num_prompts}" for index in range(num_rows)],
            "image": [Image.fromarray(image) for image in images],
            "score": rng.normal(size=num_rows),
        }
    )


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """32 random rows."""
    return scored_dataset()


@pytest.fixture(scope="session")
def clips() -> Dataset:
    """Eight random clips of six frames, 16 high and 32 wide, as files."""
    rng = np.random.default_rng(0)
    arrays = rng.integers(0, 256, (8, 6, 16, 32, 3), dtype=np.uint8)
    columns = {"prompt": [f"clip {i % 3}" for i in range(8)], "score": rng.normal(size=8)}
    return Dataset.from_dict({**columns, "video": [encoded(clip) for clip in arrays]})


SMALL = {
    "per_device_train_batch_size": 8,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
"""Settings of a training run for seconds on a CPU."""


@pytest.fixture
def config(tmp_path):
    """Make a configuration for seconds on a CPU; keywords override."""

    def make(**overrides) -> TGOLConfig:
        return TGOLConfig(**{"output_dir": str(tmp_path / "run"), **SMALL, **overrides})

    return make


@pytest.fixture
def repository(tmp_path):
    """A folder like a clone of Meissonic's repository, with the stand-in's code; `src` is forgotten afterwards."""
    from tests import meissonic_standin

    source = tmp_path / "clone" / "src"
    source.mkdir(parents=True)
    (source / "transformer.py").write_text(Path(meissonic_standin.__file__).read_text())
    (source / "scheduler.py").write_text("from src.transformer import Scheduler  # noqa: F401\n")
    (source / "pipeline.py").write_text("from src.transformer import Pipeline  # noqa: F401\n")
    yield tmp_path / "clone"
    for name in [name for name in sys.modules if name == "src" or name.startswith("src.")]:
        del sys.modules[name]
