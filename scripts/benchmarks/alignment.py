"""
Compare losses and thresholds on the shapes model: how much a score gains at equal drift from the base model.

All runs train on the same 1,920 scored images of the embedded model. The gain of a score is measured in standard
deviations of the base model's score. The drift is the mean squared change of the network's output on fixed noised
latents. A run measures its drift while it trains, samples and scores images when the drift passes 1.3, 4 and 10
(×0.001), and then stops. Gains at 2, 5 and 10 are interpolated between these points. All methods of one seed are
compared on the same prompts and noise; each seed has its own.

Each run is one line of JSON. Runs that the file already holds are skipped, so the program can be stopped and started
again, and a file kept in git grows.

    python scripts/benchmarks/alignment.py --stage 1            # every method, one seed, one score
    python scripts/benchmarks/alignment.py --stage 2            # the finalists, five seeds, three scores
    python scripts/benchmarks/alignment.py --stage 3            # rounds with a fifth of the images each
    python scripts/benchmarks/alignment.py --stage 4            # star ratings; one image per prompt
    python scripts/benchmarks/alignment.py --stage 5            # few images, many passes: fixed draws of the reference
    python scripts/benchmarks/alignment.py --quick              # six methods, one seed, one score, 40 updates
    python scripts/benchmarks/alignment.py --report docs        # write tables and a plot from the results file
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
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
NUM_IMAGES, NUM_EVALUATED, NUM_LATENTS = 1920, 96, 384
NUM_SEEDS = 5
MAX_STEPS, BATCH = {1: 80, 2: 64}, 64
SAMPLED_AT, CHECKED_EVERY, CHECKED_LATENTS = (1.3, 4.0, 10.0), 4, 128
SAMPLING = {"num_inference_steps": 15, "guidance_scale": 1.5, "batch_size": 96}
EVALUATION_SEED = 1_000_000

GROUPS = {"group_size": 8, "share_group_noise": True}
PER_PROMPT = {"threshold_strategy": "group", "score_normalization": "zscore"}
MEAN = {**PER_PROMPT, "group_statistic": "mean"}
DISTANCE = {**MEAN, "weight_form": "abs"}
CENTRED = {**DISTANCE, **GROUPS, "log_ratio_centering": "group"}
PAIRS = {**DISTANCE, **GROUPS, "loss_type": "tgol_pairs"}
CSFT_SUFFIXES = [", high quality", ", low quality"]
ORACLE = {"threshold_strategy": "oracle", "reference_samples": True, "score_normalization": "zscore"}
METHODS: dict[str, dict[str, Any]] = {
    "tgo": {},
    "tgo, z-scores": {"score_normalization": "zscore"},
    "tgo, prompts": PER_PROMPT,
    "tgo, prompts, w=d": DISTANCE,
    "tgo, prompts, w=d, shared noise": {**DISTANCE, **GROUPS},
    "tgo, oracle, w=d": {**ORACLE, "weight_form": "abs"},
    "ordinal": {"loss_type": "ordinal", "score_normalization": "zscore"},
    "centred": CENTRED,
    "centred, half": {**CENTRED, "centering_strength": 0.5},
    "pairs, w=d": PAIRS,
    "pairs, w=√d": {**PAIRS, "weight_form": "power", "weight_power": 0.5},
    "dpo": {"loss_type": "dpo", **GROUPS},
    "kto": {"loss_type": "kto"},
    "kto, prompts": {"loss_type": "kto", **PER_PROMPT},
    "nft": {"loss_type": "nft", **MEAN},
    "dro, prompts": {"loss_type": "dro", **MEAN},
    "qrpo": {"loss_type": "qrpo"},
    "sft": {"loss_type": "sft"},
    "csft": {"loss_type": "csft", "csft_suffixes": CSFT_SUFFIXES},
}
"""Name of a method to its fields of `TGOLConfig`, temperature and learning rate aside."""
FIXED = {
    f"tgo, prompts, w=d, {k} fixed": {**DISTANCE, "precompute_ref_log_probs": True, "num_ref_draws": k}
    for k in (1, 4, 16)
}
"""Methods whose reference is computed before training, on k draws per image."""
NUM_ROUNDS = 5
ROUNDS = {"centred, 5 rounds": "centred"}
"""Methods trained in rounds; each round samples a fifth of the images from the current policy."""
STRENGTHS: list[tuple[str, float, float]] = [
    ("tgo, prompts, w=d", 0.016, 2e-4),
    ("tgo, prompts, w=d, shared noise", 0.016, 2e-4),
    ("tgo", 0.001, 1e-3),
    *((method, 0.004, 2e-4) for method in METHODS if method not in ("nft", "sft", "csft")),
    *((method, 0.001, 2e-4) for method in ("sft", "csft", "nft", "centred", "centred, half", "dpo")),
    ("centred", 0.0005, 2e-4),
    ("centred", 0.001, 1e-4),
    ("kto", 0.001, 2e-4),
    ("nft", 0.001, 5e-4),
    ("sft", 0.001, 1e-4),
    ("centred", 0.016, 2e-4),
    ("dpo", 0.0005, 2e-4),
]
"""Runs of stage 1: method, T and learning rate. SFT, CSFT and NFT do not use T."""
OTHERS = {
    ("sft", 0.001, 1e-3): 1,
    ("csft", 0.001, 1e-3): 1,
    ("nft", 0.001, 2e-3): 1,
    ("tgo", 0.001, 1e-3): 1,
}
PAIRED, SWEPT = ("pairs, w=d", "dpo"), (0.002, 0.004, 0.008, 0.016)
FINALISTS: dict[str, dict[tuple[str, float, float], int]] = {
    "background_darkness": {
        ("centred", 0.0005, 3e-4): NUM_SEEDS,
        ("centred", 0.001, 3e-4): NUM_SEEDS,
        **{("pairs, w=d", temperature, 3e-4): NUM_SEEDS for temperature in (0.0007, 0.001)},
        ("pairs, w=√d", 0.001, 3e-4): NUM_SEEDS,
        ("dpo", 0.001, 3e-4): NUM_SEEDS,
        ("kto", 0.004, 5e-4): 3,
        ("tgo, prompts, w=d", 0.016, 3e-4): 3,
        ("tgo", 0.016, 3e-4): 3,
        **OTHERS,
    },
    "left_darkness": {
        ("centred", 0.004, 6e-4): 3,
        ("centred", 0.016, 6e-4): NUM_SEEDS,
        **{(method, temperature, 6e-4): NUM_SEEDS for method in PAIRED for temperature in SWEPT},
        **{("pairs, w=√d", temperature, 6e-4): NUM_SEEDS for temperature in SWEPT[:3]},
        ("kto", 0.016, 6e-4): 3,
        **{(method, 0.016, 1e-3): 3 for method in ("tgo, prompts, w=d", "tgo")},
        **OTHERS,
    },
    "grey_centre": {
        ("centred", 0.004, 3e-4): 3,
        ("centred", 0.016, 3e-4): NUM_SEEDS,
        **{(method, temperature, 3e-4): NUM_SEEDS for method in PAIRED for temperature in SWEPT},
        **{("pairs, w=√d", temperature, 3e-4): NUM_SEEDS for temperature in SWEPT[:3]},
        ("kto", 0.016, 3e-4): 3,
        ("tgo, prompts, w=d", 0.016, 5e-4): NUM_SEEDS,
        ("tgo", 0.016, 3e-4): 3,
        **OTHERS,
    },
}
"""
Runs of stage 2 with their number of seeds, by score. On the two scores that are harder to raise, the learning rate is
one at which a drift of 10 takes about 50 updates at T = 0.016. A smaller T moves less far.
"""
REGIMES: dict[str, dict[tuple[str, float, float], int]] = {
    "stars": {
        ("tgo, z-scores", 0.016, 3e-4): 3,
        ("tgo, prompts, w=d", 0.016, 3e-4): 3,
        ("centred", 0.001, 3e-4): 3,
        ("dpo", 0.001, 3e-4): 3,
    },
    "single": {("tgo, z-scores", 0.016, 3e-4): 2, ("tgo, prompts", 0.016, 3e-4): 2},
    "few": {(method, 0.016, 3e-4): 3 for method in ("tgo, prompts, w=d", *FIXED)},
}
"""
Runs of stages 4 and 5. `stars`: ratings from 1 to 5. `single`: one image per prompt, a tenth of the scores wrong.
`few`: 192 images, so that 64 updates are 21 passes, with fresh draws and with fixed ones.
"""
NUM_FEW = 192
QUICK = ("tgo", "tgo, prompts, w=d", "centred", "pairs, w=d", "dpo", "kto")


@dataclasses.dataclass(frozen=True)
class Run:
    """The settings of one run."""

    method: str
    temperature: float
    learning_rate: float
    score: str
    seed: int
    regime: str = "dense"
    max_steps: int = MAX_STEPS[1]

    def key(self) -> str:
        """Return a text that is equal for equal runs."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)


def left_darkness(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """Score how much darker the left border is than the right one; no prompt mentions it."""
    scores = []
    for image in images:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64) / 255
        scores.append(float(pixels[:, -2:].mean() - pixels[:, :2].mean()))
    return scores


def grey_centre(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """Score one minus the saturation of the centre; it rewards what the prompt's colour forbids."""
    scores = []
    for image in images:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float64)[14:18, 14:18] / 255
        scores.append(float(1 - (pixels.max(2) - pixels.min(2)).mean()))
    return scores


def score_functions() -> dict[str, Callable[[Sequence[Any], Sequence[str]], Sequence[float]]]:
    """Return the three scores that runs train on, then the two that are only measured."""
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


def evaluation_inputs(seed: int) -> tuple[list[str], list[int]]:
    """Return the prompts and image seeds on which the runs of one training seed are compared with the base model."""
    from tgol_trainer.shapes import PROMPTS

    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(NUM_EVALUATED)]
    first = EVALUATION_SEED + seed * NUM_EVALUATED
    return prompts, list(range(first, first + NUM_EVALUATED))


def prepare(folder: Path) -> None:
    """Sample and score the training images and the evaluation images of the base model, unless a run did before."""
    from datasets import Dataset

    from tgol_trainer.evaluation import generate_images
    from tgol_trainer.shapes import PROMPTS, load_pipeline

    if (folder / "base.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    pipeline, rewards = load_pipeline(), score_functions()
    prompts = [PROMPTS[index % len(PROMPTS)] for index in range(NUM_IMAGES)]
    images = generate_images(pipeline, prompts, range(NUM_IMAGES), description="Training images", **SAMPLING)
    scores = {name: list(reward(images, prompts)) for name, reward in rewards.items()}
    Dataset.from_dict({"prompt": prompts, "image": images, **scores}).to_parquet(folder / "train.parquet")
    bases = []
    for seed in range(NUM_SEEDS):
        prompts, seeds = evaluation_inputs(seed)
        images = generate_images(pipeline, prompts, seeds, description="Images of the base model", **SAMPLING)
        bases.append({name: list(reward(images, prompts)) for name, reward in rewards.items()})
    (folder / "base.json").write_text(json.dumps(bases))


def training_rows(folder: Path, run: Run) -> Any:
    """Return the scored images with the scores of a run: as they are, as stars, or one image per prompt."""
    from datasets import Dataset

    rows = Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(folder / "cache"))
    scores = np.asarray(rows[run.score])
    if run.regime == "stars":
        scores = 1.0 + np.searchsorted(np.quantile(scores, [0.1, 0.35, 0.65, 0.9]), scores, side="right")
    elif run.regime == "few":
        rows, scores = rows.select(range(NUM_FEW)), scores[:NUM_FEW]
    elif run.regime == "single":  # each image is a group of its own; one score in ten is that of another image
        rng = np.random.default_rng(run.seed)
        noisy = rng.random(scores.size) < 0.1
        scores = np.where(noisy, rng.permutation(scores), scores)
        rows = rows.add_column("own", list(map(str, range(scores.size))))
    return rows.add_column("score", scores)


class DriftMeter:
    """Measure drift: 1000 times the mean squared difference from the base model's output on fixed noised latents."""

    def __init__(self, rows: Any) -> None:
        import torch

        from tgol_trainer.data import to_pixels
        from tgol_trainer.families import wrap_pipeline
        from tgol_trainer.likelihoods import RowGenerators
        from tgol_trainer.shapes import load_pipeline

        base = wrap_pipeline(load_pipeline())
        self.parts = []
        for start in range(0, NUM_LATENTS, CHECKED_LATENTS):
            indices = range(start, start + CHECKED_LATENTS)
            pixels = torch.stack([to_pixels(rows[index]["image"], (32, 32)) for index in indices])
            geometry = torch.tensor([[32, 32, 0, 0]]).expand(CHECKED_LATENTS, 4)
            generators = RowGenerators(0, 0, indices)
            with torch.no_grad():
                draw = base.likelihood.draw(base.encode_images(pixels, generators, sample=False), generators)
                conditioning = base.condition(rows[start : start + CHECKED_LATENTS]["prompt"], geometry, (32, 32))
                self.parts.append((draw, conditioning, base.predict(base.denoiser, draw, conditioning).double()))

    def __call__(self, family: Any, num_parts: int | None = None) -> float:
        """Return the drift of a trained model, on all latents or on the first parts of 128 each."""
        import torch

        squares = []
        with torch.no_grad():
            for draw, conditioning, output in self.parts[:num_parts]:
                after = family.predict(family.denoiser, draw, conditioning).double()
                squares.append((after - output).square().mean().item())
        return 1000 * float(np.mean(squares))


@functools.cache
def drift_meter(folder: Path) -> DriftMeter:
    """Return the meter of this process; it serves all runs, since they train on the same images."""
    return DriftMeter(training_rows(folder, Run("", 0.0, 0.0, TRAINED[0], 0)))


def measure(family: Any, step: int, run: Run, folder: Path) -> dict[str, Any]:
    """Sample and score images and compare them with the base model's; return one point of a run."""
    from tgol_trainer.evaluation import generate_images

    prompts, seeds = evaluation_inputs(run.seed)
    suffix = CSFT_SUFFIXES[0] if run.method == "csft" else ""
    images = generate_images(
        family.pipeline, [prompt + suffix for prompt in prompts], seeds, progress=False, **SAMPLING
    )
    base = json.loads((folder / "base.json").read_text())[run.seed]
    point: dict[str, Any] = {"step": step, "drift": drift_meter(folder)(family)}
    for name, reward in score_functions().items():
        before, after = np.asarray(base[name]), np.asarray(reward(images, prompts))
        point[name] = {
            "gain": float((after.mean() - before.mean()) / before.std()),
            "win_rate": float(((after > before) + 0.5 * (after == before)).mean()),
        }
    return point


def perform(run: Run, folder: Path) -> dict[str, Any]:
    """Train until the last drift is passed, measuring on the way; return the line of the results file."""
    import torch
    from transformers import TrainerCallback

    from tgol_trainer import TGOLTrainer
    from tgol_trainer.shapes import load_pipeline

    torch.set_num_threads(1)
    start, points, ahead, meter = time.time(), [], list(SAMPLED_AT), drift_meter(folder)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            last = state.global_step == args.max_steps
            drift = meter(trainer.family, 1) if state.global_step % CHECKED_EVERY == 0 else 0.0
            if drift >= ahead[0] or last:
                points.append(measure(trainer.family, state.global_step, run, folder))
                while ahead and drift >= ahead[0]:
                    del ahead[0]
            control.should_training_stop = last or not ahead

    if run.method in ROUNDS:
        points += measured_rounds(run, folder)
    else:
        rows, output = training_rows(folder, run), output_folder(folder, run)
        arguments = training_arguments(run, output, run.max_steps)
        trainer = TGOLTrainer(load_pipeline(), arguments, rows, peft_config=adapter(), callbacks=[Watch()])
        trainer.train()
    return {**dataclasses.asdict(run), "points": points, "seconds": round(time.time() - start, 1)}


def output_folder(folder: Path, run: Run) -> Path:
    """Return the folder of a run."""
    return folder / "runs" / hashlib.blake2b(run.key().encode(), digest_size=8).hexdigest()


def training_arguments(run: Run, output: Path, max_steps: int) -> Any:
    """Return the training arguments of a run."""
    from tgol_trainer import TGOLConfig

    settings = dict((METHODS | FIXED)[ROUNDS.get(run.method, run.method)])
    if run.regime == "single":
        settings |= {"group_column": "own"}
    return TGOLConfig(
        output_dir=str(output),
        per_device_train_batch_size=BATCH,
        max_steps=max_steps,
        learning_rate=run.learning_rate,
        temperature=run.temperature,
        lr_scheduler_type="constant",
        save_strategy="no",
        logging_strategy="no",
        cache_dir=str(output.parent.parent / "cache"),
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=run.seed,
        **settings,
    )


def adapter() -> Any:
    """Return the configuration of the adapter, which is the same for all runs."""
    from peft import LoraConfig

    modules = ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"]
    return LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=modules)


def measured_rounds(run: Run, folder: Path) -> list[dict[str, Any]]:
    """Train in rounds, with as many images in all as other runs have, and measure the policy after each round."""
    import shutil

    from tgol_trainer.families import wrap_pipeline
    from tgol_trainer.rounds import train_rounds
    from tgol_trainer.shapes import PROMPTS, load_pipeline

    def load(path: str | None) -> tuple[Any, str | None]:
        pipeline = load_pipeline()
        if path is not None:
            pipeline.load_lora_weights(path)
        return pipeline, None

    output = output_folder(folder, run)
    shutil.rmtree(output, ignore_errors=True)
    train_rounds(
        "shapes",
        training_arguments(run, output, run.max_steps // NUM_ROUNDS),
        PROMPTS,
        {run.score: lambda: score_functions()[run.score]},
        load,
        num_rounds=NUM_ROUNDS,
        sampling={"images_per_prompt": NUM_IMAGES // NUM_ROUNDS // len(PROMPTS), **SAMPLING},
        trainer_options={"peft_config": adapter()},
    )
    return [
        measure(
            wrap_pipeline(load(str(output / f"round-{number}" / "adapter"))[0]),
            (number + 1) * (run.max_steps // NUM_ROUNDS),
            run,
            folder,
        )
        for number in range(NUM_ROUNDS)
    ]


def planned(stage: int, quick: bool) -> list[Run]:
    """Return the runs of a stage; those that matter most for the comparison come first."""
    if quick:
        return [Run(method, 0.004, 2e-4, TRAINED[0], 0, max_steps=40) for method in QUICK]
    if stage == 1:
        return [Run(*strength, TRAINED[0], 0) for strength in STRENGTHS]
    if stage == 3:
        return [
            Run(method, *strength[1:], TRAINED[0], seed, max_steps=NUM_ROUNDS * 12)
            for seed in range(2)
            for method, plain in ROUNDS.items()
            for strength in FINALISTS[TRAINED[0]]
            if strength[0] == plain and strength[1] == 0.001
        ]
    if stage in (4, 5):
        return [
            Run(*strength, TRAINED[0], seed, regime, MAX_STEPS[2])
            for seed in range(NUM_SEEDS)
            for regime, strengths in REGIMES.items()
            for strength, num_seeds in strengths.items()
            if seed < num_seeds and (regime == "few") == (stage == 5)
        ]
    return [
        Run(*strength, score, seed, max_steps=MAX_STEPS[2])
        for seed in range(NUM_SEEDS)
        for score in TRAINED
        for strength, num_seeds in FINALISTS[score].items()
        if seed < num_seeds
    ]


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the results in a file; an absent file has none."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that are missing in the results file, or write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", type=int, choices=(1, 2, 3, 4, 5), default=1, help="which stage (default: %(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="run six methods with one seed for 40 updates")
    parser.add_argument("--results", type=Path, help="results file (default: results/alignment.jsonl here)")
    parser.add_argument(
        "--data", type=Path, default=Path("alignment_data"), help="image folder (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="number of one-thread processes (default: %(default)s)")
    parser.add_argument("--max_runs", type=int, help="stop after this number of runs")
    parser.add_argument("--report", type=Path, help="only write benchmarks_alignment.md and .png into this folder")
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
    print(f"{len(done)} runs are done, {len(runs)} follow in {args.workers} processes")
    prepare(args.data)
    results.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(perform, run, args.data): run for run in runs}
        for number, future in enumerate(as_completed(futures), 1):
            line = future.result()
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
            reached = ", ".join(
                f"{point[line['score']]['gain']:.2f} at {point['drift']:.1f} (update {point['step']})"
                for point in line["points"]
            )
            print(
                f"{number}/{len(runs)}  {line['method']}, T {line['temperature']:g}, lr {line['learning_rate']:g}, "
                f"{line['regime']} {line['score']}, seed {line['seed']}: gain {reached}; {line['seconds']:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    sys.exit(main())
