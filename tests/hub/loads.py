"""A client process of `tests/test_hub_training.py`: with an empty cache, loads what another process pushed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.pipelines import FAMILIES
from tgol_trainer.backbones import load_backbone


def equal(family: str, repository: str, probe: Path) -> tuple[bool, bool]:
    """Whether a fresh pipeline differs from what was trained, and equals it with the adapter of the Hub."""
    fresh = load_backbone(FAMILIES[family].build())
    trained, base = load_file(probe)["probe"], fresh.probe()
    FAMILIES[family].load(fresh.pipeline, repository)
    return not torch.equal(base, trained), torch.equal(fresh.probe(), trained)


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    found = {}
    for name in names:
        family, _, run = name.partition("=")
        found[run or family] = equal(family, f"tester/{run or family}", folder / f"{run or family}.safetensors")
    sys.stdout.write(json.dumps(found))
