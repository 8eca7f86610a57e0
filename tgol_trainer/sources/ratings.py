"""The journal of `tgol rate`: each rating as it was given, one JSON a line, and the scores that they come to."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import threading
import time
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import datasets

from tgol_trainer._files import write_json
from tgol_trainer.converters.base import Conversion, Source
from tgol_trainer.converters.pairs import PairColumns, convert_pairs
from tgol_trainer.converters.ratings import RatingColumns, convert_ratings
from tgol_trainer.data.images import DataError

logger = logging.getLogger(__name__)

Kind: TypeAlias = Literal["ratings", "thumbs", "pairs"]
"""What a person gives: 1 to 5, a thumb up or down, or the better one of two images."""

Medium: TypeAlias = Literal["image", "video"]

SETTINGS, JOURNAL, IMAGES = "tgol_rate.json", "ratings.jsonl", "images"
SKIPPED, UNDONE = "skipped", "undone"
_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class RateSettings:
    """
    What the ratings of a folder have in common.

    Args:
        kind (`str`): `"ratings"`, `"thumbs"` or `"pairs"`.
        source (`str`): The folder, file or Hub id whose images are rated.
        split (`str`): Its split.
        revision (`str`, *optional*): Its commit on the Hub.
        num_rows (`int`, *optional*): Its rows, where they have no file names and count as their numbers.
        medium (`str`, *optional*, defaults to `"image"`): `"image"` or `"video"`.
    """

    kind: Kind
    source: str
    split: str = "train"
    revision: str | None = None
    num_rows: int | None = None
    medium: Medium = "image"


def is_rated(folder: str | Path) -> bool:
    """Return whether `tgol rate` writes into a folder."""
    return (Path(folder) / SETTINGS).is_file()


def read_settings(folder: str | Path) -> RateSettings:
    """
    Read the settings of a folder of ratings.

    Args:
        folder (`str` or `Path`): Output folder of `tgol rate`.

    Returns:
        [`RateSettings`]

    Raises:
        DataError: for a file that is damaged.
    """
    path = Path(folder) / SETTINGS
    try:
        found = RateSettings(**json.loads(path.read_text(encoding="utf-8")))
        if found.kind not in get_args(Kind):
            raise ValueError(f"kind {found.kind!r} is not known")
        if found.medium not in get_args(Medium):
            raise ValueError(f"medium {found.medium!r} is not known")
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}: it is not as `tgol rate` wrote it: {error}. Put the file back; the ratings are in {JOURNAL}."
        ) from error
    return found


def write_settings(folder: str | Path, settings: RateSettings) -> None:
    """Write the settings of a folder of ratings."""
    write_json(Path(folder) / SETTINGS, dataclasses.asdict(settings))


class Journal:
    """
    The ratings of a folder, which are added at the end and never changed: the last entry of a rater on a task counts.

    Args:
        folder (`str` or `Path`): Output folder of `tgol rate`.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / JOURNAL
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], dict[str, Any]] = {}
        for entry in _read_lines(self.path):
            self._last[entry["rater"], entry["task"]] = entry

    def append(self, rater: str, task: str, content: dict[str, Any]) -> None:
        """
        Add an entry; when this returns it is on the disk.

        Args:
            rater (`str`): Who rated.
            task (`str`): Id of what was rated.
            content (`dict`): Prompt, images and rating; or `{"skipped": true}`, or `{"undone": true}`.

        Raises:
            OSError: if it cannot be written, as on a full disk.
        """
        moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = {"rater": rater, "task": task, **content, "time": moment}
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8") + b"\n"
        with self._lock:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                if os.lseek(handle, 0, os.SEEK_END):
                    os.lseek(handle, -1, os.SEEK_END)
                    if os.read(handle, 1) != b"\n":  # a line that was cut off stays a line of its own
                        line = b"\n" + line
                written = os.write(handle, line)  # at once, so that lines of two processes do not mix
                os.fsync(handle)
            finally:
                os.close(handle)
            if written != len(line):
                raise OSError(
                    f"{self.path}: the disk took {written} of {len(line)} bytes. Make room, and rate it again."
                )
            self._last[rater, task] = entry

    def of(self, rater: str) -> dict[str, dict[str, Any]]:
        """Return the entries of a rater that count, skipped ones included, by task."""
        found = list(self._last.items())
        return {task: entry for (name, task), entry in found if name == rater and not entry.get(UNDONE)}

    def rated(self) -> list[dict[str, Any]]:
        """Return the entries that hold a rating that counts, in the order of their tasks' first entries."""
        return [entry for entry in list(self._last.values()) if not (entry.get(SKIPPED) or entry.get(UNDONE))]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    entries, bad = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            entry["rater"], entry["task"]
        except (ValueError, TypeError, KeyError):
            bad.append(number)
            continue
        entries.append(entry)
    if bad:
        shown = f"{', '.join(map(str, bad[:_SHOWN]))}{', ...' if len(bad) > _SHOWN else ''}"
        logger.warning("%s: lines that are no ratings and are left out: %d (%s).", path, len(bad), shown)
    return entries


def convert_rated(folder: str | Path) -> Conversion:
    """
    Convert the ratings of a folder to one row per image.

    Args:
        folder (`str` or `Path`): Output folder of `tgol rate`.

    Returns:
        [`Conversion`]: its dataset has `prompt`, `image` or `video`, `score`, and the counts of [`ratings_to_scores`],
        or of [`pairs_to_scores`] with `"win_rate"`.

    Raises:
        DataError: if nothing is rated, or if an image is gone.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    entries = Journal(folder).rated()
    if not entries:
        raise DataError(f"`source`: nothing in {str(folder)!r} is rated yet. Run `tgol rate {settings.source}` first.")
    pairs = settings.kind == "pairs"
    names = ["prompt", "image_0", "image_1", "choice"] if pairs else ["prompt", "image", "rating", "rater"]
    try:
        table = datasets.Dataset.from_dict({name: [entry[name] for entry in entries] for name in names})
    except KeyError as error:
        raise DataError(
            f"{folder / JOURNAL}: a rating lacks {error.args[0]!r}, so it is not of the kind {settings.kind!r} that "
            f"{SETTINGS} names."
        ) from error
    source = Source(table, folder, name=str(folder))
    if pairs:
        found = convert_pairs(source, PairColumns("prompt", "image_0", "image_1", "choice"), "win_rate")
    else:
        columns = RatingColumns("rating", annotator="rater")
        found = convert_ratings(source, columns, thumbs=settings.kind == "thumbs")
    if settings.medium == "image":
        return found
    videos = found.dataset.cast_column("image", datasets.Video(decode=False)).rename_column("image", "video")
    return dataclasses.replace(found, dataset=videos)


def load_rated(folder: str | Path, split: str) -> datasets.Dataset:
    """
    Load the ratings of a folder as a dataset of scores, and say what they are.

    Args:
        folder (`str` or `Path`): Output folder of `tgol rate`.
        split (`str`): Must be `"train"`.

    Returns:
        [`datasets.Dataset`]: as in [`convert_rated`].

    Raises:
        DataError: for another split, or as [`convert_rated`].
    """
    if split != "train":  # every row would be trained on too
        raise DataError(f"`split`: {str(folder)!r} holds ratings, which are one split, 'train', without {split!r}.")
    found = convert_rated(folder)
    noun = {"ratings": "ratings", "thumbs": "thumbs", "pairs": "comparisons"}[read_settings(folder).kind]
    medium = read_settings(folder).medium
    logger.info("%s: %d %s of %d %ss.", folder, found.num_used, noun, len(found.dataset), medium)
    return found.dataset
