"""
Runs that are killed with SIGKILL and started again by the same command, as a job that is queued again.

    python -m tests.kills ROOT SCENARIO KILLS SEED

prints what `killed` returns as JSON; for the scenario that pushes, which needs the environment of a client of the Hub.
"""

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download
from peft import LoraConfig
from safetensors.torch import load_file

from tests.conftest import SMALL, scored_dataset
from tests.tiny import stable_diffusion
from tgol_trainer import TGOLConfig, TGOLTrainer

WEIGHTS = "pytorch_lora_weights.safetensors"
STEPS = {"save_strategy": "steps", "save_steps": 1, "max_steps": 6, "lr_scheduler_type": "constant"}
STEPS |= {"save_total_limit": 2}
PER_RUN = 3
"""Kills of one run, before it is left to end."""


def trained(folder, lora=True, **options):
    """Train in a folder, on from what is there; return the trainer."""
    args = TGOLConfig(output_dir=str(folder), **{**SMALL, **STEPS, **options})
    peft_config = LoraConfig(r=4, lora_alpha=8) if lora else None
    trainer = TGOLTrainer(stable_diffusion(), args, scored_dataset(), peft_config=peft_config)
    trainer.train(resume_from_checkpoint=True)
    if not trainer.already_saved:
        trainer.save_model()
    return trainer


def lora(root):
    trained(root / "run")


def full(root):
    trained(root / "run", lora=False, full_finetuning=True, learning_rate=1e-4)


def cache(root):
    """Killed while the encodings and the reference's errors are computed, these in batches of 8."""
    import tgol_trainer.caching.filling as filling

    filling._SHARD_SECONDS = 0.0  # a file for each entry
    trained(root / "run", cache_dir=str(root / "cache"), precompute_ref_log_probs=True, num_ref_draws=2)


def rounds(root):
    from tgol_trainer.rounds import train_rounds
    from tgol_trainer.shapes import PROMPTS, background_darkness, load_pipeline

    def load(adapter):
        from tgol_trainer.adapters import load_trained

        pipeline = load_pipeline()
        if adapter is not None:
            load_trained(pipeline, "unet", adapter)
        return pipeline, None

    settings = {**SMALL, **STEPS, "per_device_train_batch_size": 4}
    train_rounds(
        "shapes",
        TGOLConfig(output_dir=str(root / "run"), **settings),
        PROMPTS[:2],
        {"background_darkness": lambda: background_darkness},
        load,
        num_rounds=2,
        sampling={"images_per_prompt": 4, "num_inference_steps": 2, "guidance_scale": 1.5, "batch_size": 4},
        trainer_options={"peft_config": LoraConfig(r=2, lora_alpha=4, target_modules=["to_q"])},
    )


def push(root):
    hub = {"push_to_hub": True, "hub_model_id": f"tester/{root.name}", "hub_strategy": "checkpoint"}
    trained(root / "run", hub_always_push=True, **hub).push_to_hub()


SCENARIOS = {"lora": lora, "full": full, "cache": cache, "rounds": rounds, "push": push}


def run(scenario, root, kill_at, counts):
    """Run a scenario in this process, killed at a change below its folder; the changes are counted into a file."""
    watched = root / "cache" if scenario == "cache" else root
    changes = []

    def watch(event, arguments):
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod") and arguments:
            changed = event != "open" or set(str(arguments[1])) & set("wax+")
            if changed and str(arguments[0]).startswith(str(watched)):
                changes.append(event)
                if len(changes) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    SCENARIOS[scenario](root)
    counts.write_text(str(len(changes)))
    os._exit(0)


def start(scenario, root, kill_at=None, after=None):
    """Run it in a process of its own, killed after some changes or seconds; return its exit code."""
    root.mkdir(exist_ok=True)
    counts = root.with_name(f"{root.name}.changes")
    process = multiprocessing.get_context("fork").Process(target=run, args=(scenario, root, kill_at, counts))
    process.start()
    process.join(after)
    if process.is_alive() and after is not None:
        process.kill()
    process.join()
    return process.exitcode


def killed(scenario, place, kills, seed, timed=0.3, seconds=3.0):
    """
    Kill runs of a scenario `kills` times in all, at random changes of files and random times; let each end.

    Returns:
        `dict`: the folder of an unbroken run, those of the killed ones, kills by kind, exit codes that are wrong.
    """
    dice, whole = random.Random(seed), place / "whole"
    found = {"whole": str(whole), "runs": [], "at changes": 0, "at times": 0, "wrong": []}
    if start(scenario, whole):
        found["wrong"].append("the unbroken run")
    changes = int((place / "whole.changes").read_text())
    while found["at changes"] + found["at times"] < kills:
        root = place / f"run-{len(found['runs'])}"
        found["runs"].append(str(root))
        for _ in range(PER_RUN):
            by_time = dice.random() < timed
            if by_time:
                code = start(scenario, root, after=dice.uniform(0, seconds))
            else:
                code = start(scenario, root, kill_at=dice.randint(1, changes))
            if code == -signal.SIGKILL:
                found["at times" if by_time else "at changes"] += 1
            elif code:
                found["wrong"].append(f"{root.name}: exit code {code}")
        if (code := start(scenario, root)) != 0:
            found["wrong"].append(f"{root.name}: exit code {code} of the last start")
    return found


def on_the_hub(root):
    """Whether the repository of a run holds its files as they lie in the run's folder."""
    repository, folder = f"tester/{root.name}", root / "run"
    names = [name for name in HfApi().list_repo_files(repository) if "/" not in name and name != ".gitattributes"]
    same = [Path(hf_hub_download(repository, name)).read_bytes() == (folder / name).read_bytes() for name in names]
    return WEIGHTS in names and all(same)


def weights(root):
    """The weights below a run's folder by their place; the adapter for ComfyUI has the name of the repository."""
    folder = Path(root, "run")
    files = {file: str(file.relative_to(folder)) for file in sorted(folder.rglob("*.safetensors"))}
    return {place.replace(f"{Path(root).name}_comfyui", "comfyui"): load_file(file) for file, place in files.items()}


if __name__ == "__main__":
    place, scenario, kills, seed = sys.argv[1:]
    result = killed(scenario, Path(place), int(kills), int(seed), seconds=6.0)
    result["pushed"] = [on_the_hub(Path(root)) for root in [result["whole"], *result["runs"]]]
    sys.stdout.write(f"\n{json.dumps(result)}\n")
