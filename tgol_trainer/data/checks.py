"""The shape of a dataset: its class, its columns and their types, each refused with the code that mends it."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Sequence
from typing import Any

import datasets

from .images import DataError, describe
from .rows import CAST_SCORE, CAST_SCORE_WITH_BLANKS, Columns, read_score

logger = logging.getLogger(__name__)

_SYNONYMS = {
    "prompt": ("prompt", "caption", "text", "prompts", "captions", "instruction"),
    "image": (
        "image",
        "img",
        "image",
        "jpg",
        "png",
        "file_name",
        "filename",
        "image_path",
        "path",
        "file",
        "images",
    ),
    "video": (
        "video",
        "clip",
        "mp4",
        "webm",
        "file_name",
        "filename",
        "video_path",
        "path",
        "file",
        "videos",
        "frames",
    ),
    "score": ("score", "rating", "reward", "stars", "aesthetic_score", "scores", "preference", "label"),
}
_THOUSANDS = re.compile(r"[-+]?[1-9]\d{0,2}(,\d{3})+")
_PAIRS = (("chosen", "rejected"), ("image_0", "image_1"), ("jpg_0", "jpg_1"))

_PAIR_HEAD = """import collections
import datasets

for column in ("{first}", "{second}"):  # leaves the files as they are instead of decoding and encoding them
    dataset = dataset.cast_column(column, datasets.Image(decode=False))
"""
_PAIR_ROWS = """
def one_row_per_image(batch):
    rows = {{"{prompt}": [], "{image}": [], "{score}": []}}
    for prompt, first, second, wins in zip(batch["{text}"], batch["{first}"], batch["{second}"], {wins}):
        rows["{prompt}"] += [prompt, prompt]
        rows["{image}"] += [first, second]
        rows["{score}"] += [float(wins), float(1 - wins)]
    return rows
"""
_PAIR_ROWS_BY_ID = """
wins = collections.Counter()  # an image takes part in several comparisons
for first, second, won in zip(dataset["image_0_uid"], dataset["image_1_uid"], dataset["{label}"]):
    wins[first] += won
    wins[second] += 1 - won

def one_row_per_image(batch):
    rows = {{"{prompt}": [], "{image}": [], "{score}": []}}
    for side, column in enumerate(("{first}", "{second}")):
        for prompt, image, uid in zip(batch["{text}"], batch[column], batch[f"image_{{side}}_uid"]):
            if uid in wins:  # the first time only
                rows["{prompt}"].append(prompt)
                rows["{image}"].append(image)
                rows["{score}"].append(float(wins.pop(uid)))
    return rows
"""
_PAIR_TAIL = """
dataset = dataset.map(one_row_per_image, batched=True, batch_size=16, remove_columns=dataset.column_names)
dataset = dataset.cast_column("{image}", datasets.Image())"""


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
            The user's dataset; of a stream with unknown features, the first row is read.
        columns ([`Columns`]):
            Names to look for.
        name (`str`, *optional*, defaults to `"train_dataset"`):
            The argument it was given as, for messages.
        scored (`bool`, *optional*, defaults to `True`):
            Whether the score column is needed.
        shown (`bool`, *optional*, defaults to `True`):
            Whether the column of images or videos is needed.

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
    present = _column_names(dataset, name)
    roles = {"prompt": columns.prompt, columns.medium: columns.visual, "score": columns.score}
    roles = {role: column for role, column in roles.items() if {"prompt": True, "score": scored}.get(role, shown)}
    if columns.group is not None:
        roles["group"] = columns.group
    missing = [role for role, column in roles.items() if column not in present]
    features = dataset.features
    if shown:
        _refuse_other_medium(present, features, columns, name)
    if set(missing) & {"image", "score"}:
        _refuse_pairs(present, columns, name, missing)
    if missing:
        raise _missing_columns(present, roles, missing, name)
    if features is not None:  # a stream after `map` does not know them; its rows are checked as they come
        check_prompt_type(features[columns.prompt], columns.prompt, name)
        if shown:
            check_visual = check_image_type if columns.video is None else check_video_type
            check_visual(features[columns.visual], columns.visual, name)
        if scored:
            check_score_type(dataset, columns.score, name)


def check_class(dataset: Any, name: str) -> None:
    """
    Check that the value is a dataset of `datasets`, and show how to make one of what it is instead.

    Args:
        dataset (`Any`):
            What the user gave.
        name (`str`):
            The argument it was given as.

    Raises:
        DataError: if it is neither a [`datasets.Dataset`] nor a [`datasets.IterableDataset`].
    """
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return
    import torch

    kind = f"{type(dataset).__module__}.{type(dataset).__qualname__}".removeprefix("builtins.")
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        splits = list(dataset)
        split = "train" if "train" in splits or not splits else splits[0]
        raise DataError(
            f"{name}: it is a {type(dataset).__name__} with the splits {splits}; training needs one of them. "
            f"Pick it: `{name}=dataset[{split!r}]`, or load it alone: `load_dataset(..., split={split!r})`."
        )
    if isinstance(dataset, dict):
        remedy = "`datasets.Dataset.from_dict(dataset)` for a dictionary of columns"
    elif isinstance(dataset, (list, tuple)):
        remedy = "`datasets.Dataset.from_list(dataset)` for a list of dictionaries, one a row"
    elif kind.startswith("pandas."):
        remedy = "`datasets.Dataset.from_pandas(dataset)`"
    elif kind.startswith("polars."):
        remedy = "`datasets.Dataset.from_polars(dataset)`"
    elif isinstance(dataset, (str, bytes)) or hasattr(dataset, "__fspath__"):
        remedy = f"`load_scored_dataset({str(dataset)!r})` from tgol_trainer.data"
    elif isinstance(dataset, torch.utils.data.IterableDataset):
        remedy = "`datasets.IterableDataset.from_generator(lambda: iter(dataset))` if its items are dictionaries"
    elif isinstance(dataset, torch.utils.data.Dataset):
        remedy = (
            "`datasets.Dataset.from_list([dataset[i] for i in range(len(dataset))])` if its items are dictionaries"
        )
    else:
        remedy = "`datasets.Dataset.from_list(rows)` with one dictionary a row"
    raise DataError(f"{name}: expected a datasets.Dataset or datasets.IterableDataset, got {kind}. Use {remedy}.")


def _column_names(dataset: datasets.Dataset | datasets.IterableDataset, name: str) -> list[str]:
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first = next(iter(dataset.take(1)), None)
    if first is None:
        raise DataError(f"{name}: the stream has no rows. Check its split and its filters.")
    return list(first)


def _refuse_other_medium(present: list[str], features: Any, columns: Columns, name: str) -> None:
    """Refuse images for a model of videos and the reverse, before a missing column or a wrong type is spoken of."""
    types = features or {}
    if columns.video is None:
        kind, model, other = datasets.Video, "images", "videos"
        named = [column for column in _SYNONYMS["video"][:4] if column in present and columns.image not in present]
        remedy = "train a model of videos (such as Wan 2.1) on it, or give a dataset of images"
    else:
        kind, model, other = datasets.Image, "videos", "images"
        named = [columns.image] if columns.image in present and columns.video not in present else []
        remedy = "train a model of images on it, give a dataset of videos, or name its column: `video_column='...'`"
    typed = [column for column in (columns.visual, *named) if isinstance(types.get(column), kind)]
    found = next(iter([*typed, *named]), None)
    if found is not None:
        raise DataError(
            f"{name}: the model makes {model}, and the column {found!r} holds {other}; the column {columns.visual!r} "
            f"of {model} is looked for. To mend it, {remedy}."
        )


def _missing_columns(present: list[str], roles: dict[str, str], missing: list[str], name: str) -> DataError:
    free = [column for column in present if column not in roles.values()]
    named_so = {column.lower(): column for column in reversed(free)}
    lines, fields, flags = [], [], []
    for role in missing:
        guess = next(
            (named_so[column] for column in _SYNONYMS[role] if column in named_so),
            next(iter(difflib.get_close_matches(roles[role], free, n=1)), None),
        )
        source = guess or f"your_{role}_column"
        fields.append(f"{role}_column={source!r}")
        flags.append(f"--{role}_column {source}")
        lines.append(f'dataset = dataset.rename_column("{source}", "{roles[role]}")')
    named = " and ".join(f"{roles[role]!r} ({role})" for role in missing)
    needed = [f"{'an' if role == 'image' else 'a'} {role}" for role in roles]
    return DataError(
        f"{name}: no column {named}; the columns are {present}. Every row needs "
        f"{', '.join(needed[:-1])} and {needed[-1]}. Name yours: "
        f"`{', '.join(fields)}` in TGOLConfig, `{' '.join(flags)}` on a command line; or rename it:\n"
        + "\n".join(lines)
    )


def _refuse_pairs(present: list[str], columns: Columns, name: str, missing: list[str]) -> None:
    pair = next(((first, second) for first, second in _PAIRS if {first, second} <= set(present)), None)
    if pair is None:
        return
    text = next((column for column in (columns.prompt, *_SYNONYMS["prompt"]) if column in present), columns.prompt)
    label = next((c for c in ("label_0", "label", "preference") if c in present), "your_label_column")
    by_id = {"image_0_uid", "image_1_uid"} <= set(present)
    wins = '[1] * len(batch["chosen"])' if pair[0] == "chosen" else f'batch["{label}"]'
    code = (_PAIR_HEAD + (_PAIR_ROWS_BY_ID if by_id else _PAIR_ROWS) + _PAIR_TAIL).format(
        first=pair[0],
        second=pair[1],
        text=text,
        label=label,
        wins=wins,
        prompt=columns.prompt,
        image=columns.image,
        score=columns.score,
    )
    absent = " and ".join(repr(getattr(columns, role)) for role in missing)
    raise DataError(
        f"{name}: it holds pairs (columns {pair[0]!r} and {pair[1]!r}) and no column {absent}. Training needs one "
        f"image and its score a row. This makes them; the score is the number of comparisons an image won:\n{code}\n"
        "Or leave it to the command `tgol convert pairs`, or to `pairs_to_scores` of tgol_trainer.data."
    )


def check_prompt_type(feature: Any, column: str, name: str) -> None:
    """
    Check the type of the prompt column.

    Args:
        feature (`datasets.features.FeatureType`):
            Its type.
        column (`str`):
            Its name.
        name (`str`):
            The dataset's argument, for messages.

    Raises:
        DataError: if it does not hold text.
    """
    if isinstance(feature, datasets.Value):
        if feature.dtype in ("string", "large_string", "string_view", "null"):
            return
        remedy = f'dataset = dataset.cast_column("{column}", datasets.Value("string"))'
    elif isinstance(feature, datasets.List) and getattr(feature.feature, "dtype", None) == "string":
        remedy = f'dataset = dataset.map(lambda texts: {{"{column}": texts[0]}}, input_columns="{column}")'
    else:
        remedy = "store one text a row."
    raise DataError(f"{name}: column {column!r} must hold text, its type is {feature}. To mend it:\n{remedy}")


def check_image_type(feature: Any, column: str, name: str) -> None:
    """
    Check the type of the image column: images, paths, encoded bytes or nested lists of numbers.

    Args:
        feature (`datasets.features.FeatureType`):
            Its type.
        column (`str`):
            Its name.
        name (`str`):
            The dataset's argument, for messages.

    Raises:
        DataError: if it cannot hold images.
    """
    if isinstance(feature, (datasets.Image, datasets.Array2D, datasets.Array3D)) or _is_file(feature):
        return
    inner, depth = _innermost(feature)
    if depth >= 2 and isinstance(inner, datasets.Value) and inner.dtype.startswith(("int", "uint", "float", "bool")):
        return
    if depth == 1:
        why = "it holds a list a row; give every image a row of its own, with its prompt and score"
    else:
        why = "store an image, a path or an encoded file a row, for example by casting a column of paths:"
    cast = "" if depth == 1 else f'\ndataset = dataset.cast_column("{column}", datasets.Image())'
    raise DataError(f"{name}: column {column!r} must hold images, its type is {feature}: {why}{cast}")


def check_video_type(feature: Any, column: str, name: str) -> None:
    """
    Check the type of the video column: videos, paths, encoded bytes, lists of frames or nested lists of numbers.

    Args:
        feature (`datasets.features.FeatureType`):
            Its type.
        column (`str`):
            Its name.
        name (`str`):
            The dataset's argument, for messages.

    Raises:
        DataError: if it cannot hold videos.
    """
    if isinstance(feature, (datasets.Video, datasets.Array4D)) or _is_file(feature):
        return
    inner, depth = _innermost(feature)
    if depth == 1 and (isinstance(inner, datasets.Image) or _is_file(inner)):
        return
    number = isinstance(inner, datasets.Value) and inner.dtype.startswith(("int", "uint", "float", "bool"))
    if isinstance(inner, (datasets.Array2D, datasets.Array3D)) or (depth == 4 and number):
        return
    raise DataError(
        f"{name}: column {column!r} must hold videos, its type is {feature}: store a path, an encoded file, a list of "
        "frames or an array (frames, height, width, channels) a row, for example by casting a column of paths:\n"
        f'dataset = dataset.cast_column("{column}", datasets.Video(decode=False))'
    )


def _is_file(feature: Any) -> bool:
    if isinstance(feature, dict):
        return bool({"bytes", "path"} & set(feature))
    return isinstance(feature, datasets.Value) and feature.dtype in (
        *("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null"),
    )


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
    Check that several columns of scores are there and hold numbers.

    Args:
        dataset ([`datasets.Dataset`] or [`datasets.IterableDataset`]):
            Of a stream with unknown features, the first row is read and types are not checked.
        columns (`Sequence[str]`):
            Their names.
        name (`str`):
            The dataset's argument, for messages.

    Raises:
        DataError: for a missing column, or one that does not hold numbers.
    """
    present = _column_names(dataset, name)
    for column in columns:
        if column not in present:
            close = difflib.get_close_matches(column, present, n=1)
            raise DataError(
                f"{name}: no column {column!r} (score_columns); the columns are {present}."
                + (f" Did you mean {close[0]!r}?" if close else "")
            )
        if dataset.features is not None:  # else the rows are checked as they come
            check_score_type(dataset, column, name)


def check_score_type(dataset: datasets.Dataset | datasets.IterableDataset, column: str, name: str) -> None:
    """
    Check the type of the score column where it is known.

    Args:
        dataset ([`datasets.Dataset`] or [`datasets.IterableDataset`]):
            With known features; of a `Dataset` of texts, those that are no numbers are listed.
        column (`str`):
            Name of the column.
        name (`str`):
            The dataset's argument, for messages.

    Raises:
        DataError: if it does not hold numbers.
    """
    feature = dataset.features[column]
    if isinstance(feature, datasets.ClassLabel):
        logger.warning(
            "%s: column %r holds classes; their numbers are used as scores, from 0 for %r to %d for %r. If that order "
            "is not from worst to best, store numbers instead.",
            name,
            column,
            feature.names[0],
            len(feature.names) - 1,
            feature.names[-1],
        )
        return
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    if dtype.startswith(("int", "uint", "float", "bool", "decimal", "null")):
        return
    if dtype not in ("string", "large_string", "string_view"):
        raise DataError(
            f"{name}: column {column!r} must hold one number a row, its type is {feature}. Store a single number, for "
            "example the mean of several ratings."
        )
    head = f"{name}: column {column!r} must hold numbers, it holds text"
    if isinstance(dataset, datasets.IterableDataset):
        raise DataError(f"{head}. To mend it:\n" + CAST_SCORE_WITH_BLANKS.format(score=column))
    texts = dataset.select_columns([column]).with_format(None)[column]
    bad = [(row, text) for row, text in enumerate(texts) if not _is_number(text)]
    if not bad:
        shown = ", ".join(f"row {row}: {describe(text)}" for row, text in enumerate(texts[:5]))
        raise DataError(
            f"{head} ({shown}{', ...' if len(texts) > 5 else ''}; rows are counted from 0). Every one reads as a "
            "number, so a cast mends it:\n" + CAST_SCORE.format(score=column)
        )
    shown = ", ".join(f"row {row}: {describe(text)}" for row, text in bad[:5]) + (", ..." if len(bad) > 5 else "")
    commas = [_is_number(text.replace(",", ".")) for _, text in bad if text and text.strip()]
    if any(commas):
        others = (
            ""
            if all(commas)
            else f" and other text that reads as no number, {commas.count(False)} of {len(texts)} rows"
        )
        remedy = "To mend it" + (", leaving those rows out" if others else "")
        if all(_THOUSANDS.fullmatch(text.strip()) for _, text in bad if text and "," in text):
            remedy = f'If the commas part thousands, put "" for "." in what follows. {remedy}'
        raise DataError(
            f"{head} with decimal commas{others} ({shown}; rows are counted from 0). {remedy}:\n"
            + CAST_SCORE_WITH_BLANKS.replace("float(score)", 'float(str(score).replace(",", "."))').format(
                score=column
            )
        )
    raise DataError(
        f"{head}, which in {len(bad)} of {len(texts)} rows reads as no number ({shown}; "
        "rows are counted from 0). To mend it, leaving those rows out:\n" + CAST_SCORE_WITH_BLANKS.format(score=column)
    )


def _is_number(text: str | None) -> bool:
    try:
        return text is not None and read_score(float(text))[1] is None
    except ValueError:
        return False
