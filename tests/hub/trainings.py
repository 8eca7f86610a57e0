"""A client process of `tests/saving/test_hub_training.py`: trains tiny pipelines and pushes them to a Hub that fails.

    python -m tests.hub.trainings FOLDER NAME [NAME ...]

FOLDER gets the runs; the names are keys of `TINY`, pipelines that are trained and pushed once each. Afterwards the
commands do the same in the folder above. All in one process, since starting one takes longer than most scenarios.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from peft import LoraConfig
from PIL import Image
from safetensors.torch import save_file

from tests import tiny
from tests.conftest import scored_dataset
from tests.hub.commands import command, commands
from tests.hub.control import control
from tests.pipelines import TINY
from tgol_trainer import TGOLConfig, TGOLTrainer
from tgol_trainer.saving.card import CardImage
from tgol_trainer.saving.hub import PushError

api = HfApi()
folder, pushed = Path(sys.argv[1]), sys.argv[2:]


class Log(logging.Handler):
    """Keeps what the library says; `reactions` maps the beginning of a line to what is done when it is said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.reactions: dict[str, Callable[[], Any]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line and react to it."""
        self.lines.append(record.getMessage())
        for beginning, react in self.reactions.items():
            if self.lines[-1].startswith(beginning):
                react()


log = Log()
logging.getLogger("tgol_trainer").addHandler(log)
logging.getLogger("tgol_trainer").setLevel(logging.DEBUG)


def trainer_of(name: str, family: str = "sd", **options: Any) -> TGOLTrainer:
    """A trainer of a tiny pipeline that pushes to tester/NAME."""
    facts = TINY[family]
    settings = {
        "output_dir": str(folder / name),
        "hub_model_id": f"tester/{name}",
        "push_to_hub": True,
        "hub_strategy": "end",
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **facts.settings,
    }
    config = TGOLConfig(**{**settings, **options})
    return TGOLTrainer(facts.build(), config, facts.dataset(), peft_config=LoraConfig(r=4, lora_alpha=12))


def state(name: str, revision: str | None = None) -> dict[str, Any]:
    """What the Hub holds, and what the library said."""
    said, log.lines = log.lines, []
    return {
        "files": api.list_repo_files(f"tester/{name}", revision=revision),
        "commits": [commit.title for commit in api.list_repo_commits(f"tester/{name}", revision=revision)],
        "log": said,
    }


def failure(action: Callable[[], Any]) -> str | None:
    """The message of a failed push; its traceback goes to standard error, as a user would see it."""
    try:
        action()
    except PushError as error:
        traceback.print_exc()
        return str(error)
    return None


def families() -> dict[str, Any]:
    """Each family asked for once, with an image and metrics."""
    for name in pushed:
        trainer = trainer_of(name, name)
        trainer.train()
        output = Path(trainer.args.output_dir)
        output.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(output / "before_after.png")
        (output / "metrics.json").write_text("{}")
        (output / "runs").mkdir()
        (output / "runs" / "events").write_text("x")
        trainer.push_to_hub(pictures=[CardImage("before_after.png", "pictures")])
        save_file({"probe": trainer.family.probe().contiguous()}, folder / f"{name}.safetensors")
    return {name: state(name) for name in pushed}


def strategies() -> dict[str, Any]:
    """Every strategy, with checkpoints deleted while they may still be uploading."""
    found = {}
    for strategy in ("every_save", "checkpoint", "all_checkpoints"):
        saves = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1, "max_steps": 3}
        trainer = trainer_of(strategy, hub_strategy=strategy, hub_always_push=True, **saves)
        trainer.train()
        trainer.push_to_hub(commit_message="The end")
        found[strategy] = {**state(strategy), "left": sorted(path.name for path in (folder / strategy).iterdir())}
    return found


def left_out() -> dict[str, Any]:
    """A push that does not end before training does, so that the next saves come while it runs."""
    control("fail", route="preupload", kind="stall", seconds=120.0)
    log.reactions["Waiting for the push"] = lambda: control("clear")
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    trainer = trainer_of("slow", hub_strategy="all_checkpoints", **saves)
    trainer.train()
    log.reactions.clear()
    during = state("slow")
    trainer.push_to_hub()
    return {"during": during, "after": state("slow")}


def failures() -> dict[str, Any]:
    """A background push and a last push that fail; then the same folder by the command, and nothing trained."""
    saves = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    control("fail", route="commit", status=403, times=None)
    trainer = trainer_of("refused", hub_strategy="checkpoint", **saves)
    trainer.train()
    during = state("refused")
    said = failure(trainer.push_to_hub)
    control("clear")
    code = command(f"push {folder / 'refused'} --hub_model_id tester/refused --hub_strategy checkpoint")
    save_file({"probe": trainer.family.probe().contiguous()}, folder / "refused.safetensors")
    return {"during": during, "failed": trainer.pushes.failed, "said": said, "code": code, "after": state("refused")}


def choices() -> dict[str, Any]:
    """Private, gated, a branch, a message, another name by the command, and a run that never meant to push."""
    options = {"hub_private_repo": True, "hub_gated": "manual", "hub_revision": "v2", "full_finetuning": True}
    config = TGOLConfig(
        output_dir=str(folder / "choices"),
        hub_model_id="tester/choices",
        push_to_hub=True,
        max_steps=1,
        per_device_train_batch_size=4,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    trainer = TGOLTrainer(tiny.stable_diffusion(), config, scored_dataset(4))
    trainer.train()
    trainer.push_to_hub(commit_message="My title")
    info = api.repo_info("tester/choices")
    quiet = trainer_of("quiet", push_to_hub=False, hub_model_id=None)
    quiet.train()
    quiet.save_model()
    card = (folder / "quiet" / "README.md").read_text()
    os.chdir(folder)
    codes = [command(f"push {options}") for options in ("quiet", "quiet --hub_model_id tester/loud", "no")]
    cards = [api.hf_hub_download(f"tester/{name}", "README.md") for name in ("quiet", "loud")]
    return {
        "private": info.private,
        "gated": info.gated,
        "main": api.list_repo_files("tester/choices"),
        **state("choices", "v2"),
        "codes": codes,
        "snippets": [snippet(card), *(snippet(Path(path).read_text()) for path in cards)],
    }


def snippet(card: str) -> str:
    """The line of a card that loads the adapter."""
    return next(line for line in card.splitlines() if "load_lora_weights" in line)


def secrets() -> dict[str, Any]:
    """The token as an argument, with a line end as files have; and one that no header can hold."""
    token = os.environ.pop("HF_TOKEN")
    init = {"model_init_kwargs": {"token": token, "dtype": "float32"}}
    tiny.stable_diffusion().save_pretrained(folder / "base")
    config = TGOLConfig(
        output_dir=str(folder / "marked"),
        hub_token=f"{token}\n",
        hub_model_id="tester/marked",
        push_to_hub=True,
        max_steps=1,
        save_steps=1,
        hub_strategy="checkpoint",
        per_device_train_batch_size=4,
        report_to="tensorboard",
        use_cpu=True,
        **init,
    )
    sys.stdout.write(f"{config}\n{config!r}\n")
    trainer = TGOLTrainer(str(folder / "base"), config, scored_dataset(4))
    trainer.train()
    trainer.push_to_hub()
    control("fail", route="auth-check", status=401, times=None)
    bad = f"{token}\n{token}"
    said = [
        failure(lambda: trainer_of("marked", hub_token=bad)),
        failure(lambda: trainer_of("marked", hub_token=token)),
    ]
    control("clear")
    os.environ["HF_TOKEN"] = token
    return {"said": said, **state("marked")}


if __name__ == "__main__":
    gc.freeze()  # each `train` ends with a full collection, which need not look through what is imported
    results = {}
    for scenario in (families, strategies, left_out, failures, choices, secrets, commands):
        os.chdir(folder.parent)
        start = time.monotonic()
        results[scenario.__name__] = scenario()
        sys.stderr.write(f"{scenario.__name__}: {time.monotonic() - start:.1f} s\n")
    sys.stdout.write(f"\n{json.dumps(results)}\n")
