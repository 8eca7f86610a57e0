"""Which images are rated, and in which order each rater sees them."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from tgol_trainer._files import write_file
from tgol_trainer.data.checks import check_class
from tgol_trainer.data.files import open_file
from tgol_trainer.data.images import DataError, lacking_package, open_image
from tgol_trainer.data.rows import prompt_problem
from tgol_trainer.data.videos import coding, encode_webm
from tgol_trainer.sources.ratings import IMAGES, Kind, Medium

_LOSSY = ("AVIF", "HEIF", "JXL", "WEBP")
_SHOWN_BY_BROWSERS = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
_PLAYED_BY_BROWSERS = {
    "video/mp4": ("mp4", ("h264", "av1"), ("yuv420p", "yuvj420p")),
    "video/webm": ("webm", ("vp8", "vp9", "av1", "libdav1d"), ("yuv420p", "yuvj420p")),
}
"""Media type to a part of FFmpeg's name of the container, codecs and pixel formats."""
_RINGS = 2


def digest(*parts: str) -> str:
    """Return 16 hexadecimal characters that stand for texts: an id that says nothing of them."""
    content = b"".join(hashlib.blake2b(part.encode("utf-8", "surrogateescape")).digest() for part in parts)
    return hashlib.blake2b(content, digest_size=8).hexdigest()


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image to rate: its id, its row, and the prompt of the row."""

    id: str
    row: int
    prompt: str


@dataclasses.dataclass(frozen=True)
class Task:
    """What is shown at once: one image, or two of a prompt."""

    id: str
    prompt: str
    pictures: tuple[str, ...]


class Pictures:
    """
    The images or videos of a dataset that can be rated.

    Args:
        dataset ([`datasets.Dataset`]): Rows with a prompt and an image or a video; other columns are not read.
        prompt (`str`): Column of prompts.
        image (`str`): Column of images.
        video (`str`): Column of videos, which is read where there is none of images.
        folder (`Path`, *optional*): Folder that the ids of files count from, so that it can be moved.

    Attributes:
        medium (`str`): `"image"` or `"video"`.
        numbered (`bool`): Whether images have no paths, so that their rows' numbers tell them apart.
        num_left_out (`int`): Rows without a prompt or a file.
        lacking (`list[str]`): Images that are left out since the package which reads them is missing, each with that.

    Raises:
        DataError: for a missing column, or if no row can be rated.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        prompt: str = "prompt",
        image: str = "image",
        folder: Path | None = None,
        video: str = "video",
    ) -> None:
        check_class(dataset, "source")
        self.medium: Medium = "image"
        if image not in dataset.column_names and video in dataset.column_names:
            self.medium, image = "video", video
        for column, role in ((prompt, "prompt"), (image, "image")):
            if column not in dataset.column_names:
                raise DataError(
                    f"source: no column {column!r}; the columns are {dataset.column_names}. Name the right one with "
                    f"`--{role}_column`."
                )
        dataset = dataset.with_format(None).select_columns([prompt, image])
        kind = datasets.Video if self.medium == "video" else datasets.Image
        self._files = dataset.cast_column(image, kind(decode=False))
        self._webm = functools.lru_cache(maxsize=8)(lambda picture: encode_webm(self.content(picture)))
        self._image = image
        self.numbered, self.num_left_out = False, 0
        self.lacking: list[str] = []
        found: dict[str, Picture] = {}
        row = 0
        for table in self._files.with_format("arrow").iter(batch_size=1000):
            columns = (table.column(prompt).to_pylist(), *_paths(table.column(image)))
            for text, path, start in zip(*columns, strict=True):
                if prompt_problem(text) is None and (start or (path and os.path.isfile(path))):
                    self.numbered |= bool(start)
                    name = os.path.relpath(path, folder) if path and not start else f"row {row}"
                    lacking = None if self.medium == "video" else lacking_package(start or path)
                    if lacking is not None:
                        self.lacking.append(f"{name}: {lacking}")
                        row += 1
                        continue
                    key = digest(name, text)
                    found.setdefault(key, Picture(key, row, text))
                else:
                    self.num_left_out += 1
                row += 1
        self.by_id = found
        if not found and self.lacking:
            raise DataError(f"source: no image can be shown. {self.lacking[0]}.")
        if not found:
            what = "an image" if self.medium == "image" else "a video"
            raise DataError(
                f"source: none of its {row} rows has a prompt and {what} that is there. `tgol check` lists what is "
                "wrong with each."
            )

    def content(self, picture: str) -> bytes:
        """
        Return the encoded file of an image.

        Args:
            picture (`str`): Its id.

        Raises:
            KeyError: for an id that is not known.
            OSError: if the file is gone.
        """
        found = self._files[self.by_id[picture].row][self._image]
        if found["bytes"]:
            return bytes(found["bytes"])
        with open_file(found["path"]) as file:
            return file.read()

    def for_browser(self, picture: str, *, convert: bool = False) -> tuple[bytes, str]:
        """
        Return an image or a video as a browser shows it, and its media type; raise VisualError if it cannot be read.

        With `convert`, a video becomes WebM even where most browsers play it as it is.
        """
        content = self.content(picture)
        if self.medium == "video":
            kind = None if convert else _played_as(content)
            return (self._webm(picture), "video/webm") if kind is None else (content, kind)
        kind = _format(content)
        if kind in _SHOWN_BY_BROWSERS and not (kind == "WEBP" and _is_turned(content)):
            return content, _SHOWN_BY_BROWSERS[kind]
        # Compressed with losses, it is a photograph: as PNG one of a phone takes 4 s and 15 MB, as JPEG 0.4 and 5.
        shown = "JPEG" if kind in _LOSSY else "PNG"
        converted = io.BytesIO()
        open_image(content).convert("RGB").save(converted, shown, quality=95, subsampling=0)
        return converted.getvalue(), _SHOWN_BY_BROWSERS[shown]

    def keep(self, picture: str, folder: Path) -> str:
        """Copy an image into a folder of ratings, under a name made of its content; return its path there."""
        content = self.content(picture)
        ending = _video_ending(content) if self.medium == "video" else _format(content).lower() or "image"
        name = f"{IMAGES}/{hashlib.sha256(content).hexdigest()[:20]}.{ending}"
        if not (folder / name).is_file():
            write_file(folder / name, content)
        return name


def _paths(column: pa.ChunkedArray) -> tuple[list[str | None], list[bytes | None]]:
    """Return the paths of a column of undecoded images, and the first bytes of those that it holds itself."""
    cells = column.combine_chunks()
    starts = pc.binary_slice(pc.struct_field(cells, "bytes"), 0, 16)
    return pc.struct_field(cells, "path").to_pylist(), starts.to_pylist()


def _format(content: bytes) -> str:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.format or ""
    except (OSError, ValueError, Image.DecompressionBombError):
        return ""


def _played_as(content: bytes) -> str | None:
    """Return the media type of a video that browsers play; `None` for another."""
    container, codec, pixels = coding(content)
    for kind, (name, codecs, formats) in _PLAYED_BY_BROWSERS.items():
        if name in container and codec in codecs and pixels in formats:
            return kind
    return None


def _video_ending(content: bytes) -> str:
    names = coding(content)[0].split(",")
    return next((ending for ending in ("mp4", "webm", "avi", "mpeg") if ending in names), "mkv")


def _is_turned(content: bytes) -> bool:
    """Return whether EXIF says to turn an image, which browsers do for JPEG and PNG and not for WebP."""
    with Image.open(io.BytesIO(content)) as image:
        return image.getexif().get(0x0112, 1) != 1


def make_tasks(pictures: Sequence[Picture], kind: Kind, seed: int) -> list[Task]:
    """
    Make what is to be rated.

    Of pairs, each prompt's images stand in random rings, two of them where there are enough: neighbours are compared.
    So every image meets up to four others, and all images of a prompt are connected.

    Args:
        pictures (`Sequence[Picture]`): The images.
        kind (`str`): What is given.
        seed (`int`): Seed of the rings and of the sides.

    Returns:
        `list[Task]`

    Raises:
        DataError: for pairs, if no prompt has two images.
    """
    if kind != "pairs":
        return [Task(picture.id, picture.prompt, (picture.id,)) for picture in pictures]
    groups: dict[str, list[str]] = defaultdict(list)
    for picture in pictures:
        groups[picture.prompt].append(picture.id)
    tasks: dict[str, Task] = {}
    for prompt, members in groups.items():
        for ring in range(_RINGS):
            around = sorted(members, key=lambda name, ring=ring: digest(str(seed), str(ring), name))  # type: ignore[misc]
            for one, other in zip(around, [*around[1:], around[0]], strict=True):
                name = digest(*sorted((one, other)))
                if one != other and name not in tasks:
                    sides = (one, other) if digest(str(seed), name) < "8" else (other, one)
                    tasks[name] = Task(name, prompt, sides)
    if not tasks:
        raise DataError("`--kind pairs` needs two images of one prompt, and every prompt here has one. Use ratings.")
    return list(tasks.values())


def order_for(tasks: Sequence[Task], rater: str, seed: int, *, by_prompt: bool) -> list[Task]:
    """
    Return the tasks in the order of one rater, who alone sees it; it does not depend on names of files.

    Args:
        tasks (`Sequence[Task]`): What is to be rated.
        rater (`str`): Name of the rater: each has an order of their own, so that what comes late differs.
        seed (`int`): Seed.
        by_prompt (`bool`): Whether tasks of one prompt follow each other.

    Returns:
        `list[Task]`
    """

    def place(task: Task) -> tuple[str, str]:
        return digest(str(seed), rater, task.prompt) if by_prompt else "", digest(str(seed), rater, task.id)

    return sorted(tasks, key=place)
