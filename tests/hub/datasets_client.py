"""A client process of `tests/test_hub_datasets.py`: makes, scores and pushes datasets by the commands."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .control import control

SHAPES = "--model_name_or_path shapes --num_inference_steps 2 --batch_size 4 --shard_size 4 --use_cpu"


def command(line: str) -> int:
    """Run a command as the shell would; its exit code."""
    from tgol_trainer.cli import main

    try:
        return main(line.split())
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1


def make() -> dict[str, Any]:
    """Prompts to pictures to scores, each a dataset on the Hub; half a dataset; a push that fails and goes on."""
    Path("prompts.txt").write_text("a red circle\na <b>blue</b> | cross\n")
    generate = f"generate --prompts prompts.txt --images_per_prompt 4 {SHAPES} --output_dir pictures"
    codes = {}
    # The other of two processes: it makes its half and pushes nothing.
    os.environ.update(RANK="1", WORLD_SIZE="2")
    codes["rank 1"] = command(f"{generate} --push_to_hub --hub_dataset_id tester/pictures")
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    codes["half"] = command("push pictures --hub_dataset_id tester/half")
    codes["generate"] = command(f"{generate} --push_to_hub --hub_dataset_id tester/pictures")
    control("fail", route="commit", status=403, times=None)
    score = "score tester/pictures --rewards background_darkness --output_dir scored --shard_size 4 --use_cpu"
    codes["refused"] = command(f"{score} --push_to_hub")
    control("clear")
    readme = Path("scored") / "README.md"
    readme.write_text(readme.read_text() + "\nMy own note.\n")
    codes["push"] = command("push scored")
    codes["as a model"] = command("push scored --hub_model_id tester/wrong")
    return codes


def use() -> dict[str, Any]:
    """What another person does with an empty cache: load, train, name the source."""
    from datasets import load_dataset

    from tgol_trainer import TGOLConfig, TGOLTrainer
    from tgol_trainer.data import load_scored_dataset

    plain = load_dataset("tester/scored", split="train")
    config = TGOLConfig(
        output_dir="adapter",
        score_column="background_darkness",
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = TGOLTrainer("shapes", config, plain)
    trainer.train()
    named = TGOLTrainer("shapes", config, load_scored_dataset("tester/scored"))
    return {
        "rows": plain.num_rows,
        "image": type(plain.features["image"]).__name__,
        "size": plain[0]["image"].size,
        "columns": plain.column_names,
        "steps": trainer.state.global_step,
        "source": [named.dataset_facts[0].name, named.dataset_facts[0].revision],
    }


if __name__ == "__main__":
    part: Callable[[], dict[str, Any]] = {"make": make, "use": use}[sys.argv[1]]
    sys.stdout.write(f"\n{json.dumps(part())}\n")
