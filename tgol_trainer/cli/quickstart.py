"""`tgol quickstart`: sample, score, label, train, compare and document on the embedded shapes model."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import plain_errors, program, set_up_logging
from .label import save_label_histogram
from .label_text import report_lines

if TYPE_CHECKING:
    from datasets import Dataset
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

    from tgol_trainer.evaluation import Evaluation
    from tgol_trainer.trainer import TGOLTrainer

SAMPLING: dict[str, Any] = {"num_inference_steps": 12, "guidance_scale": 1.5, "batch_size": 96}
"""DDIM steps and guidance. At 1.5 the shapes model's colours are most faithful; above that they over-saturate."""
TRAINED_SCORES = ["background_darkness", "colour_faithfulness"]
SCORE_WEIGHTS = [1.0, 0.5]
"""They are added in their own standard deviations: darkness alone would cost the shapes some of their colour."""
RECIPE = "anchored"
EVALUATION_SEED = 1_000_000
"""First seed of the evaluation images. Seeds of training images count up from 0 and stay below."""

TARGET_MODULES = ["to_k", "to_q", "to_v", "to_out.0", "conv1", "conv2", "proj_in", "proj_out"]
LEARNING_RATE = 2e-4
"""Learning rate for a network of a million weights. The library's default is meant for larger ones."""


@dataclass
class Quickstart:
    """
    One run. Its steps can be called one by one, as the notebook does.

    Args:
        output_dir (`Path`): Folder of all results.
        num_images (`int`, *optional*, defaults to 480):
            Training images, a multiple of 24 for equal shares of the prompts.
        num_steps (`int`, *optional*, defaults to 104): Updates of 32 images.
        num_evaluation_images (`int`, *optional*, defaults to 192): Images made before and again after training.
        seed (`int`, *optional*, defaults to 0): Seed of sampling and training.
    """

    output_dir: Path
    num_images: int = 480
    num_steps: int = 104
    num_evaluation_images: int = 192
    seed: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def _prompts(self, count: int) -> list[str]:
        from tgol_trainer.shapes import PROMPTS

        return [PROMPTS[index % len(PROMPTS)] for index in range(count)]

    def rewards(self) -> dict[str, Callable[[list[Image], list[str]], Sequence[float | None]]]:
        """The three scores, the trained ones first; higher is better for each."""
        from tgol_trainer.rewards import jpeg_compressibility
        from tgol_trainer.shapes import background_darkness, colour_faithfulness

        return {
            "background_darkness": background_darkness,
            "colour_faithfulness": colour_faithfulness,
            "jpeg_compressibility": jpeg_compressibility,
        }

    def sample_dataset(self, pipeline: DiffusionPipeline) -> Dataset:
        """Generate images with the base model, score them, and write them as Parquet with one column per score."""
        from datasets import Dataset, Features, Value
        from datasets import Image as ImageFeature

        from tgol_trainer.evaluation import generate_images

        start = time.time()
        prompts = self._prompts(self.num_images)
        seeds = list(range(self.seed * self.num_images, (self.seed + 1) * self.num_images))
        images = generate_images(pipeline, prompts, seeds, description="Sampling a dataset", **SAMPLING)
        scores = {name: reward(images, prompts) for name, reward in self.rewards().items()}
        dataset = Dataset.from_dict(
            {"prompt": prompts, "image": images, **scores, "seed": seeds},
            features=Features(
                {
                    "prompt": Value("string"),
                    "image": ImageFeature(),
                    **{name: Value("float64") for name in scores},
                    "seed": Value("int64"),
                }
            ),
        )
        folder = self.output_dir / "dataset"
        folder.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(folder / "train.parquet")
        self.seconds["sampling"] = time.time() - start
        return dataset

    def evaluation_images(self, pipeline: DiffusionPipeline, description: str) -> list[Image]:
        """Generate the evaluation images: the same prompts and seeds at every call."""
        from tgol_trainer.evaluation import generate_images

        start = time.time()
        count = self.num_evaluation_images
        seeds = range(EVALUATION_SEED, EVALUATION_SEED + count)
        images = generate_images(pipeline, self._prompts(count), seeds, description=description, **SAMPLING)
        self.seconds["evaluation"] = self.seconds.get("evaluation", 0.0) + time.time() - start
        return images

    def trainer(self, pipeline: Any, dataset: Dataset, callbacks: list[Any] | None = None) -> TGOLTrainer:
        """Make the trainer, with a recipe of the method and a LoRA for a network of a million weights."""
        from peft import LoraConfig

        from tgol_trainer.config import TGOLConfig
        from tgol_trainer.trainer import TGOLTrainer

        return TGOLTrainer(
            model=pipeline,
            args=TGOLConfig.from_recipe(
                RECIPE,
                output_dir=str(self.output_dir),
                score_columns=TRAINED_SCORES,
                score_weights=SCORE_WEIGHTS,
                per_device_train_batch_size=32,
                max_steps=self.num_steps,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                save_strategy="no",
                report_to="none",
                use_cpu=True,
                dataloader_pin_memory=False,
                seed=self.seed,
            ),
            train_dataset=dataset,
            peft_config=LoraConfig(r=8, lora_alpha=8, init_lora_weights="gaussian", target_modules=TARGET_MODULES),
            callbacks=callbacks,
        )

    def evaluate(self, before: list[Image], after: list[Image]) -> Evaluation:
        """Compare images of equal prompts and seeds, and write tables, plot, images and report."""
        from tgol_trainer.evaluation import (
            ReportOptions,
            compare_models,
            make_gallery,
            save_before_after_grid,
            score_model,
            write_results,
        )

        prompts = self._prompts(self.num_evaluation_images)
        models = [
            score_model(name, images, prompts, self.rewards(), trained=trained)
            for name, images, trained in (
                ("base", before, frozenset()),
                ("quickstart", after, frozenset(TRAINED_SCORES)),
            )
        ]
        evaluation = compare_models(prompts, models[0], models[1:])
        shown = slice(0, 24)
        darkness = tuple(model.scores[TRAINED_SCORES[0]][shown] for model in models)
        save_before_after_grid(
            self.output_dir / "before_after.png",
            prompts[shown],
            before[shown],
            after[shown],
            columns=4,
            scores={"darkness": (darkness[0], darkness[1])},
        )
        settings = {name: value for name, value in SAMPLING.items() if name != "batch_size"}
        write_results(
            self.output_dir,
            evaluation,
            models,
            make_gallery(prompts, [before, after]),
            ReportOptions(
                title="The shapes model before and after the quickstart",
                settings={**settings, "first seed": EVALUATION_SEED},
            ),
            seconds={name: round(value, 1) for name, value in self.seconds.items()},
            seed=self.seed,
            num_images=self.num_images,
            num_steps=self.num_steps,
        )
        return evaluation

    def write_card(self, trainer: TGOLTrainer, evaluation: Evaluation) -> None:
        """Put the comparison and its images into the model card."""
        from tgol_trainer.saving.card import CardImage, EvaluationRow

        names = set(EvaluationRow.__dataclass_fields__)
        trainer.create_model_card(
            evaluations=[
                EvaluationRow(**{key: value for key, value in item.to_dict().items() if key in names})
                for item in evaluation.adapters[0].scores
            ],
            evaluation_note=(
                f"{self.num_evaluation_images} images before and after training, equal prompts and seeds, DDIM 12 "
                "steps, guidance 1.5. A win is a higher score than the base model's image; intervals are 95 % "
                "bootstrap intervals over prompts. A fall of jpeg_compressibility means larger files, so damage."
            ),
            pictures=[
                CardImage("before_after.png", "Images of the base model beside those of the trained model"),
                CardImage("score_distributions.png", "Distributions of the scores before and after training"),
            ],
        )


def _progress_callback() -> Any:
    """Trainer's progress bar, with the log on the bar instead of one dictionary per line."""
    from transformers.trainer_callback import ProgressCallback

    class CompactProgress(ProgressCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            if self.training_bar is not None:
                self.training_bar.set_description("Training")

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if self.training_bar is not None and logs and "loss" in logs:
                self.training_bar.set_postfix(
                    loss=f"{logs['loss']:.3f}", accuracy=f"{logs['rewards/accuracies']:.2f}", refresh=False
                )

    return CompactProgress


def _show_labels(folder: Path, dataset: Dataset) -> None:
    """Print what `tgol label` prints for the dataset, and draw the histogram."""
    from tgol_trainer.config import MethodArguments, recipe_fields
    from tgol_trainer.data import Columns
    from tgol_trainer.data.scores import read_scores
    from tgol_trainer.labels.advice import advise
    from tgol_trainer.labels.dry_run import dry_run
    from tgol_trainer.thresholds import combined_name

    method = MethodArguments(**recipe_fields(RECIPE), score_columns=TRAINED_SCORES, score_weights=SCORE_WEIGHTS)
    columns = Columns(score=combined_name(TRAINED_SCORES, method.score_combination))
    rows = read_scores(dataset, columns, score_columns=TRAINED_SCORES)
    report, scores = dry_run(rows, method, columns, group_column=columns.prompt)
    save_label_histogram(folder / "score_histogram.png", report, scores)
    print()
    for line in report_lines(report, advise(report)):
        print(line)
    print()


def _train(trainer: TGOLTrainer) -> None:
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(_progress_callback())
    trainer.train()
    trainer.save_model()


def run(quickstart: Quickstart) -> Evaluation:
    """Run every step and print its results."""
    from tgol_trainer.evaluation import format_measures, format_table
    from tgol_trainer.shapes import load_pipeline

    start = time.time()
    folder = quickstart.output_dir
    pipeline = load_pipeline()
    print("1/4  Sampling and scoring a dataset from the embedded shapes model")
    dataset = quickstart.sample_dataset(pipeline)
    before = quickstart.evaluation_images(pipeline, "Images before")

    print("2/4  Labelling")
    _show_labels(folder, dataset)

    print(f"3/4  Training a LoRA for {quickstart.num_steps} updates")
    training_start = time.time()
    trainer = quickstart.trainer("shapes", dataset)
    _train(trainer)
    quickstart.seconds["training"] = time.time() - training_start

    print("4/4  Loading the saved adapter into a fresh pipeline and comparing")
    fresh = load_pipeline()
    fresh.load_lora_weights(folder)
    after = quickstart.evaluation_images(fresh, "Images after")
    quickstart.seconds["total"] = time.time() - start
    evaluation = quickstart.evaluate(before, after)
    quickstart.write_card(trainer, evaluation)
    quickstart.seconds["total"] = time.time() - start
    adapter = evaluation.adapters[0]
    print(f"\n{format_table(adapter.scores)}\n\n{format_measures(adapter.measures)}\n")
    return evaluation


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol quickstart",
        description="Align the embedded shapes model towards dark backgrounds on a CPU: sample, score, label, train, "
        "compare, document. About a minute and a half on 2 cores.",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        default=Path("quickstart_output"),
        help="folder of all results (default: %(default)s)",
    )
    parser.add_argument("--num_images", type=int, default=480, help="training images to sample (default: %(default)s)")
    parser.add_argument("--num_steps", type=int, default=104, help="updates of 32 images (default: %(default)s)")
    parser.add_argument(
        "--num_evaluation_images",
        type=int,
        default=192,
        help="images compared before and after (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling and training (default: %(default)s)")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error("--seed must be at least 0 and below 2**32")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir: {args.output_dir} is a file; name another folder")
    if args.num_images < 32:
        parser.error("--num_images must be at least 32, one batch")
    if args.num_steps < 1 or args.num_evaluation_images < 24:
        parser.error("--num_steps must be at least 1 and --num_evaluation_images at least 24, one a prompt")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """
    Run the quickstart.

    Args:
        argv (`Sequence[str]`, *optional*): Options; by default those of the process.

    Returns:
        `int`: 0.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    print("Loading libraries", flush=True)
    set_up_logging()
    import torch
    from datasets.utils.logging import disable_progress_bar
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # These bars show downloads and maps that take a moment here. Ours show what takes time.
    disable_progress_bar()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    quickstart = Quickstart(**vars(args))
    with plain_errors():
        run(quickstart)
    folder = args.output_dir
    print(f"Took {quickstart.seconds['total']:.0f} s on {torch.get_num_threads()} threads. Look at:")
    for name, text in (
        ("report.html", "every image before and after, by change of score; tables and plots"),
        ("before_after.png", "images of equal prompts and seeds"),
        ("score_distributions.png", "the scores before and after; score_histogram.png shows the labels"),
        ("README.md", "the model card, with a snippet that loads the adapter"),
        ("metrics.json", "the numbers above"),
    ):
        print(f"  {folder / name}  {text}")
    print(
        f"Next, rate its pictures by your own taste, and train on that: {program()} rate {folder / 'dataset'} "
        f"--model_name_or_path shapes --output_dir {folder / 'ratings'}"
    )
    print(
        f"Or train on a dataset of your own; on this one: {program()} train --model_name_or_path shapes "
        f"--dataset_name {folder / 'dataset'} --score_column jpeg_compressibility --recipe {RECIPE} "
        "--per_device_train_batch_size 32 --num_train_epochs 8 --learning_rate 2e-4 --output_dir my_adapter"
    )
    return 0
