"""
How far do different losses and thresholds align the shapes model, and at what price?

All runs train on the same 1,920 scored pictures of the embedded model, and are compared on the same prompts and seeds.
A run is one line of JSON: gain of each score in standard deviations of the base's, win rate, and drift, the mean
squared change of the network's output on fixed noised latents. Runs that a file already holds are passed over, so the
program resumes, and a file kept in git grows.

    python scripts/benchmarks/alignment.py --stage 1            # every method, three strengths, one seed, one score
    python scripts/benchmarks/alignment.py --stage 2            # the finalists, five seeds, three scores
    python scripts/benchmarks/alignment.py --quick              # six methods, two strengths, 60 updates
    python scripts/benchmarks/alignment.py --report docs        # a table and a plot from the lines there are
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
NUM_IMAGES, NUM_EVALUATED, NUM_LATENTS = 1920, 192, 384
NUM_STEPS, BATCH = 150, 64
SAMPLING = {"num_inference_steps": 15, "guidance_scale": 1.5, "batch_size": 96}
EVALUATION_SEED = 1_000_000

GROUPS = {"group_size": 8, "share_group_noise": True}
PER_PROMPT = {"threshold_strategy": "group", "score_normalization": "zscore"}
METHODS: dict[str, dict[str, Any]] = {
    "tgo": {},
    "tgo, z-scores": {"score_normalization": "zscore"},
    "tgo, prompts": PER_PROMPT,
    "tgo, prompts, w=d": {**PER_PROMPT, "group_statistic": "mean", "weight_form": "abs"},
    "tgo, prompts, w=d, shared noise": {**PER_PROMPT, "group_statistic": "mean", "weight_form": "abs", **GROUPS},
    "tgo, oracle, w=d": {
        "threshold_strategy": "oracle",
        "reference_samples": True,
        "score_normalization": "zscore",
        "weight_form": "abs",
    },
    "ordinal": {"loss_type": "ordinal", "score_normalization": "zscore"},
    "centred": {**PER_PROMPT, "weight_form": "abs", "log_ratio_centering": "group", **GROUPS},
    "centred, half": {
        **PER_PROMPT,
        "weight_form": "abs",
        "log_ratio_centering": "group",
        "centering_strength": 0.5,
        **GROUPS,
    },
    "dpo": {"loss_type": "dpo", **GROUPS},
    "kto": {"loss_type": "kto"},
    "kto, prompts": {"loss_type": "kto", **PER_PROMPT},
    "nft, prompts": {"loss_type": "nft", **PER_PROMPT, "group_statistic": "mean"},
    "dro, prompts": {"loss_type": "dro", **PER_PROMPT, "group_statistic": "mean"},
    "qrpo": {"loss_type": "qrpo"},
    "sft": {"loss_type": "sft"},
    "csft": {"loss_type": "csft"},
}
"""Name to fields of `TGOLConfig`."""
QUICK = ("tgo", "tgo, prompts, w=d", "centred, half", "dpo", "kto", "sft")
FINALISTS = ("tgo", "tgo, prompts, w=d", "centred, half", "dpo", "kto", "nft, prompts", "sft", "csft")
LEARNING_RATES = (2e-4, 5e-4, 1e-3)
REGIMES = ("dense", "stars", "single")


@dataclasses.dataclass(frozen=True)
class Run:
    """One line of results: what was trained, and how hard."""

    method: str
    score: str
    learning_rate: float
    seed: int
    regime: str = "dense"
    num_steps: int = NUM_STEPS

    def key(self) -> str:
        """Return what makes a run the same as one that a file holds."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def left_darkness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """How much darker the left border is than the right one: a score that no prompt has a say in."""
    scores = []
    for image in images:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        scores.append(float(pixels[:, -2:].mean() - pixels[:, :2].mean()))
    return scores


def grey_centre(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """One minus the saturation of the centre: what it rewards, the prompt's colour forbids."""
    scores = []
    for image in images:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)[14:18, 14:18] / 255
        scores.append(float(1 - (pixels.max(2) - pixels.min(2)).mean()))
    return scores


def score_functions() -> dict[str, Callable[[Sequence[Any], Sequence[str]], Sequence[float]]]:
    """The three scores trained on, then those that only watch."""
    from tgol_trainer.rewards import jpeg_compressibility
    from tgol_trainer.shapes import background_darkness, colour_faithfulness

    return {
        "background_darkness": background_darkness,
        "left_darkness": left_darkness,
        "grey_centre": grey_centre,
        "colour_faithfulness": colour_faithfulness,
        "jpeg_compressibility": jpeg_compressibility,
    }


TRAINED = ("background_darkness", "left_darkness", "grey_centre")


def evaluation_inputs() -> tuple[list[str], list[int]]:
    """Prompts and seeds on which base and adapters are compared."""
    from tgol_trainer.shapes import PROMPTS

    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(NUM_EVALUATED)]
    return prompts, list(range(EVALUATION_SEED, EVALUATION_SEED + NUM_EVALUATED))


def prepare(folder: Path) -> None:
    """Sample and score the training pictures and the base's evaluation pictures, once."""
    from datasets import Dataset

    from tgol_trainer.evaluation import generate_images
    from tgol_trainer.shapes import PROMPTS, load_pipeline

    if (folder / "base.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, rewards = load_pipeline(), score_functions()
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(NUM_IMAGES)]
    images = generate_images(pipeline, prompts, range(NUM_IMAGES), description="Training pictures", **SAMPLING)
    scores = {name: list(reward(images, prompts)) for name, reward in rewards.items()}
    Dataset.from_dict({"prompt": prompts, "image": images, **scores}).to_parquet(folder / "train.parquet")
    prompts, seeds = evaluation_inputs()
    images = generate_images(pipeline, prompts, seeds, description="The base's pictures", **SAMPLING)
    base = {name: list(reward(images, prompts)) for name, reward in rewards.items()}
    (folder / "base.json").write_text(json.dumps(base))


def training_rows(folder: Path, run: Run) -> Any:
    """The scored pictures in the regime of a run."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(folder / "cache"))
    scores = np.asarray(rows[run.score])
    if run.regime == "stars":
        scores = 1.0 + np.searchsorted(np.quantile(scores, [0.1, 0.35, 0.65, 0.9]), scores, side="right")
    elif run.regime == "single":  # each picture a prompt of its own, one score in ten from another picture
        rng = np.random.default_rng(run.seed)
        noisy = rng.random(scores.size) < 0.1
        scores = np.where(noisy, rng.permutation(scores), scores)
        rows = rows.add_column("own", list(map(str, range(scores.size))))
    return rows.add_column("score", scores)


def drift(before: Any, after: Any, rows: Any) -> float:
    """1000 times the mean squared difference of two networks' outputs on noised latents of the first pictures."""
    import torch

    from tgol_trainer.backbones import wrap_pipeline
    from tgol_trainer.data import to_pixels
    from tgol_trainer.families import RowGenerators

    backbones = [wrap_pipeline(pipeline) for pipeline in (before, after)]
    pixels = torch.stack([to_pixels(image, (32, 32)) for image in rows["image"][:NUM_LATENTS]])
    geometry = torch.tensor([[32, 32, 0, 0]]).expand(NUM_LATENTS, 4)
    generators = RowGenerators(0, 0, range(NUM_LATENTS))
    with torch.no_grad():
        latents = backbones[0].encode_images(pixels, generators, sample=False)
        draw = backbones[0].family.draw(latents, generators)
        outputs = []
        for backbone in backbones:
            conditioning = backbone.condition(rows["prompt"][:NUM_LATENTS], geometry, (32, 32))
            outputs.append(backbone.predict(backbone.denoiser, draw, conditioning).double())
    return 1000 * (outputs[0] - outputs[1]).square().mean().item()


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Train, sample, score; return the line of a run."""
    import torch
    from peft import LoraConfig

    from tgol_trainer import TGOLConfig, TGOLTrainer
    from tgol_trainer.evaluation import generate_images
    from tgol_trainer.shapes import load_pipeline

    torch.set_num_threads(1)
    start = time.time()
    rows = training_rows(folder, run)
    settings = dict(METHODS[run.method])
    if run.regime == "single":
        settings |= {"group_column": "own"}
    output = folder / "runs" / hashlib.blake2b(run.key().encode(), digest_size=8).hexdigest()
    trainer = TGOLTrainer(
        load_pipeline(),
        TGOLConfig(
            output_dir=str(output),
            per_device_train_batch_size=BATCH,
            max_steps=run.num_steps,
            learning_rate=run.learning_rate,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=run.seed,
            **settings,
        ),
        rows,
        peft_config=LoraConfig(
            r=8,
            lora_alpha=8,
            init_lora_weights="gaussian",
            target_modules=["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"],
        ),
    )
    trainer.train()
    pipeline = trainer.backbone.pipeline
    prompts, seeds = evaluation_inputs()
    suffix = trainer.args.csft_suffixes[0] if trainer.args.loss_type == "csft" else ""
    images = generate_images(pipeline, [prompt + suffix for prompt in prompts], seeds, progress=False, **SAMPLING)
    base = json.loads((folder / "base.json").read_text())
    line: dict[str, Any] = {**dataclasses.asdict(run), "drift": drift(load_pipeline(), pipeline, rows)}
    for name, reward in score_functions().items():
        before, after = np.asarray(base[name]), np.asarray(reward(images, prompts))
        line[name] = {
            "gain": float((after.mean() - before.mean()) / before.std()),
            "win_rate": float(((after > before) + 0.5 * (after == before)).mean()),
        }
    return line | {"seconds": round(time.time() - start, 1)}


def planned(stage: int, quick: bool) -> list[Run]:
    """The runs of a stage, those that decide most first."""
    if quick:
        return [Run(method, TRAINED[0], rate, 0, num_steps=60) for method in QUICK for rate in LEARNING_RATES[1:]]
    if stage == 1:
        return [Run(method, TRAINED[0], rate, 0) for rate in LEARNING_RATES for method in METHODS]
    dense = [
        Run(method, score, rate, seed)
        for seed in range(5)
        for score in TRAINED
        for rate in LEARNING_RATES
        for method in FINALISTS
    ]
    other = [
        Run(method, TRAINED[0], 5e-4, seed, regime)
        for regime in REGIMES[1:]
        for seed in range(5)
        for method in ("tgo", "tgo, prompts", "tgo, prompts, w=d")
    ]
    return dense + other


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The results that a file holds."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Perform the runs that are missing, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2), default=1, help="which runs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="six methods, two strengths, one seed, 60 updates")
    parser.add_argument("--results", type=Path, help="file of lines (default: results/alignment.jsonl beside this)")
    parser.add_argument("--data", type=Path, default=Path("alignment_data"), help="pictures (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each (default: %(default)s)")
    parser.add_argument("--max_runs", type=int, help="stop after so many")
    parser.add_argument("--report", type=Path, help="write benchmarks_alignment.md and .png here and run nothing")
    args = parser.parse_args(argv)
    name = "alignment_quick.jsonl" if args.quick else "alignment.jsonl"
    results = args.results or HERE / "results" / name
    if args.report is not None:
        from alignment_report import write_report

        print(write_report(read_lines(results), args.report))
        return 0
    fields = [field.name for field in dataclasses.fields(Run)]
    done = {Run(**{name: line[name] for name in fields}).key() for line in read_lines(results)}
    runs = [run for run in planned(args.stage, args.quick) if run.key() not in done][: args.max_runs]
    print(f"{len(done)} runs are there, {len(runs)} to do with {args.workers} processes")
    prepare(args.data)
    results.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(perform, run, args.data): run for run in runs}
        for number, future in enumerate(as_completed(futures), 1):
            line = future.result()
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            gain = line[line["score"]]["gain"]
            print(
                f"{number}/{len(runs)}  {line['method']}, {line['score']}, lr {line['learning_rate']:g}, seed "
                f"{line['seed']}: gain {gain:.2f}, drift {line['drift']:.2f}, {line['seconds']:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
