"""Push ratings to the Hub as a dataset of images with their scores, while people rate and at the end."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
from huggingface_hub import CommitInfo, HfApi, snapshot_download

from tgol_trainer._files import write_file
from tgol_trainer._hub_ids import is_hub_id
from tgol_trainer.saving.card import DatasetCardFacts, ScoreFacts, write_dataset_card
from tgol_trainer.saving.hub import PushError, Repository, push_files
from tgol_trainer.sources.ratings import IMAGES, JOURNAL, SETTINGS, Journal, convert_rated, is_rated, read_settings

logger = logging.getLogger(__name__)

METADATA = "metadata.jsonl"
PUSH_SECONDS = 300
"""Between two pushes while people rate. The Hub limits the commits of an hour."""

_STAGING = "_push"
_SCALES = {"ratings": "1 to 5, mean over people", "thumbs": "share of thumbs up", "pairs": "share of comparisons won"}


def fetch_ratings(target: Repository, folder: Path) -> None:
    """
    Bring the ratings that a dataset on the Hub holds into a folder that has none, to go on with them.

    Args:
        target ([`hub.Repository`]): The dataset.
        folder (`Path`): Output folder of `tgol rate`.

    Raises:
        PushError: if the Hub does not answer.
    """
    if is_rated(folder):
        return
    with target.explained(f"reading {target.id}"):
        api = HfApi(token=target.token)
        if not api.file_exists(target.id, SETTINGS, repo_type="dataset", revision=target.revision):
            return
        snapshot_download(
            target.id,
            repo_type="dataset",
            revision=target.revision,
            token=target.token,
            local_dir=folder,
            allow_patterns=[SETTINGS, JOURNAL, f"{IMAGES}/*"],
        )
    logger.info("%s: going on with the ratings of %s.", folder, target.id)


def push_ratings(target: Repository, folder: str | Path, message: str) -> CommitInfo:
    """
    Push the rated images, their scores as `metadata.jsonl`, the journal and a card.

    Args:
        target ([`hub.Repository`]): As [`hub.open_repository`] returned it, of kind `"dataset"`.
        folder (`str` or `Path`): Output folder of `tgol rate`.
        message (`str`): Title of the commit.

    Returns:
        `huggingface_hub.CommitInfo`

    Raises:
        DataError: if nothing is rated.
        PushError: if the push fails.
    """
    folder = Path(folder)
    dataset = convert_rated(folder).dataset
    raters = {entry["rater"] for entry in Journal(folder).rated()}
    stage = folder / _STAGING
    shutil.rmtree(stage, ignore_errors=True)
    try:
        # What is uploaded must not change meanwhile, and people go on rating.
        medium = read_settings(folder).medium
        names = _stage_files(dataset, medium, stage)
        rows = dataset.remove_columns(medium).to_list()
        lines = [{"file_name": name, **row} for name, row in zip(names, rows, strict=True)]
        write_file(stage / METADATA, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        for name in (SETTINGS, JOURNAL):
            shutil.copyfile(folder / name, stage / name)
        if (folder / "README.md").is_file():
            shutil.copyfile(folder / "README.md", stage / "README.md")
        write_dataset_card(_facts(target.id, folder, dataset, len(raters)), stage)
        shutil.copyfile(stage / "README.md", folder / "README.md")
        files = {path.relative_to(stage).as_posix(): path for path in sorted(stage.rglob("*")) if path.is_file()}
        return push_files(target, stage, files, message)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stage_files(dataset: datasets.Dataset, medium: str, stage: Path) -> list[str]:
    """Link the images or videos of a dataset into a folder, and return their names there."""
    (stage / IMAGES).mkdir(parents=True)
    names = []
    kind = type(dataset.features[medium])
    for file in dataset.cast_column(medium, kind(decode=False))[medium]:
        source = Path(file["path"])
        names.append(f"{IMAGES}/{source.name}")
        place = stage / names[-1]
        if place.exists():  # one file under two prompts
            continue
        try:
            os.link(source, place)
        except OSError:
            shutil.copyfile(source, place)
    return names


def _facts(repository: str, folder: Path, dataset: datasets.Dataset, raters: int) -> DatasetCardFacts:
    settings = read_settings(folder)
    scores = np.array(dataset["score"])
    values = np.percentile(scores, [0, 25, 50, 75, 100]).tolist()
    score = ScoreFacts("score", "people, with `tgol rate`", scale=_SCALES[settings.kind])
    score.statistics = {"mean": float(scores.mean()), "std": float(scores.std())}
    score.statistics |= dict(zip(("min", "25 %", "median", "75 %", "max"), values, strict=True))
    counts, edges = np.histogram(scores, bins=min(10, len(np.unique(scores))))
    score.histogram = [(float(edge), int(count)) for edge, count in zip(edges, counts, strict=False)]
    kinds = {name: str(getattr(kind, "dtype", "")) for name, kind in dataset.features.items()}
    return DatasetCardFacts(
        repository=repository,
        num_rows=len(dataset),
        columns={**kinds, settings.medium: settings.medium},
        scores=[score],
        source=settings.source if is_hub_id(settings.source) else None,
        source_revision=settings.revision,
        raters=raters,
        data_files=[METADATA, f"{IMAGES}/*"],
    )


@contextlib.contextmanager
def pushing(target: Repository, folder: Path, journal: Journal) -> Iterator[None]:
    """
    Push what is new every [`PUSH_SECONDS`] while a block runs. A push that fails is logged; the next one sends it too.

    Args:
        target ([`hub.Repository`]): The dataset.
        folder (`Path`): Output folder.
        journal ([`Journal`]): Its ratings.
    """
    ended = threading.Event()

    def work() -> None:
        pushed = journal.rated()
        while not ended.wait(PUSH_SECONDS):
            rated = journal.rated()
            if not rated or rated == pushed:
                continue
            try:
                push_ratings(target, folder, f"{len(rated)} ratings")
                pushed = rated
            except (PushError, ValueError, OSError) as error:
                logger.warning(
                    "The ratings are saved here and not yet on the Hub; the next push sends them. %s", error
                )

    thread = threading.Thread(target=work, name="tgol-rate-push", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
