"""A long run holds no more memory at its end than near its beginning."""

import os
import sys
from pathlib import Path

import pytest
from transformers import TrainerCallback

from tests.conftest import scored_dataset
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLTrainer


class Resident(TrainerCallback):
    """Resident memory in MB after a few steps."""

    def __init__(self):
        self.megabytes = {}

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in (100, 250, 500, 750, 1000):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.megabytes[state.global_step] = pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_from_step_100_to_step_1000(config):
    resident = Resident()
    args = config(
        max_steps=1000,
        per_device_train_batch_size=4,
        precompute_ref_log_probs=True,
        learning_rate=1e-5,
        save_strategy="steps",
        save_steps=100,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=100,
    )
    rows = scored_dataset(64)
    TGOLTrainer(stable_diffusion(), args, rows, rows.select(range(8)), callbacks=[resident]).train()
    assert resident.megabytes[1000] < resident.megabytes[100] + 10
