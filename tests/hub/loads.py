"""A client process of `tests/saving/test_hub_training.py`: with an empty cache, loads what another process pushed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.pipelines import TINY
from tgol_trainer.families import load_family


def equal(family: str, repository: str, probe: Path) -> tuple[bool, bool]:
    """Whether a fresh pipeline differs from what was trained, and equals it with the adapter of the Hub."""
    fresh = load_family(TINY[family].build())
    trained, base = load_file(probe)["probe"], fresh.probe()
    TINY[family].load(fresh.pipeline, repository)
    return not torch.equal(base, trained), torch.equal(fresh.probe(), trained)


def use() -> dict[str, Any]:
    """What another person does with an empty cache: load, train, name the source."""
    from datasets import load_dataset

    from tgol_trainer import TGOLConfig, TGOLTrainer
    from tgol_trainer.sources import load_scored_dataset

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


def code_of_others() -> dict[str, Any]:
    """A model and a dataset whose repositories hold programs: what loading them says, and whether a program ran."""
    from huggingface_hub import HfApi

    from tgol_trainer.sources import load_scored_dataset

    api, marker = HfApi(), Path("marker").resolve()
    program = f"open({str(marker)!r}, 'w').close()\n"
    index = json.dumps({"_class_name": ["pipeline", "Evil"], "_diffusers_version": "0.40.0"})
    said = {}
    for name, kind, files in (
        ("evil", "model", {"model_index.json": index, "pipeline.py": program}),
        ("evil", "dataset", {"evil.py": program}),
    ):
        api.create_repo(name, repo_type=kind)
        for path, content in files.items():
            api.upload_file(
                repo_id=f"tester/{name}", repo_type=kind, path_or_fileobj=content.encode(), path_in_repo=path
            )
        try:
            load_family("tester/evil") if kind == "model" else load_scored_dataset("tester/evil")
        except Exception as error:  # whatever refuses it
            said[kind] = f"{type(error).__name__}: {error}"
    return {"said": said, "ran": marker.exists()}


if __name__ == "__main__":
    folder, names = Path(sys.argv[1]), sys.argv[2:]
    found: dict[str, Any] = {"equal": {}}
    for name in names:
        family, _, run = name.partition("=")
        found["equal"][run or family] = equal(
            family, f"tester/{run or family}", folder / f"{run or family}.safetensors"
        )
    sys.stdout.write(f"\n{json.dumps(found | {'used': use(), 'others': code_of_others()})}\n")
