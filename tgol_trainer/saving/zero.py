"""
The optimizer's state of DeepSpeed's ZeRO-2, of which each process holds a part; the weights are whole on each.

DeepSpeed's own checkpoints also hold the frozen base, and are read by unpickling, which can run code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def save_optimizer(optimizer: Any, file: Path) -> None:
    """
    Write the part of this process.

    Args:
        optimizer (`deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer`): As it trains.
        file (`Path`): A file of this process.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(optimizer.optimizer.state_dict(), file)


def load_optimizer(optimizer: Any, file: Path) -> None:
    """
    Read the part of this process, after the weights were loaded into the network.

    Args:
        optimizer (`deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer`): One that has made no update.
        file (`Path`): The file of this process.
    """
    optimizer.refresh_fp32_params()  # its own copy of the weights
    optimizer.optimizer.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
