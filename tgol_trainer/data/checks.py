"""Check the class of a dataset, its columns and their types. Each refusal shows the code that mends it."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from typing import Any

import datasets

from .images import DataError, describe
from .rows import CAST_PROMPT, CAST_SCORE, CAST_SCORE_WITH_BLANKS, Columns, read_score

logger = logging.getLogger(__name__)

_FILE_NAMES = ["file_name", "filename"]
_VIDEO_NAMES = ["video", "clip", "mp4", "webm"]
SYNONYMS = {
    "prompt": ["prompt", "caption", "text", "prompts", "captions", "instruction"],
    "image": [
        "image",
        "img",
        "picture",
        "jpg",
        "png",
        "file_name",
        "filename",
        "image_path",
        "path",
        "file",
        "images",
    ],
    "video": [*_VIDEO_NAMES, "file_name", "filename", "video_path", "path", "file", "videos", "frames"],
    "score": ["score", "rating", "reward", "stars", "aesthetic_score", "scores", "preference", "label"],
}
"""Names that columns go by which are meant as prompt, image and score."""
_TEXTS = ("string", "large_string", "string_view")
_NUMBERS = ("int", "uint", "float", "bool")
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+")
_MADE = {"seed", "model", "settings"}
"""Columns of what `tgol generate` wrote; what `tgol score` adds to them is a column of numbers that is not here:"""
_NO_SCORES = {"seed", "image_index", "video_index", "fps", "num_frames"}
_PAIRS = (("chosen", "rejected"), ("image_0", "image_1"), ("jpg_0", "jpg_1"))
_SHOWN_ROWS = 5


def check_columns(
    dataset: datasets.Dataset | datasets.IterableDataset,
    columns: Columns,
    name: str = "train_dataset",
    *,
    scored: bool = True,
    shown: bool = True,
) -> None:
    """
    Check that a dataset has the columns and, where its features are known, that their types fit. No row is decoded.

    Args:
        dataset ([`datasets.Dataset`] or [`datasets.IterableDataset`]):
            The user's dataset. The first row of a stream with unknown features is read.
        columns ([`Columns`]): Names to look for.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            The argument that the dataset was given as, for messages.
        scored (`bool`, *optional*, defaults to `True`): Whether the score column is needed.
        shown (`bool`, *optional*, defaults to `True`): Whether the column of images or videos is needed.

    Raises:
        DataError: for another class, a missing column, pairs instead of single images, or a type that does not fit.
    """
    check_class(dataset, name)
    if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
        raise DataError(
            f"{name}: it has a transform set by `with_transform` or `set_transform`, which training would ignore. "
            "Store its result as a dataset, `dataset = dataset.with_format(None).map(your_transform, batched=True)`, "
            "or remove it: `dataset = dataset.with_format(None)`."
        )
    present, features = _column_names(dataset, name), dataset.features
    roles = {"prompt": columns.prompt}
    if shown:
        roles[columns.medium] = columns.visual
        _refuse_other_medium(present, features or {}, columns, name)
    if scored:
        roles["score"] = columns.score
    if columns.group is not None:
        roles["group"] = columns.group
    missing = [role for role, column in roles.items() if column not in present]
    if set(missing) & {"image", "score"}:
        _refuse_pairs(present, columns, name, missing)
    if missing:
        raise _missing_columns(present, roles, missing, name, features or {})
    if features is None:  # a stream after `map`; its rows are checked as they come
        return
    _check_prompt_type(features[columns.prompt], columns.prompt, name)
    if shown:
        check_visual = _check_image_type if columns.video is None else _check_video_type
        check_visual(features[columns.visual], columns.visual, name)
    if scored:
        check_score_type(dataset, columns.score, name)


def check_class(dataset: Any, name: str) -> None:
    """Raise a [`DataError`], which shows how to make one, unless `dataset` is a dataset of `datasets`."""
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return
    import torch

    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        splits = list(dataset)
        split = "train" if "train" in splits or not splits else splits[0]
        raise DataError(
            f"{name}: it is a {type(dataset).__name__} with the splits {splits}; training needs one of them. "
            f"Pick it: `{name}=dataset[{split!r}]`, or load it alone: `load_dataset(..., split={split!r})`."
        )
    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}".removeprefix("builtins.")
    if isinstance(dataset, dict):
        remedy = "`datasets.Dataset.from_dict(dataset)` for a dictionary of columns"
    elif isinstance(dataset, (list, tuple)):
        remedy = "`datasets.Dataset.from_list(dataset)` for a list of dictionaries, one per row"
    elif kind.startswith(("pandas.", "polars.")):
        remedy = f"`datasets.Dataset.from_{kind.partition('.')[0]}(dataset)`"
    elif isinstance(dataset, (str, bytes)) or hasattr(dataset, "__fspath__"):
        remedy = f"`load_scored_dataset({str(dataset)!r})` from tgol_trainer.sources"
    elif isinstance(dataset, torch.utils.data.IterableDataset):
        remedy = "`datasets.IterableDataset.from_generator(lambda: iter(dataset))` if its items are dictionaries"
    elif isinstance(dataset, torch.utils.data.Dataset):
        remedy = (
            "`datasets.Dataset.from_list([dataset[i] for i in range(len(dataset))])` if its items are dictionaries"
        )
    else:
        remedy = "`datasets.Dataset.from_list(rows)` with one dictionary per row"
    raise DataError(f"{name}: expected a datasets.Dataset or datasets.IterableDataset, got {kind}. Use {remedy}.")


def _column_names(dataset: datasets.Dataset | datasets.IterableDataset, name: str) -> list[str]:
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset.take(1)), None)
    if first is None:
        raise DataError(f"{name}: the stream has no rows. Check its split and its filters.")
    return list(first)


def _refuse_other_medium(present: list[str], features: Any, columns: Columns, name: str) -> None:
    """Refuse images for a model of videos and the reverse, before any complaint of a missing column or a type."""
    if columns.video is None:
        kind, model, other = datasets.Video, "images", "videos"
        named = [column for column in _VIDEO_NAMES if column in present and columns.image not in present]
        remedy = "train a model of videos (such as Wan 2.1) on it, or give a dataset of images"
    else:
        kind, model, other = datasets.Image, "videos", "images"
        named = [columns.image] if columns.image in present and columns.video not in present else []
        remedy = "train a model of images on it, give a dataset of videos, or name its column: `video_column='...'`"
    typed = [column for column in (columns.visual, *named) if isinstance(features.get(column), kind)]
    for found in [*typed, *named]:
        raise DataError(
            f"{name}: the model makes {model}, and the column {found!r} holds {other}; a column {columns.visual!r} "
            f"of {model} is needed. To mend it, {remedy}."
        )


def _missing_columns(
    present: list[str], roles: dict[str, str], missing: list[str], name: str, features: Any
) -> DataError:
    if missing == ["score"] and set(present) >= _MADE and "prompt_from" not in present:
        scored = sorted(c for c in features if c not in _NO_SCORES and _is_number_type(features[c]))
        return _without_score(scored, roles["score"], name)
    free = [column for column in present if column not in roles.values()]
    lowered = {column.lower(): column for column in reversed(free)}
    lines, fields, flags = [], [], []
    for role in missing:
        known = [lowered[synonym] for synonym in SYNONYMS[role] if synonym in lowered]
        guesses = [*known, *difflib.get_close_matches(roles[role], free, n=1), f"your_{role}_column"]
        fields.append(f"{role}_column={guesses[0]!r}")
        flags.append(f"--{role}_column {guesses[0]}")
        lines.append(f'dataset = dataset.rename_column("{guesses[0]}", "{roles[role]}")')
    named = " and ".join(f"{roles[role]!r} ({role})" for role in missing)
    needed = [f"{'an' if role == 'image' else 'a'} {role}" for role in roles]
    ways = (
        "Rate them in the browser (`tgol rate`), give them stars in a photo program, sort them into folders called by "
        "numbers or `good` and `bad` and set `--folder_scores`, or let a reward function score them (`tgol score`)."
    )
    of_files = "prompt_from" in present and missing == ["score"]  # and not of a Hub dataset, for instance
    if of_files and "settings" in present:  # without a table
        return DataError(f"{name}: no image of the folder has a score. {ways}")
    return DataError(
        f"{name}: no column {named}; the columns are {present}. Every row needs "
        f"{', '.join(needed[:-1])} and {needed[-1]}. Name yours: "
        f"`{', '.join(fields)}` in TGOLConfig, `{' '.join(flags)}` on a command line; or rename it:\n"
        + "\n".join(lines)
        + (f"\nNo image that the table names has a score either. {ways}" if of_files else "")
    )


def _without_score(scored: list[str], wanted: str, name: str) -> DataError:
    """Return the error for generated images that have no score, or scores under the names of rewards."""
    if scored:
        columns = ", ".join(map(repr, scored))
        return DataError(
            f"{name}: the images have scores in {columns}, and none is called {wanted!r}. Name one: `score_column="
            f"{scored[0]!r}` in TGOLConfig, `--score_column {scored[0]}` on a command line."
        )
    return DataError(
        f"{name}: these images of `tgol generate` have no scores yet. Let a reward function score them (`tgol score`) "
        "or rate them in the browser (`tgol rate`), and go on with the folder that it writes."
    )


def _refuse_pairs(present: list[str], columns: Columns, name: str, missing: list[str]) -> None:
    pair = next(((first, second) for first, second in _PAIRS if {first, second} <= set(present)), None)
    if pair is None:
        return
    text = next((column for column in (columns.prompt, *SYNONYMS["prompt"]) if column in present), columns.prompt)
    label = next((column for column in ("label_0", "label", "preference") if column in present), "your_label_column")
    named, options = f'"{text}", "{pair[0]}", "{pair[1]}"', ""
    if pair[0] != "chosen":
        named, options = f'{named}, "{label}"', ', choice_numbers="share"'
    code = "from tgol_trainer.converters import PairColumns, pairs_to_scores\n\n"
    code += f"dataset = pairs_to_scores(dataset, PairColumns({named}){options})"
    renamed = {"prompt": columns.prompt, "image": columns.image, "score": columns.score}
    renamed = {made: wanted for made, wanted in renamed.items() if made != wanted}
    code += f"\ndataset = dataset.rename_columns({renamed})" if renamed else ""
    absent = " and ".join(repr(getattr(columns, role)) for role in missing)
    raise DataError(
        f"{name}: it holds pairs (columns {pair[0]!r} and {pair[1]!r}) and no column {absent}. Training needs one "
        "image and its score per row. This makes them; the score is the number of comparisons that an image won:\n"
        f"{code}\nOr leave it to the command `tgol convert pairs`."
    )


def _check_prompt_type(feature: Any, column: str, name: str) -> None:
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    if dtype in (*_TEXTS, "null"):
        return
    if dtype:
        remedy = CAST_PROMPT.format(column=column)
    elif isinstance(feature, datasets.List) and getattr(feature.feature, "dtype", None) == "string":
        remedy = f'dataset = dataset.map(lambda texts: {{"{column}": texts[0]}}, input_columns="{column}")'
    else:
        remedy = "store one text per row."
    raise DataError(f"{name}: column {column!r} must hold text, {_kind(feature)}. To mend it:\n{remedy}")


def _kind(feature: Any) -> str:
    """Say what a column holds; `datasets` reads a JSON column of several types as `Json`."""
    return "its rows hold values of several types" if type(feature).__name__ == "Json" else f"its type is {feature}"


def _check_image_type(feature: Any, column: str, name: str) -> None:
    """Refuse a type that cannot hold images: files, paths, encoded bytes or nested lists of numbers."""
    inner, depth = _innermost(feature)
    if isinstance(feature, (datasets.Image, datasets.Array2D, datasets.Array3D)) or _is_file(feature):
        return
    if depth >= 2 and _is_number_type(inner):
        return
    why = "it holds one list per row; give every image its own row, with its prompt and score"
    if depth != 1:
        why = "store one image, path or encoded file per row, for example by casting a column of paths:\n"
        why += f'dataset = dataset.cast_column("{column}", datasets.Image())'
    raise DataError(f"{name}: column {column!r} must hold images, {_kind(feature)}: {why}")


def _check_video_type(feature: Any, column: str, name: str) -> None:
    """Refuse a type that cannot hold videos: files, paths, encoded bytes, lists of frames or of numbers."""
    inner, depth = _innermost(feature)
    if isinstance(feature, (datasets.Video, datasets.Array4D)) or _is_file(feature):
        return
    if isinstance(inner, (datasets.Array2D, datasets.Array3D)) or (depth == 4 and _is_number_type(inner)):
        return
    if depth == 1 and (isinstance(inner, datasets.Image) or _is_file(inner)):
        return
    raise DataError(
        f"{name}: column {column!r} must hold videos, its type is {feature}: store one path, encoded file, list of "
        "frames or array (frames, height, width, channels) per row, for example by casting a column of paths:\n"
        f'dataset = dataset.cast_column("{column}", datasets.Video(decode=False))'
    )


def _is_number_type(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype.startswith(_NUMBERS)


def _is_file(feature: Any) -> bool:
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    files = (*_TEXTS, "binary", "large_binary", "binary_view", "null")
    return isinstance(feature, datasets.Value) and feature.dtype in files


def _innermost(feature: Any) -> tuple[Any, int]:
    """Return what the lists of a type hold, and how deep they are nested."""
    depth = 0
    while isinstance(feature, (datasets.List, datasets.LargeList)):
        feature, depth = feature.feature, depth + 1
    return feature, depth


def check_score_columns(
    dataset: datasets.Dataset | datasets.IterableDataset, columns: Sequence[str], name: str
) -> None:
    """
    Raise a [`DataError`] if one of several columns of scores is missing or does not hold numbers. The first row of a
    stream with unknown features is read, and its types are not checked.
    """
    present = _column_names(dataset, name)
    for column in columns:
        if column not in present:
            close = difflib.get_close_matches(column, present, n=1)
            raise DataError(
                f"{name}: no column {column!r} (score_columns); the columns are {present}."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )
        if dataset.features is not None:  # otherwise the rows are checked as they come
            check_score_type(dataset, column, name)


def check_score_type(dataset: datasets.Dataset | datasets.IterableDataset, column: str, name: str) -> None:
    """
    Raise a [`DataError`] if a column of scores, of known type, does not hold numbers. The texts of a
    [`datasets.Dataset`] that do not read as numbers are listed.
    """
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        logger.warning(
            "%s: column %r holds classes; their numbers are used as scores, from 0 for %r to %d for %r. If that order "
            "is not from worst to best, store numbers instead.",
            *(name, column, feature.names[0], len(feature.names) - 1, feature.names[-1]),
        )
        return
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    if dtype.startswith((*_NUMBERS, "decimal", "null")):
        return
    if dtype not in _TEXTS:
        raise DataError(
            f"{name}: column {column!r} must hold one number per row, {_kind(feature)}. Store a single number, "
            "for example the mean of several ratings."
        )
    head = f"{name}: column {column!r} must hold numbers, it holds text"
    if isinstance(dataset, datasets.IterableDataset):
        raise DataError(f"{head}. To mend it:\n" + CAST_SCORE_WITH_BLANKS.format(column=column))
    raise DataError(head + _about_texts(dataset.select_columns([column]).with_format(None)[column], column))


def _about_texts(texts: Sequence[str | None], column: str) -> str:
    """Say which texts of a score column are not numbers, and how to make numbers of the column."""
    bad = [(row, text) for row, text in enumerate(texts) if not _is_number(text)]
    listed = bad or list(enumerate(texts[: _SHOWN_ROWS + 1]))
    shown = ", ".join(f"row {row}: {describe(text)}" for row, text in listed[:_SHOWN_ROWS])
    shown = f"({shown}{', ...' if len(listed) > _SHOWN_ROWS else ''}; rows are counted from 0)"
    if not bad:
        cast = CAST_SCORE.format(column=column)
        return f" {shown}. Every one reads as a number, so a cast mends it:\n{cast}"
    cast = CAST_SCORE_WITH_BLANKS.format(column=column)
    commas = [_is_number(text.replace(",", ".")) for _, text in bad if text and text.strip()]
    if not any(commas):
        return (
            f", which in {len(bad)} of {len(texts)} rows does not read as a number {shown}. To mend it, leaving those "
            f"rows out:\n{cast}"
        )
    others, remedy = "", "To mend it"
    if not all(commas):
        others = f" and other text that does not read as a number, {commas.count(False)} of {len(texts)} rows"
        remedy += ", leaving those rows out"
    if all(_THOUSANDS.fullmatch(text.strip()) for _, text in bad if text and "," in text):
        remedy = f'If the commas part thousands, put "" for "." in what follows. {remedy}'
    cast = cast.replace("float(score)", 'float(str(score).replace(",", "."))')
    return f" with decimal commas{others} {shown}. {remedy}:\n{cast}"


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and read_score(float(text))[1] is None
    except ValueError:
        return False
