"""`tgol evaluate`: a base model against adapters on the same prompts and seeds, with a report of every image."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgol_trainer._hub_ids import is_hub_id

from .console import json_object, plain_errors, set_up_logging
from .generate import device_of, load_generator

if TYPE_CHECKING:
    from tgol_trainer.evaluation import Evaluation
    from tgol_trainer.jobs import EvaluationJob
    from tgol_trainer.sources import Prompts

BASE = "base"
_SAMPLING = ("num_inference_steps", "guidance_scale", "height", "width", "num_frames", "fps")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol evaluate",
        description="Make images with a base model and with adapters from the same prompts and seeds, score them, "
        "and write metrics.json, tables.md, plots and report.html. The same command continues after a kill.",
    )
    parser.add_argument("--model_name_or_path", required=True, help="base model: Hub id, folder, or `shapes`")
    parser.add_argument(
        "--adapters",
        required=True,
        nargs="+",
        metavar="[NAME=]ADAPTER",
        help="folders or Hub ids of adapters, or folders of fully fine-tuned weights; names are for the tables",
    )
    parser.add_argument("--prompts", required=True, help="text file, table, dataset, or a named set (hpsv2, ...)")
    parser.add_argument("--rewards", required=True, nargs="+", help="names (docs/rewards.md) or your module:function")
    parser.add_argument("--output_dir", required=True, type=Path, help="where everything goes")
    parser.add_argument(
        "--trained_rewards",
        nargs="+",
        metavar="REWARD",
        help="rewards the adapters were trained on, or `none` (default: as their folders tell)",
    )
    prompts = parser.add_argument_group("prompts and images")
    prompts.add_argument("--prompt_column", help="column of a table (default: prompt, caption or text)")
    prompts.add_argument("--category_column", help="column of a table with the category of each prompt")
    prompts.add_argument("--split", default="train", help="split of a dataset (default: %(default)s)")
    prompts.add_argument("--num_prompts", type=int, help="so many, spread evenly over the set (default: all)")
    prompts.add_argument(
        "--images_per_prompt", type=int, default=1, help="2 or more measure diversity too (default: %(default)s)"
    )
    prompts.add_argument("--num_inference_steps", type=int, help="default: the pipeline's")
    prompts.add_argument("--guidance_scale", type=float, help="default: the pipeline's")
    prompts.add_argument("--height", type=int, help="pixels (default: the pipeline's)")
    prompts.add_argument("--width", type=int, help="pixels (default: the pipeline's)")
    prompts.add_argument("--num_frames", type=int, help="frames of a video (default: the pipeline's)")
    prompts.add_argument("--fps", type=int, help="frames a second of a video (default: that of `tgol generate`)")
    prompts.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    prompts.add_argument("--features", help="reward with image features (clip, ...) or module:function, for diversity")
    work = parser.add_argument_group("work")
    work.add_argument("--model_revision", help="revision of the model on the Hub")
    work.add_argument("--dtype", help="torch dtype of the pipeline, such as bfloat16 (default: float32)")
    work.add_argument("--model_init_kwargs", type=json_object, help="JSON passed to `from_pretrained` of the pipeline")
    work.add_argument("--batch_size", type=int, help="images a call (default: that of `tgol generate`)")
    work.add_argument("--scoring_batch_size", type=int, help="images scored a call (default: 32; videos 2)")
    work.add_argument(
        "--mean_over_frames", type=int, help="score videos with rewards of images: the mean over so many frames"
    )
    work.add_argument("--one_at_a_time", action="store_true", help="keep one reward in memory at a time")
    work.add_argument("--shard_size", type=int, default=64, help="images a file (default: %(default)s)")
    work.add_argument("--drop_images", action="store_true", help="delete images once scored; small copies stay")
    work.add_argument("--use_cpu", action="store_true", help="leave a GPU unused")
    result = parser.add_argument_group("result")
    result.add_argument("--report_megabytes", type=float, default=50, help="limit of report.html (default: 50)")
    result.add_argument("--confidence", type=float, default=0.95, help="level of the intervals (default: 0.95)")
    result.add_argument(
        "--update_card", action="store_true", help="write the result into the model cards in the adapters' folders"
    )
    return parser.parse_args(argv)


def named_adapters(specs: Sequence[str]) -> dict[str, str]:
    """
    Give every adapter a name for tables and folders.

    Args:
        specs (`Sequence[str]`):
            `NAME=ADAPTER`, or an adapter alone, named after its last part, or as much of it as tells it from others.

    Returns:
        `dict[str, str]`: name to adapter.

    Raises:
        ValueError: if two have one name, or one is named like the base model.
    """
    given: list[tuple[str | None, str]] = []
    for spec in specs:
        name, separator, source = spec.partition("=")
        given.append((name, source) if separator and not Path(spec).exists() else (None, spec))
    names: dict[str, str] = {}
    for number, (chosen, source) in enumerate(given):
        parts = [part for part in re.split(r"[\\/]", source) if part not in ("", ".", "..")] or [source]
        others = [re.split(r"[\\/]", other.rstrip("/\\")) for place, (_, other) in enumerate(given) if place != number]
        length = 1
        while length < len(parts) and any(other[-length:] == parts[-length:] for other in others):
            length += 1
        found = re.sub(r"[^\w.+-]+", "-", chosen or "-".join(parts[-length:])).strip(".-") or "adapter"
        if found in names or found == BASE:
            taken = "the base model's" if found == BASE else f"that of {names[found]!r} too"
            raise ValueError(f"`adapters`: the name {found!r} of {source!r} is {taken}. Name it: NAME={source}.")
        names[found] = source
    return names


def _trained(args: argparse.Namespace, adapters: dict[str, str], scores: Sequence[str]) -> dict[str, Any]:
    """Return the trained scores of each adapter, `None` where they are not known."""
    from tgol_trainer.evaluation import trained_scores

    if args.trained_rewards is None:
        found = {name: trained_scores(source, scores) for name, source in adapters.items()}
    else:
        # A reward that was trained on and is not among the scores is as good as none here.
        found = dict.fromkeys(adapters, frozenset(args.trained_rewards) & frozenset(scores))
    parts = {score: {part for part in scores if part.startswith(f"{score}_")} for score in scores}
    return {
        name: None if trained is None else trained.union(*(parts[score] for score in trained))
        for name, trained in found.items()
    }


def _check_before(args: argparse.Namespace, adapters: dict[str, str]) -> None:
    """Say what the result will lack, and refuse what cannot be done, before any image is made."""
    import logging

    from tgol_trainer.rewards import find_reward
    from tgol_trainer.saving.card import read_facts

    for spec in (*args.rewards, *filter(None, [args.features])):
        find_reward(spec)
    rewards = [_name(spec) for spec in args.rewards]
    for name, source in adapters.items():
        if not Path(source).expanduser().exists() and not is_hub_id(source):
            raise ValueError(f"`adapters`: {source!r} ({name}) is no folder here and no Hub id (owner/name).")
    unknown = set(args.trained_rewards or ()) - {"none"} - set(rewards)
    log = logging.getLogger("tgol_trainer.evaluate")
    if unknown:
        log.warning(
            "`trained_rewards`: %s is not among the rewards (%s), so no score is marked for it.",
            *(", ".join(sorted(unknown)), ", ".join(rewards)),
        )
    for name, trained in _trained(args, adapters, rewards).items():
        if trained is None:
            if args.update_card:
                raise ValueError(
                    f"`update_card`: a card says of each score whether it was trained on, and the files of {name} do "
                    "not tell. Say it: --trained_rewards NAME, or --trained_rewards none."
                )
            log.warning(
                "%s: its files do not tell which of these scores it was trained on, so none is marked. Say it: "
                "--trained_rewards NAME, or --trained_rewards none.",
                name,
            )
        elif not set(rewards) - trained:
            log.warning(
                "%s was trained on every score given, so nothing here shows whether its images got better by "
                "another measure. Add a reward that it was not trained on; images that exist are not made again.",
                name,
            )
        if args.update_card:
            read_facts(Path(adapters[name]).expanduser())


def _chosen_prompts(args: argparse.Namespace) -> Prompts:
    import dataclasses

    import numpy as np

    from tgol_trainer.sources import load_prompts

    prompts = load_prompts(
        args.prompts, column=args.prompt_column, category_column=args.category_column, split=args.split
    )
    if args.num_prompts is None or args.num_prompts >= len(prompts.texts):
        return prompts
    if args.num_prompts < 1:
        raise ValueError(f"`num_prompts` is {args.num_prompts}; it must be at least 1.")
    rows = np.linspace(0, len(prompts.texts) - 1, args.num_prompts).round().astype(int).tolist()
    categories = prompts.categories
    return dataclasses.replace(
        prompts,
        texts=[prompts.texts[row] for row in rows],
        categories=[categories[row] for row in rows] if categories else None,
    )


def _features(spec: str, device: str) -> Any:
    from tgol_trainer.rewards import REWARDS, load_reward

    found = load_reward(spec, device=device)
    if spec in REWARDS and not hasattr(found, "image_features"):
        raise ValueError(f"`features`: {spec!r} has no image features. Use clip, pickscore or hpsv2.1.")
    return getattr(found, "image_features", found)


def _settings(
    args: argparse.Namespace, adapters: dict[str, str], job: EvaluationJob, prompts: Prompts
) -> dict[str, Any]:
    """Return how the evaluation was made, for the report and metrics.json."""
    from tgol_trainer import __version__

    return {
        "base model": args.model_name_or_path + (f" at {args.model_revision}" if args.model_revision else ""),
        **{f"adapter {name}": source for name, source in adapters.items()},
        "prompts": args.prompts + (f" at {prompts.revision}" if prompts.revision else ""),
        "images of each prompt": args.images_per_prompt,
        "seed": args.seed,
        "sampling": ", ".join(f"{name}={value}" for name, value in job.sampling.items()) or "the pipeline's defaults",
        **{
            f"reward {name}": " ".join(filter(None, [facts["model_id"], facts["revision"], facts["scale"]])) or "–"
            for name, facts in job.reward_facts().items()
        },
        "tgol_trainer": __version__,
    }


def _update_cards(folder: Path, adapters: dict[str, str], evaluation: Evaluation, settings: dict[str, Any]) -> None:
    """Bring evaluation and images of the cards beside the adapters up to date."""
    from tgol_trainer.evaluation.output import DISTRIBUTIONS_NAME, GRID_NAME, file_of
    from tgol_trainer.saving.card import CardImage, EvaluationRow, read_facts, update_card

    fields = set(EvaluationRow.__dataclass_fields__)
    for result in evaluation.adapters:
        target = Path(adapters[result.name]).expanduser()
        images = {
            GRID_NAME: "Images of the base model beside those of the trained model, not chosen by score",
            DISTRIBUTIONS_NAME: "Distributions of the scores before and after training",
        }
        others = [image for image in read_facts(target).pictures if image.path not in images]
        for name in images:
            shutil.copyfile(folder / file_of(name, result.name, len(adapters)), target / name)
        changes = ", ".join(f"{measure.name} {measure.text()}" for measure in result.measures)
        # A card is public and says nothing of this machine's folders.
        source = "of a local file" if Path(settings["prompts"]).exists() else settings["prompts"]
        note = (
            f"{evaluation.num_prompts} prompts ({source}), {evaluation.num_rows} images of each model, "
            f"equal prompts and seeds, {settings['sampling']}. A win is a higher score than the base model's image, "
            f"a tie counts one half; intervals are {100 * result.scores[0].confidence:g} % bootstrap intervals over "
            f"prompts. Change of the base model's mean: {changes}."
        )
        rows = [
            EvaluationRow(**{key: value for key, value in comparison.to_dict().items() if key in fields})
            for comparison in result.scores
        ]
        update_card(
            target,
            evaluations=rows,
            evaluation_note=note,
            pictures=[*(CardImage(name, alt) for name, alt in images.items()), *others],
        )
        print(f"  {target / 'README.md'}  its evaluation and images are up to date")


def _finish(
    args: argparse.Namespace, job: EvaluationJob, adapters: dict[str, str], prompts: Prompts, start: float
) -> None:
    """Compare, write the files, and print the tables."""
    from tgol_trainer.evaluation import compare_models, format_measures, format_table, write_grids, write_results

    scores = job.score_columns([_name(spec) for spec in args.rewards])
    trained = _trained(args, adapters, scores)
    models = [job.rows(name, scores, trained.get(name)) for name in job.models]
    gallery = job.gallery(prompts.categories)
    evaluation = compare_models(
        gallery.prompts, models[0], models[1:], categories=gallery.categories, confidence=args.confidence
    )
    settings = _settings(args, adapters, job, prompts)
    write_grids(args.output_dir, models, gallery)
    write_results(
        args.output_dir,
        evaluation,
        models,
        gallery,
        title=f"{', '.join(adapters)} against {args.model_name_or_path}",
        prompt_set=args.prompts,
        seconds={"total": round(time.time() - start, 1)},
        settings=settings,
        megabytes=args.report_megabytes,
        images_per_prompt=args.images_per_prompt,
        seed=args.seed,
    )
    for adapter in evaluation.adapters:
        print(f"\n{adapter.name} against the base model\n{format_table(adapter.scores)}")
        print(f"\n{format_measures(adapter.measures)}")
    if evaluation.notices:
        print("\nNote:\n" + "\n".join(f"  {notice}" for notice in evaluation.notices))
    print(f"\n  {args.output_dir / 'report.html'}  tables, plots, and the images by change of score")
    print(f"  {args.output_dir / 'tables.md'}  the tables; metrics.json has the numbers")
    if args.update_card:
        _update_cards(args.output_dir, adapters, evaluation, settings)


def _name(spec: str) -> str:
    return spec.rpartition(":")[2]


def main(argv: Sequence[str] | None = None) -> int:
    """
    Do this process's share, and write the report if it is the last to finish.

    Args:
        argv (`Sequence[str]`, *optional*):
            Options; by default those of the process.

    Returns:
        `int`: 0.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    start = time.time()
    set_up_logging()
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.jobs import EvaluationJob, run_evaluation
    from tgol_trainer.rewards import load_reward

    with plain_errors():
        disable_progress_bar()  # one bar a file, over ours
        adapters = named_adapters(args.adapters)
        _check_before(args, adapters)
        prompts = _chosen_prompts(args)
        device = device_of(args.use_cpu)
        job = EvaluationJob(
            args.output_dir,
            {BASE: None, **adapters},
            prompts.texts,
            images_per_prompt=args.images_per_prompt,
            seed=args.seed,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            model=args.model_name_or_path,
            sampling={name: value for name in _SAMPLING if (value := getattr(args, name)) is not None},
        )
        options = {"revision": args.model_revision, "dtype": args.dtype, "use_cpu": args.use_cpu}
        options |= {"model_init_kwargs": args.model_init_kwargs, "num_frames": args.num_frames}
        missing = run_evaluation(
            job,
            lambda adapter: load_generator(args.model_name_or_path, adapter=adapter, **options),
            {_name(spec): partial(load_reward, spec, device=device) for spec in args.rewards},
            features=None if args.features is None else partial(_features, args.features, device),
            one_at_a_time=args.one_at_a_time,
            keep_images=not args.drop_images,
            batch_size=args.scoring_batch_size,
            mean_over_frames=args.mean_over_frames,
        )
        if missing:
            print(f"This process is done; {missing} shards are with others. The last to finish writes the report.")
            return 0
        _finish(args, job, adapters, prompts, start)
    return 0
