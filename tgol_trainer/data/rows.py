"""Check one row, and list all bad rows of a dataset in one message."""

from __future__ import annotations

import dataclasses
import logging
import math
import numbers
import os
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Literal

import numpy as np
from PIL import Image

from .images import NO_SUCH_FILE, NO_VALUE, DataError, VisualError, describe, open_image
from .prompts import PromptSyntax, apply_syntax
from .videos import Video, open_video

logger = logging.getLogger(__name__)

OnBadSample = Literal["raise", "skip"]
_SHOWN_ROWS = 5


@dataclasses.dataclass(frozen=True)
class Columns:
    """
    Names of the columns that are read; other columns are ignored.

    Args:
        prompt (`str`, *optional*, defaults to `"prompt"`): Column of texts.
        image (`str`, *optional*, defaults to `"image"`): Column of images, in any form that [`open_image`] reads.
        score (`str`, *optional*, defaults to `"score"`): Column of numbers; higher is better.
        video (`str`, *optional*):
            Column of videos, in any form that [`read_video`] takes. Where given, it is read instead of the images.
        num_frames (`int`, *optional*): Frames taken of each video. Needed to read videos.
        group (`str`, *optional*):
            Column whose equal values form a group, such as the prompt's; `None` where rows are not grouped.
        prompt_syntax (`str`, *optional*, defaults to `"keep"`):
            `"strip"` takes instructions for other programs out of the prompts ([`strip_syntax`]).

    Raises:
        DataError: if two of them are the same, or for videos without `num_frames`.
    """

    prompt: str = "prompt"
    image: str = "image"
    score: str = "score"
    video: str | None = None
    num_frames: int | None = None
    group: str | None = None
    prompt_syntax: PromptSyntax = "keep"

    def __post_init__(self) -> None:
        if len(set(self.names)) < 3:
            raise DataError(
                f"The columns must be three different ones, got prompt={self.prompt!r}, "
                f"{self.medium}={self.visual!r}, score={self.score!r}. Name the column that holds each, for example "
                "Columns(score='rating')."
            )
        if self.video is not None and (self.num_frames is None or self.num_frames < 1):
            raise DataError(f"`num_frames` is {self.num_frames}; with a column of videos it must be at least 1.")

    @property
    def medium(self) -> str:
        """`"image"`, or `"video"` where a column of videos is given."""
        return "image" if self.video is None else "video"

    @property
    def visual(self) -> str:
        """The column of images, or of videos where one is given."""
        return self.video or self.image

    def text(self, prompt: Any) -> Any:
        """Return a prompt as it is trained on; a value of another type as it is."""
        return apply_syntax(prompt, self.prompt_syntax) if isinstance(prompt, str) else prompt

    @property
    def names(self) -> list[str]:
        """The three columns that make a sample."""
        return [self.prompt, self.visual, self.score]

    @property
    def read(self) -> list[str]:
        """Every column that is read: the three, and the column of groups."""
        return list(dict.fromkeys([*self.names, *([self.group] if self.group else [])]))


DEFAULT_COLUMNS = Columns()

# Remedies. `remedy` fills in {column}, {medium}, {num_frames} and the working directory {folder}.
CAST_SCORE_WITH_BLANKS = """def to_number(score):
    try:
        return {{"{column}": float(score)}}
    except (TypeError, ValueError):
        return {{"{column}": None}}

features = dataset.features.copy()
features["{column}"] = datasets.Value("float64")
dataset = dataset.map(to_number, input_columns="{column}", features=features)
dataset = dataset.filter(lambda score: score is not None, input_columns="{column}")"""
CAST_SCORE = 'dataset = dataset.cast_column("{column}", datasets.Value("float64"))'
_FINITE_SCORE = (
    "dataset = dataset.filter(lambda score: score is not None and math.isfinite(score), "
    'input_columns="{column}")  # import math'
)
_FILLED_PROMPT = 'dataset = dataset.filter(lambda prompt: bool(prompt and prompt.strip()), input_columns="{column}")'
CAST_PROMPT = 'dataset = dataset.cast_column("{column}", datasets.Value("string"))'
_BROKEN_FILE = "# save the {medium} again from its source, or remove the row"
_MISSING_FILE = """# Put the files where the paths say, or correct the paths. Relative paths in a table that was
# read from a file count from its folder; others are looked up in the
# working directory, {folder}; to make them absolute (import os, datasets):
dataset = dataset.cast_column("{column}", datasets.{kind}(decode=False))
dataset = dataset.map(
    lambda {medium}: {{
        "{column}": {{**{medium}, "path": os.path.join("/folder/of/the/{medium}s", {medium}["path"])}}
    }},
    input_columns="{column}",
)
dataset = dataset.cast_column("{column}", datasets.{kind}({undecoded}))"""

# Cause -> what it concerns and its remedy. The causes are the keys of `DataReport.dropped`.
CAUSES: dict[str, tuple[str, str]] = {
    "missing prompt": ("prompt", _FILLED_PROMPT),
    "empty prompt": ("prompt", _FILLED_PROMPT),
    "prompt is not text": ("prompt", CAST_PROMPT),
    "missing image": ("image", "# give every row an image, or remove the row"),
    "image file not found": ("image", _MISSING_FILE),
    "truncated image": ("image", _BROKEN_FILE),
    "undecodable image": ("image", _BROKEN_FILE),
    "image of a missing package": ("image", "# pip install 'tgol_trainer[formats]'"),
    "missing video": ("video", "# give every row a video, or remove the row"),
    "video file not found": ("video", _MISSING_FILE),
    "truncated video": ("video", _BROKEN_FILE),
    "undecodable video": ("video", _BROKEN_FILE),
    "too few frames": ("video", "# lower `num_frames` (now {num_frames}), give longer clips, or remove the rows"),
    "missing score": ("score", _FINITE_SCORE),
    "NaN score": ("score", _FINITE_SCORE),
    "infinite score": ("score", _FINITE_SCORE),
    "score is text": ("score", CAST_SCORE_WITH_BLANKS),
    "score is not a number": ("score", "# store one number per row, for example the mean of several ratings"),
}


def prompt_problem(value: Any) -> str | None:
    """Return the cause for which a prompt cannot be used, one of `CAUSES`, or `None` for a good one."""
    if value is None:
        return "missing prompt"
    if not isinstance(value, str):
        return "prompt is not text"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:  # half of a surrogate pair, which no tokenizer takes
        return "prompt is not text"
    return None if value.strip() else "empty prompt"


def read_score(value: Any) -> tuple[float, str | None]:
    """Return the score as a number, NaN for a bad one, and the cause for which it cannot be used or `None`."""
    if value is None:
        return math.nan, "missing score"
    if isinstance(value, str):
        return math.nan, "score is text" if value.strip() else "missing score"
    if not isinstance(value, (numbers.Real, Decimal, np.bool_)):
        return math.nan, "score is not a number"
    try:
        score = float(value)
    except OverflowError:  # an integer of more than 308 digits
        return math.nan, "infinite score"
    except ValueError:  # a Decimal that signals
        return math.nan, "NaN score"
    if math.isnan(score):
        return math.nan, "NaN score"
    return (score, None) if math.isfinite(score) else (math.nan, "infinite score")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row after its checks; `problems` pairs each cause with a short text of the value, and is empty if good."""

    prompt: Any
    visual: Image.Image | Video | None
    score: float
    problems: tuple[tuple[str, str], ...]


def read_row(prompt: Any, visual: Any, score: Any, num_frames: int | None = None) -> Row:
    """
    Check the three values of a row, and open its image, or its video where the frames needed of it are given. All of
    its problems are found, not only the first.
    """
    problems = []
    if cause := prompt_problem(prompt):
        problems.append((cause, describe(prompt)))
    opened: Image.Image | Video | None = None
    try:
        opened = open_image(visual) if num_frames is None else open_video(visual, num_frames)
    except VisualError as error:
        plain = str(error) in (NO_VALUE, NO_SUCH_FILE)  # the cause says as much
        problems.append((error.cause, describe(visual) if plain else f"{describe(visual)}: {error}"))
    number, cause = read_score(score)
    if cause:
        problems.append((cause, describe(score)))
    return Row(prompt, opened, number, tuple(problems))


def check_policy(on_bad_sample: str) -> None:
    """Raise ValueError unless the policy for bad rows is one of the two."""
    if on_bad_sample not in ("raise", "skip"):
        raise ValueError(f"`on_bad_sample` must be 'raise' or 'skip', got {on_bad_sample!r}.")


class BadRows:
    """Collect the bad rows of the dataset that was given as the argument `name`, and list them in a message."""

    def __init__(self, name: str, columns: Columns) -> None:
        self.name = name
        self.columns = columns
        self.counts: Counter[str] = Counter()
        self.num_rows = 0
        self._found: dict[tuple[str, str], tuple[int, list[str]]] = {}  # by cause and column: count, first rows

    def add(self, row: int, problems: Sequence[tuple[str, str]]) -> None:
        """Take in a bad row, counted from 0, with its (cause, text of the value); it counts once under each cause."""
        self.num_rows += 1
        for cause, detail in problems:
            self._count(cause, None, 1, [f"row {row}: {detail}"])

    def add_rows(self, cause: str, rows: np.ndarray, value: Any, column: str | None = None) -> None:
        """
        Take in many rows of one cause and value, in a column of scores where there are several. The caller counts
        `num_rows`, since a row may have several causes.
        """
        self._count(cause, column, len(rows), [f"row {row}: {describe(value)}" for row in rows[:_SHOWN_ROWS]])

    def _count(self, cause: str, column: str | None, number: int, examples: list[str]) -> None:
        self.counts[cause] += number
        key = cause, column or getattr(self.columns, CAUSES[cause][0])
        count, shown = self._found.get(key, (0, []))
        self._found[key] = (count + number, [*shown, *examples][:_SHOWN_ROWS])

    def examples(self, cause: str, column: str) -> list[str]:
        """Return the first rows of a cause in a column, each with a short text of its value."""
        return list(self._found.get((cause, column), (0, []))[1])

    def remedy(self, cause: str, column: str) -> str:
        """Return the code or the advice that mends a cause in a column."""
        medium = self.columns.medium
        return CAUSES[cause][1].format(
            column=column,
            medium=medium,
            kind=medium.capitalize(),
            undecoded="" if medium == "image" else "decode=False",
            num_frames=self.columns.num_frames,
            folder=os.getcwd(),
        )

    def listing(self) -> str:
        """Return one line per cause: column, cause, count and the first rows."""
        lines = []
        for cause, column in self._in_order():
            count, shown = self._found[cause, column]
            more = ", ..." if count > len(shown) else ""
            lines.append(f"  column {column!r}, {cause}: {count} ({', '.join(shown)}{more})")
        return "\n".join(lines)

    def _in_order(self) -> list[tuple[str, str]]:
        return sorted(self._found, key=lambda key: list(CAUSES).index(key[0]))

    def error(self, seen: str, *, can_skip: bool = True) -> DataError:
        """
        Return the error that lists everything and how to mend it. `seen` is what was looked at, such as `"100 rows"`;
        `can_skip` offers `on_bad_sample="skip"`.
        """
        remedies: dict[str, str] = {}  # several causes share a remedy
        for cause, column in self._in_order():
            remedies.setdefault(self.remedy(cause, column), column)
        fixes = "\n".join(f"# column {column!r}:\n{text}" for text, column in remedies.items())
        return DataError(
            f"{self.name}: {self.num_rows} of {seen} cannot be used (rows are counted from 0).\n{self.listing()}\n"
            f"To mend them:\n{fixes}" + ("\nOr leave them out: on_bad_sample='skip'." if can_skip else "")
        )

    def raise_or_warn(self, num_rows: int, on_bad_sample: str) -> None:
        """Raise for bad rows under `"raise"`, and where no row is usable; else warn of the rows left out, if any."""
        some_usable = self.num_rows < num_rows
        if self.num_rows and (on_bad_sample == "raise" or not some_usable):
            raise self.error(f"{num_rows} rows", can_skip=on_bad_sample == "raise" and some_usable)
        if self.num_rows:
            logger.warning("%s: %d of %d rows are left out.\n%s", self.name, self.num_rows, num_rows, self.listing())
