"""Name and check the adapters of an evaluation, compare them when all shards exist, and update their model cards."""

from __future__ import annotations

import dataclasses
import logging
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tgol_trainer import __version__
from tgol_trainer._hub_ids import is_hub_id
from tgol_trainer.evaluation import (
    Evaluation,
    ReportOptions,
    compare_models,
    trained_scores,
    write_grids,
    write_results,
)
from tgol_trainer.evaluation.output import DISTRIBUTIONS_NAME, GRID_NAME, file_of
from tgol_trainer.saving.card import CardImage, EvaluationRow, read_facts, update_card
from tgol_trainer.sources import Prompts

from .evaluate import EvaluationJob

logger = logging.getLogger(__name__)

BASE = "base"


def named_adapters(specs: Sequence[str]) -> dict[str, str]:
    """
    Return a name for tables and folders, and the adapter, for each `NAME=ADAPTER` or adapter alone. The latter is
    named after the last part of its path, or after as many parts as tell it from the others.

    Raises:
        ValueError: if two adapters have one name, or one has the name of the base model.
    """
    given: list[tuple[str, str]] = []
    for spec in specs:
        name, separator, source = spec.partition("=")
        given.append((name, source) if separator and not Path(spec).exists() else ("", spec))
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


def spread_prompts(prompts: Prompts, count: int | None) -> Prompts:
    """Return `count` prompts, spread evenly over the set; all if there are no more, or for `None`."""
    if count is None or count >= len(prompts.texts):
        return prompts
    if count < 1:
        raise ValueError(f"`num_prompts` is {count}; it must be at least 1.")
    # Not `evenly_spaced`, which rounds differently: the folders of earlier evaluations keep their prompts.
    rows = np.linspace(0, len(prompts.texts) - 1, count).round().astype(int).tolist()
    categories = None if prompts.categories is None else [prompts.categories[row] for row in rows]
    return dataclasses.replace(prompts, texts=[prompts.texts[row] for row in rows], categories=categories)


def trained_by_adapter(
    adapters: Mapping[str, str], scores: Sequence[str], trained_rewards: Sequence[str] | None
) -> dict[str, frozenset[str] | None]:
    """
    Return the scores that each adapter was trained on, `None` if they are not known. `trained_rewards` are those of
    all adapters; `None` reads them from the files of each.
    """
    found: dict[str, frozenset[str] | None] = {}
    for name, source in adapters.items():
        # A trained reward that is not among the scores leaves no score to mark.
        trained = trained_scores(source, scores) if trained_rewards is None else {*trained_rewards} & {*scores}
        parts = [part for part in scores if trained and any(part.startswith(f"{score}_") for score in trained)]
        found[name] = None if trained is None else frozenset({*trained, *parts})
    return found


def check_adapters(
    adapters: Mapping[str, str], rewards: Sequence[str], trained_rewards: Sequence[str] | None, *, update_cards: bool
) -> None:
    """
    Refuse adapters that cannot be evaluated, and warn of what the result will lack, before any image is made.

    Raises:
        ValueError: for an adapter that is neither a folder nor a Hub id, and for a card that cannot be updated.
    """
    for name, source in adapters.items():
        if not Path(source).expanduser().exists() and not is_hub_id(source):
            raise ValueError(f"`adapters`: {source!r} ({name}) is neither a folder here nor a Hub id (owner/name).")
    unknown = {*(trained_rewards or ())} - {"none", *rewards}
    if unknown:
        logger.warning(
            "`trained_rewards`: %s is not among the rewards (%s), so no score is marked for it.",
            *(", ".join(sorted(unknown)), ", ".join(rewards)),
        )
    for name, trained in trained_by_adapter(adapters, rewards, trained_rewards).items():
        if trained is None:
            if update_cards:
                raise ValueError(
                    f"`update_card`: a card says for each score whether it was trained on, and the files of {name} do "
                    "not tell. Give it: --trained_rewards NAME, or --trained_rewards none."
                )
            logger.warning(
                "%s: its files do not tell which of these scores it was trained on, so none is marked. Give it: "
                "--trained_rewards NAME, or --trained_rewards none.",
                name,
            )
        elif not {*rewards} - trained:
            logger.warning(
                "%s was trained on every score given, so nothing here shows whether it got better by another "
                "measure. Add a reward that it was not trained on; what exists is not made again.",
                name,
            )
        if update_cards:
            read_facts(Path(adapters[name]).expanduser())


def compare_adapters(
    job: EvaluationJob,
    rewards: Sequence[str],
    trained_rewards: Sequence[str] | None,
    prompts: Prompts,
    *,
    prompt_set: str,
    confidence: float,
    megabytes: float,
    seconds: float,
) -> tuple[Evaluation, dict[str, Any]]:
    """
    Compare the models of a job whose shards all exist, and write the tables, the plots, the images and the report.

    Args:
        job ([`EvaluationJob`]): Its first model is the base model, and `settings.revision` the one asked for.
        rewards (`Sequence[str]`): Names of the rewards.
        trained_rewards (`Sequence[str]`, *optional*): As in [`trained_by_adapter`].
        prompts ([`Prompts`]): The prompts, with their categories and revision.
        prompt_set (`str`): Name of the prompts.
        confidence (`float`): Level of the intervals.
        megabytes (`float`): Limit of the report.
        seconds (`float`): Wall-clock seconds so far.

    Returns:
        `tuple`: the [`Evaluation`], and the settings that the report shows.
    """
    adapters = {name: adapter for name, adapter in job.models.items() if adapter is not None}
    scores = job.score_columns(rewards)
    trained = trained_by_adapter(adapters, scores, trained_rewards)
    models = [job.rows(name, scores, trained.get(name)) for name in job.models]
    gallery = job.gallery(prompts.categories)
    evaluation = compare_models(
        gallery.prompts, models[0], models[1:], categories=gallery.categories, confidence=confidence
    )
    source = prompt_set + (f" at {prompts.revision}" if prompts.revision else "")
    settings = _settings(job, adapters, source, evaluation.medium)
    title = f"{', '.join(adapters)} against {job.settings.model}"
    write_grids(job.output_dir, models, gallery)
    write_results(
        job.output_dir,
        evaluation,
        models,
        gallery,
        ReportOptions(title=title, prompt_set=prompt_set, settings=settings, megabytes=megabytes),
        seconds={"total": round(seconds, 1)},
        images_per_prompt=job.settings.images_per_prompt,
        seed=job.settings.seed,
    )
    return evaluation, settings


def _settings(job: EvaluationJob, adapters: Mapping[str, str], prompts: str, medium: str) -> dict[str, Any]:
    """Return how the evaluation was made, for the report and metrics.json."""
    settings = job.settings
    sampling = ", ".join(f"{name}={value}" for name, value in settings.given_sampling().items())
    return {
        "base model": settings.model + (f" at {settings.revision}" if settings.revision else ""),
        **{f"adapter {name}": source for name, source in adapters.items()},
        "prompts": prompts,
        f"{medium}s of each prompt": settings.images_per_prompt,
        "seed": settings.seed,
        "sampling": sampling or "the pipeline's defaults",
        **{
            f"reward {name}": " ".join(filter(None, [facts["model_id"], facts["revision"], facts["scale"]])) or "–"
            for name, facts in job.reward_facts().items()
        },
        "tgol_trainer": __version__,
    }


def update_cards(job: EvaluationJob, evaluation: Evaluation, settings: Mapping[str, Any]) -> list[Path]:
    """
    Write the result into the model cards beside the adapters, with the settings that [`compare_adapters`] returned;
    return the cards.
    """
    fields = {field.name for field in dataclasses.fields(EvaluationRow)}
    medium = evaluation.medium
    images = {
        GRID_NAME: f"{medium.capitalize()}s of the base model beside those of the trained model, not chosen by score",
        DISTRIBUTIONS_NAME: "Distributions of the scores before and after training",
    }
    # A card is public and does not name the folders of this machine.
    prompts = "of a local file" if Path(settings["prompts"]).exists() else settings["prompts"]
    cards = []
    for result in evaluation.adapters:
        target = Path(job.models[result.name] or "").expanduser()
        others = [image for image in read_facts(target).pictures if image.path not in images]
        for name in images:
            shutil.copyfile(job.output_dir / file_of(name, result.name, len(evaluation.adapters)), target / name)
        changes = ", ".join(f"{measure.name} {measure.text()}" for measure in result.measures)
        note = (
            f"{evaluation.num_prompts} prompts ({prompts}), {evaluation.num_rows} {medium}s of each model, "
            f"equal prompts and seeds, {settings['sampling']}. A win is a higher score than the base model's "
            f"{medium}, a tie counts one half; intervals are {100 * result.scores[0].confidence:g} % bootstrap "
            f"intervals over prompts. Change of the base model's mean: {changes}."
        )
        update_card(
            target,
            evaluations=[
                EvaluationRow(**{name: value for name, value in comparison.to_dict().items() if name in fields})
                for comparison in result.scores
            ],
            evaluation_note=note,
            pictures=[*(CardImage(name, alt) for name, alt in images.items()), *others],
        )
        cards.append(target / "README.md")
    return cards
