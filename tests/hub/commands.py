"""What `tests/hub/trainings.py` does by the commands: it makes, scores, trains and pushes."""

from __future__ import annotations

import contextlib
import io
import os
import sys
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
        if isinstance(stop.code, str):  # Python prints it and exits with 1
            sys.stderr.write(f"{stop.code}\n")
            return 1
        return int(stop.code or 0)


def make() -> dict[str, Any]:
    """Prompts to images to scores, each a dataset on the Hub; half a dataset; a push that fails and goes on."""
    Path("prompts.txt").write_text("a red circle\na <b>blue</b> | cross\n")
    generate = f"generate --prompts prompts.txt --images_per_prompt 4 {SHAPES} --output_dir images"
    codes = {}
    # The other of two processes: it makes its half and pushes nothing.
    os.environ.update(RANK="1", WORLD_SIZE="2")
    codes["rank 1"] = command(f"{generate} --push_to_hub --hub_dataset_id tester/images")
    del os.environ["RANK"], os.environ["WORLD_SIZE"]
    codes["half"] = command("push images --hub_dataset_id tester/half")
    codes["generate"] = command(f"{generate} --push_to_hub --hub_dataset_id tester/images")
    streamed = "score tester/images --streaming --rewards background_darkness --output_dir streamed --use_cpu"
    codes["streamed"] = command(f"{streamed} --push_to_hub")
    control("fail", route="commit", status=403, times=None)
    score = "score tester/images --rewards background_darkness --output_dir scored --shard_size 4 --use_cpu"
    codes["refused"] = command(f"{score} --push_to_hub")
    control("clear")
    readme = Path("scored") / "README.md"
    readme.write_text(readme.read_text() + "\nMy own note.\n")
    codes["push"] = command("push scored")
    codes["again"] = command("score tester/scored --rewards jpeg_compressibility --output_dir again --use_cpu")
    codes["as a model"] = command("push scored --hub_model_id tester/wrong")
    return codes


def train() -> dict[str, int]:
    """A run whose first background push arrives and whose others fail; then the command."""
    options = "--model_name_or_path shapes --dataset_name scored --score_column background_darkness --output_dir run "
    options += "--hub_model_id tester/shell --push_to_hub --hub_strategy every_save --hub_always_push --save_steps 1 "
    options += "--per_device_train_batch_size 4 --max_steps 2 --use_cpu --report_to none --disable_tqdm true"
    control("fail", route="commit", status=403, times=None, skip=1)
    codes = {"train": command(f"train {options}")}
    control("clear")
    codes["push the run"] = command("push run --hub_model_id tester/shell")
    codes["token"] = command(f"train {options} --hub_token hf_0123456789012345678901234567890123")
    return codes


def commands() -> dict[str, Any]:
    """Exit codes of all commands, and what they wrote."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        codes = make() | train()
    return {"codes": codes, "stdout": out.getvalue(), "stderr": errors.getvalue()}
