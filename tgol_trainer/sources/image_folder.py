"""Make rows of a folder without a table: prompts and scores out of its files, and out of what lies beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import datasets
from PIL import ImageFile, UnidentifiedImageError
from tqdm.auto import tqdm

from tgol_trainer import __version__
from tgol_trainer._files import NotTextError, read_text
from tgol_trainer.data.files import same_name
from tgol_trainer.data.images import UNREADABLE, DataError, open_header, readable_formats
from tgol_trainer.data.rows import Columns

from .folders import IMAGES, VIDEOS, rows_of_split
from .generation import Generation, exif_texts, is_parameters, read_parameters, read_texts
from .stars import StarsError, exif_stars, xmp_stars

logger = logging.getLogger(__name__)

PROMPT_FROM, SCORE_FROM, UNREAD = "prompt_from", "score_from", "unread"
_CAPTIONS = (".txt", ".caption")
_MOST_CAPTION_BYTES = 100_000
_GOOD = ("good", "like", "liked", "likes", "yes", "keep", "kept", "up", "positive", "best", "chosen")
_BAD = ("bad", "dislike", "disliked", "dislikes", "no", "reject", "rejected", "down", "negative", "worst")
_WORDS = dict.fromkeys(_GOOD, 1.0) | dict.fromkeys(_BAD, 0.0)
_SKIPPED = ("__MACOSX", "@eaDir", "$RECYCLE.BIN")
_SHOWN = 3


@dataclasses.dataclass(frozen=True)
class Found:
    """
    Where prompts or scores of a folder were found.

    Args:
        places (`dict[str, int]`): Place, such as `"EXIF"`, to the number of files.
        num_lacking (`int`): Files that have none.
        lacking (`list[str]`): Names of the first of these.
    """

    places: dict[str, int]
    num_lacking: int
    lacking: list[str]

    def __str__(self) -> str:
        """Return a text such as `3 from EXIF; none in 2 files (a.png, b.png)`."""
        parts = [", ".join(f"{count} from {place}" for place, count in self.places.items())] if self.places else []
        if self.num_lacking:
            names = ", ".join([*self.lacking, *(["..."] if self.num_lacking > len(self.lacking) else [])])
            parts.append(f"none in {self.num_lacking} file{'s' if self.num_lacking > 1 else ''} ({names})")
        return "; ".join(parts)


@dataclasses.dataclass(frozen=True)
class _File:
    """What was found out about one file."""

    prompt: str | None = None
    score: float | None = None
    negative_prompt: str | None = None
    seed: str | None = None
    settings: str | None = None
    prompt_from: str | None = None
    score_from: str | None = None
    unread: str | None = None


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
    scores = _folder_scores(folder, names) if folder_scores else None
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
        gen_kwargs={"folder": str(folder), "files": names, "stamp": _stamp(folder), "settings": settings},
        split=datasets.NamedSplit(split),
    )
    found = found_in(dataset) or {}
    for name, places in found.items():
        logger.info("%s: %s: %s", folder, name, places)
    _warn_of_unread(folder, names, dataset)
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


def _stamp(folder: Path) -> str:
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
        found = _read(path, Path(folder))
        if scores is not None:
            score = scores.get(name)
            found = dataclasses.replace(found, score=score, score_from=None if score is None else "names of folders")
        row = {names.get(key, key): value for key, value in dataclasses.asdict(found).items()}
        yield {settings["visual"]: str(path.absolute()), **row}


def _read(path: Path, folder: Path) -> _File:
    made, score, score_from = None, None, None
    unread: list[str] = []
    if path.name.lower().endswith(IMAGES):
        try:
            with open_header(path) as image:
                made, score, score_from = _inside(image, unread)
        except UnidentifiedImageError:  # the check of the images says more
            unread.append("its format is not read")
        except UNREADABLE as error:
            unread.append(f"it cannot be opened: {error}")
    beside, stars = _caption(path, folder, unread), _sidecar(path, folder, unread)
    if stars is not None:
        score, score_from = stars, "XMP sidecars"
    made = beside or made
    if made is None:
        return _File(score=score, score_from=score_from, unread="; ".join(unread) or None)
    if made.prompt is None and made.unread:
        unread.append(made.unread)
    return _File(
        prompt=made.prompt,
        score=score,
        negative_prompt=made.negative_prompt,
        seed=None if made.seed is None else str(made.seed),  # up to 64 bits without a sign
        settings=json.dumps(made.settings, ensure_ascii=False) if made.settings else None,
        prompt_from=made.program if made.prompt else None,
        score_from=score_from,
        unread="; ".join(unread) or None,
    )


def _inside(image: ImageFile.ImageFile, unread: list[str]) -> tuple[Generation | None, float | None, str | None]:
    """Return what a file holds: how its image was made, its score, and where the score stands."""
    if image.format == "PNG" and image.fp is not None and _has_late_text(image.fp):
        image.load()  # Pillow reads what stands behind the pixels after them
    made = read_texts(_texts(image))
    exif = image.getexif()
    made = made or read_texts(exif_texts(exif))
    packet = image.info.get("xmp") or image.info.get("XML:com.adobe.xmp")
    packet = packet.encode("utf-8", errors="replace") if isinstance(packet, str) else packet
    if isinstance(packet, bytes):
        try:
            stars = xmp_stars(packet)
        except StarsError as error:
            unread.append(str(error))
            stars = None
        if stars is not None:
            return made, stars, "XMP in the files"
    stars = exif_stars(exif)
    return made, stars, None if stars is None else "EXIF"


def _has_late_text(file: IO[bytes]) -> bool:
    """Return whether a PNG file has a text or EXIF behind its pixels, where ExifTool for one writes XMP."""
    place, late = file.tell(), False
    file.seek(8)
    pixels = False
    while not late and len(header := file.read(8)) == 8:
        size, kind = struct.unpack(">I4s", header)
        pixels |= kind == b"IDAT"
        late = pixels and kind in (b"tEXt", b"zTXt", b"iTXt", b"eXIf")
        file.seek(size + 4, os.SEEK_CUR)
    file.seek(place)
    return late


def _texts(image: ImageFile.ImageFile) -> dict[str, str]:
    return {str(name): text for name, text in image.info.items() if isinstance(text, str)}


def _beside(path: Path, ending: str, folder: Path, unread: list[str]) -> Path | None:
    """Return the file beside an image that has its name, also where Unicode spells the name otherwise."""
    for name in (path.with_suffix(ending), Path(f"{path}{ending}")):
        for each in (name, name.with_suffix(ending.upper())):
            file = Path(same_name(str(each)) or each)
            if not file.is_file():
                continue
            if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
                unread.append(f"{file.name} is a link that leads out of the folder")
                continue
            return file
    return None


def _caption(path: Path, folder: Path, unread: list[str]) -> Generation | None:
    """Return the prompt of a text file beside an image; A1111 writes its parameters into such files too."""
    for ending in _CAPTIONS:
        file = _beside(path, ending, folder, unread)
        if file is None:
            continue
        if file.stat().st_size > _MOST_CAPTION_BYTES:
            unread.append(
                f"{file.name} has {file.stat().st_size} bytes, more than the {_MOST_CAPTION_BYTES} of a caption"
            )
            continue
        try:
            text = read_text(file)
        except NotTextError as error:
            unread.append(str(error))
            continue
        made = read_parameters(text) if is_parameters(text) else Generation("", " ".join(text.split()) or None)
        if made.prompt is None:
            unread.append(f"{file.name} is empty")
            continue
        return dataclasses.replace(made, program=f"{ending} files")
    return None


def _sidecar(path: Path, folder: Path, unread: list[str]) -> float | None:
    file = _beside(path, ".xmp", folder, unread)
    if file is None:
        return None
    try:
        return xmp_stars(file.read_bytes())
    except StarsError as error:
        unread.append(f"{file.name}: {error}")
        return None


def _folder_scores(folder: Path, names: list[str]) -> dict[str, float]:
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


def found_in(dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, Found] | None:
    """
    Count where prompts and scores of a folder were found.

    Args:
        dataset ([`datasets.Dataset`]): Of [`load_image_folder`].

    Returns:
        `dict[str, Found]`, *optional*: of `"prompts"` and of `"scores"`; `None` for another dataset.
    """
    if not isinstance(dataset, datasets.Dataset) or not {PROMPT_FROM, UNREAD} <= set(dataset.column_names):
        return None
    found = {}
    for name, column in (("prompts", PROMPT_FROM), ("scores", SCORE_FROM)):
        values = dataset[column] if column in dataset.column_names else [None] * len(dataset)
        lacking = [row for row, value in enumerate(values) if not value]
        places = Counter(value for value in values if value)
        found[name] = Found(dict(places.most_common()), len(lacking), _file_names(dataset, lacking[:_SHOWN]))
    return found


def _file_names(dataset: datasets.Dataset, rows: list[int]) -> list[str]:
    visual = dataset.column_names[0]
    feature = dataset.features[visual]
    files = dataset.cast_column(visual, type(feature)(decode=False)).select(rows)[visual]
    return [os.path.basename(file["path"]) for file in files]


def _warn_of_unread(folder: Path, names: list[str], dataset: datasets.Dataset) -> None:
    reasons = [(name, reason) for name, reason in zip(names, dataset[UNREAD], strict=True) if reason]
    if reasons:
        shown = "".join(f"\n  {name}: {reason}" for name, reason in reasons[:_SHOWN])
        more = "\n  ..." if len(reasons) > _SHOWN else ""
        logger.warning("%s: in %d files something could not be read:%s%s", folder, len(reasons), shown, more)
