"""Make rows of a folder without a table: prompts and scores out of its files, and out of what lies beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
from tqdm.auto import tqdm

from tgol_trainer import __version__
from tgol_trainer.data.images import DataError, readable_formats
from tgol_trainer.data.rows import Columns

from .files import DARKTABLE, read_file
from .folders import IMAGES, VIDEOS, rows_of_split
from .found import PROMPT_FROM, SCORE_FROM, UNREAD, found_in

logger = logging.getLogger(__name__)

_GOOD = ("good", "like", "liked", "likes", "yes", "keep", "kept", "up", "positive", "best", "chosen")
_BAD = ("bad", "dislike", "disliked", "dislikes", "no", "reject", "rejected", "down", "negative", "worst")
_WORDS = dict.fromkeys(_GOOD, 1.0) | dict.fromkeys(_BAD, 0.0)
_SKIPPED = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
_SHOWN = 3


def load_image_folder(
    folder: Path, files: list[str], split: str, columns: Columns, *, folder_scores: bool = False
) -> datasets.Dataset:
    """
    Make a row of each image, or of each video where there are no images.

    Args:
        folder (`Path`): The folder.
        files (`list[str]`): Images and videos in it, of [`files_below`].
        split (`str`): Split. Folders called `train`, `test`, `val` and the like are splits.
        columns ([`Columns`]): Names of the columns.
        folder_scores (`bool`, *optional*, defaults to `False`):
            Take the scores from names of folders: numbers, or words such as `good` (1) and `bad` (0).

    Returns:
        [`datasets.Dataset`] with the columns of `columns`; `negative_prompt`, `seed` (digits), `settings` (JSON); and
        `prompt_from`, `score_from` and `unread`, which say where prompt and score were found, or why not. The score
        column is left out if no file has a score.

    Raises:
        DataError: if the split has no files, or if names of folders mix numbers and words.
    """
    images = [name for name in files if name.lower().endswith(IMAGES)]
    medium, names = ("image", images) if images else ("video", files)
    if images and len(images) < len(files):
        logger.warning("%s: its %d videos are not used beside images.", folder, len(files) - len(images))
    chosen = rows_of_split(names, folder, split)
    names = [name for name, kept in zip(names, chosen, strict=True) if kept]
    scores = scores_by_folders(folder, names) if folder_scores else None
    kind = datasets.Image() if medium == "image" else datasets.Video(decode=False)
    texts = ("negative_prompt", "seed", "settings", PROMPT_FROM, SCORE_FROM, UNREAD)
    names_of = {"prompt": columns.prompt, "score": columns.score}
    features = datasets.Features(
        {
            columns.image if medium == "image" else columns.video or "video": kind,
            columns.prompt: datasets.Value("string"),
            columns.score: datasets.Value("float64"),
            **{name: datasets.Value("string") for name in texts},
        }
    )
    settings = {"visual": next(iter(features)), "names": names_of, "folder_scores": scores}
    dataset = datasets.Dataset.from_generator(
        _rows,
        features=features,
        gen_kwargs={"folder": str(folder), "files": names, "stamp": stamp_of(folder), "settings": settings},
        split=datasets.NamedSplit(split),
    )
    found = found_in(dataset) or {}
    for name, places in found.items():
        logger.info("%s: %s: %s", folder, name, places)
    warn_of_unread(folder, names, dataset)
    warn_of_first_stars(folder, dataset, columns.score)
    words = sorted({part for name in names for part in Path(name).parts[:-1] if part.lower() in _WORDS})
    if words and not found["scores"].places:
        logger.warning("%s: no file has a score. To take the folders %s for scores: `--folder_scores`.", folder, words)
    if not found["scores"].places:
        dataset = dataset.remove_columns([columns.score, SCORE_FROM])
    return dataset


def files_below(folder: Path) -> list[str]:
    """
    Return images and videos below a folder, sorted. Hidden files are passed over. Links that lead out of the folder
    are not followed, with a warning.
    """
    root, found, outside = folder.resolve(), [], []
    for place, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        folders[:] = [
            name for name in folders if name not in links and not name.startswith(".") and name not in _SKIPPED
        ]
        media = [name for name in files if name.lower().endswith(IMAGES + VIDEOS) and not name.startswith(".")]
        for name in (*media, *links):
            path = Path(place, name)
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                outside.append(path.relative_to(folder).as_posix())
            elif name in media and path.is_file():  # not a pipe, which would be waited for
                found.append(path.relative_to(folder).as_posix())
    if outside:
        logger.warning(
            "%s: links that lead out of the folder are not followed: %d (%s). Copy what they lead to into the folder.",
            *(folder, len(outside), ", ".join(sorted(outside)[:_SHOWN])),
        )
    return sorted(found)


def stamp_of(folder: Path) -> str:
    """Return a hash of names, sizes and times below a folder: what was found is read again once one changes."""
    # A format may be read once its package is installed.
    stamp = hashlib.blake2b(f"{__version__} {readable_formats()}".encode(), digest_size=16)
    for place, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(files):
            try:
                status = os.stat(os.path.join(place, name))
            except OSError:
                continue
            stamp.update(f"{place}/{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return stamp.hexdigest()


def _rows(folder: str, files: list[str], stamp: str, settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows; `stamp` is there for the cache of `datasets` alone."""
    names, scores = settings["names"], settings["folder_scores"]
    for name in tqdm(files, desc=f"Reading {Path(folder).name}", unit="file", disable=len(files) < 500):
        path = Path(folder, name)
        found = read_file(path, Path(folder))
        if scores is not None:
            score = scores.get(name)
            found = dataclasses.replace(found, score=score, score_from=None if score is None else "names of folders")
        row = {names.get(key, key): value for key, value in dataclasses.asdict(found).items()}
        yield {settings["visual"]: str(path.absolute()), **row}


def scores_by_folders(folder: Path, names: list[str]) -> dict[str, float]:
    """Return the score of each file by the nearest folder above it that is called by a number or a word for one."""
    scores: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for name in names:
        for part in reversed(Path(name).parts[:-1]):
            score = _WORDS.get(part.lower())
            kind = "words"
            if score is None:
                score, kind = _number(part), "numbers"
            if score is not None:
                scores[name] = score
                kinds.setdefault(kind, part)
                break
    if len(kinds) > 1:
        raise DataError(
            f"`folder_scores`: folders in {str(folder)!r} are called by numbers ({kinds['numbers']!r}) and by words "
            f"({kinds['words']!r}), which are two scales. Rename one kind."
        )
    if not scores:
        found = sorted({Path(name).parts[-2] for name in names if len(Path(name).parts) > 1})
        raise DataError(
            f"`folder_scores`: no folder in {str(folder)!r} is called by a number or by one of {', '.join(_WORDS)}; "
            f"the folders are {found[:_SHOWN]}."
        )
    return scores


def _number(text: str) -> float | None:
    plain = text.removeprefix("-").replace(".", "", 1)
    return float(text) if plain.isascii() and plain.isdigit() else None


def warn_of_unread(folder: Path, names: list[str], dataset: datasets.Dataset) -> None:
    """Warn of what could not be read in files, which have these names in the order of the rows."""
    reasons = [(name, reason) for name, reason in zip(names, dataset[UNREAD], strict=True) if reason]
    if reasons:
        shown = "".join(f"\n  {name}: {reason}" for name, reason in reasons[:_SHOWN])
        more = "\n  ..." if len(reasons) > _SHOWN else ""
        logger.warning("%s: in %d files something could not be read:%s%s", folder, len(reasons), shown, more)


def warn_of_first_stars(folder: Path, dataset: datasets.Dataset, score: str) -> None:
    """Warn of single stars in sidecars of darktable, which gives one to each image at import."""
    if score not in dataset.column_names:
        return
    first = sum(
        place == DARKTABLE and stars == 1 for place, stars in zip(dataset[SCORE_FROM], dataset[score], strict=True)
    )
    if first:
        logger.warning(
            "%s: %d images have one star in sidecars of darktable, which gives each image one star at import unless "
            "its settings say otherwise. They count as the worst score. If nobody gave these stars, set the images to "
            "no stars in darktable.",
            *(folder, first),
        )
