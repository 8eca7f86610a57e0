"""Push a complete folder of shards to the Hub as a dataset, with a card that describes its content."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet
from huggingface_hub import CommitInfo, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from tqdm.auto import tqdm

from tgol_trainer._files import write_json
from tgol_trainer.data import DataError
from tgol_trainer.families import hub_license
from tgol_trainer.saving.card import DatasetCardFacts, ScoreFacts, write_dataset_card
from tgol_trainer.saving.hub import Repository, push_files
from tgol_trainer.shapes import EMBEDDED
from tgol_trainer.sources.shards import REWARDS, incomplete, missing_shards, read_rewards

from .score import note_rewards

logger = logging.getLogger(__name__)

_SOURCE = ".source.json"
_MADE_BY = ("model", "revision", "adapter", "settings")
_SHOWN = 5
_BINS = 16


def note_source(folder: str | Path, name: str | None, revision: str | None = None) -> None:
    """
    Record the source of the rows for the card: Hub id of a dataset or name of a set of prompts, `None` for a source on
    this machine, and its commit.
    """
    write_json(Path(folder) / _SOURCE, {"name": name, "revision": revision})


def carry_rewards(folder: str | Path, source: str, revision: str | None, columns: Sequence[str]) -> None:
    """
    Copy the facts of the scores that came with the rows from the `rewards.json` of their source, for these columns
    alone. The source is a folder of `tgol score`, its folder `data`, or a dataset on the Hub; another source has no
    such facts.
    """
    path = Path(source).expanduser()
    if path.exists():
        found = read_rewards(path.resolve().parent if path.resolve().name == "data" else path)
    else:
        try:
            file = hf_hub_download(source, REWARDS, repo_type="dataset", revision=revision)
        except EntryNotFoundError:
            return
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    kept = {name: [column for column in facts["columns"] if column in columns] for name, facts in found.items()}
    note_rewards(Path(folder), {name: {**found[name], "columns": names} for name, names in kept.items() if names})


def check_complete(folder: str | Path) -> None:
    """Raise a [`DataError`] if [`missing_shards`] finds any."""
    missing, total = missing_shards(folder)
    if missing:
        raise DataError(
            f"{missing} of {total} shards of {folder} are not there, so nothing was pushed. Run the command that "
            "makes them again, then push."
        )


def check_source_complete(source: str) -> None:
    """Raise a [`DataError`] for a local folder that `tgol generate` or `tgol score` has not filled yet."""
    folder = Path(source).expanduser()
    lacking = incomplete(folder)
    if lacking is not None:
        raise DataError(
            f"`source`: {lacking} Then score. To score only the shards that exist, name the files: {folder / 'data'}"
        )


def wait_for_shards(folder: str | Path, patience: float = 1800.0, pause: float = 2.0) -> None:
    """
    Wait until other processes have made their shards of `tgol generate` or `tgol score`.

    Args:
        folder (`str` or `Path`): Output folder.
        patience (`float`, *optional*, defaults to 1800): Seconds without a new shard after which waiting ends.
        pause (`float`, *optional*, defaults to 2): Seconds between two checks.

    Raises:
        DataError: if no new shard comes; the message names the command that pushes later.
    """
    missing, total = missing_shards(folder)
    since = time.monotonic()
    with tqdm(total=total, initial=total - missing, desc="Shards", unit="shard", disable=not missing) as bar:
        while missing:
            if time.monotonic() - since > patience:
                raise DataError(
                    f"{missing} of {total} shards of {folder} are not there, so nothing was pushed. Make them with "
                    f"the same command, then run `tgol push {folder}`."
                )
            time.sleep(pause)
            left, _ = missing_shards(folder)
            if left < missing:
                since = time.monotonic()
            bar.update(missing - left)
            missing = left


def push_dataset(target: Repository, folder: str | Path, message: str) -> CommitInfo:
    """
    Write the card of a complete folder of shards and push both; shards that the Hub has are not sent again.

    Args:
        target ([`hub.Repository`]): As [`hub.open_repository`] returned it, of kind `"dataset"`.
        folder (`str` or `Path`): Output folder of `tgol generate` or `tgol score`.
        message (`str`): Title of the commit.

    Returns:
        `huggingface_hub.CommitInfo`: the last commit.

    Raises:
        DataError: if shards are missing.
        PushError: if the push fails.
    """
    folder = Path(folder)
    check_complete(folder)
    shards = sorted((folder / "data").glob("train-*.parquet"))
    write_dataset_card(_facts(target.id, folder, shards), folder)
    beside = [path for path in (folder / "README.md", folder / REWARDS) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path for path in [*beside, *shards]}
    return push_files(target, folder, files, message)


def _facts(repository: str, folder: Path, shards: list[Path]) -> DatasetCardFacts:
    features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(shards[0]))
    kinds = {name: type(kind).__name__.lower() for name, kind in features.items()}
    kinds |= {
        name: str(features[name].dtype)
        for name, kind in kinds.items()
        if kind not in ("image", "video") and getattr(features[name], "dtype", None)
    }
    rows = sum(pyarrow.parquet.read_metadata(shard).num_rows for shard in shards)
    scored = {column: facts for facts in read_rewards(folder).values() for column in facts["columns"]}
    source = folder / _SOURCE
    known = json.loads(source.read_text(encoding="utf-8")) if source.is_file() else {}
    return DatasetCardFacts(
        repository=repository,
        num_rows=rows,
        columns=kinds,
        scores=[_score(column, facts, shards) for column, facts in scored.items() if column in features],
        source=known.get("name"),
        source_revision=known.get("revision"),
        generators=_generators(shards, set(features)),
        video="video" in kinds.values(),
    )


def _read(shards: list[Path], columns: list[str]) -> pyarrow.Table:
    return pyarrow.concat_tables(pyarrow.parquet.read_table(shard, columns=columns) for shard in shards)


def _score(column: str, facts: dict[str, Any], shards: list[Path]) -> ScoreFacts:
    values = _read(shards, [column])[column].to_numpy().astype(float)
    good = values[np.isfinite(values)]
    found = ScoreFacts(
        column,
        facts.get("model_id") or facts.get("name"),
        facts.get("revision"),
        facts.get("scale") or "",
        missing=len(values) - len(good),
    )
    if len(good):
        quartiles = np.percentile(good, [0, 25, 50, 75, 100]).tolist()
        found.statistics = {"mean": float(good.mean()), "std": float(good.std())}
        found.statistics |= dict(zip(("min", "25 %", "median", "75 %", "max"), quartiles, strict=True))
        counts, edges = np.histogram(good, bins=min(_BINS, len(np.unique(good))))
        found.histogram = [(float(edge), int(count)) for edge, count in zip(edges, counts, strict=False)]
    return found


def _generators(shards: list[Path], columns: set[str]) -> list[dict[str, Any]]:
    """Return the models that made the rows, the most frequent first, if there are such columns."""
    names = [name for name in _MADE_BY if name in columns]
    if "model" not in names:
        return []
    counted = (
        _read(shards, names).group_by(names).aggregate([([], "count_all")]).sort_by([("count_all", "descending")])
    )
    found = [{name: row[name] for name in names} for row in counted.to_pylist()[:_SHOWN]]
    for made in found:
        for name in {"model", "adapter"} & made.keys():
            path = made[name] or ""
            if path and path not in EMBEDDED and Path(path).expanduser().exists():
                logger.warning("The column `%s` holds %r, a path of this machine, which becomes public.", name, path)
        model = made["model"] or ""
        if model in EMBEDDED:
            made["license"] = "apache-2.0"
        elif "/" in model and not Path(model).expanduser().exists():
            made["license"] = hub_license(model, made.get("revision")).get("license")
    return found
