"""Comparisons of two images to one row per image, scored by the comparisons it won."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np

from tgol_trainer.data.images import DataError

from .base import (
    PROMPT_COLUMNS,
    Conversion,
    Dropped,
    ImageIndex,
    as_files,
    batches,
    check_source,
    image_key,
    image_path,
    one_row_per_image,
    pick,
    usable_prompt,
)

logger = logging.getLogger(__name__)

PairMethod = Literal["wins", "win_rate", "bradley_terry"]
Numbers = Literal["share", "index"]

_PAIRS = (("jpg_0", "jpg_1"), ("image_0", "image_1"), ("chosen", "rejected"), ("image_a", "image_b"))
_UIDS = ("image_0_uid", "image_1_uid")
_CHOICES = ("label_0", "choice", "preference", "winner", "label", "preferred", "vote", "best_image_uid")
_FIRST = ("win", "won", "first", "left", "a", "model_a", "better")
_SECOND = ("loss", "lose", "lost", "second", "right", "b", "model_b", "worse")
_TIE = ("tie", "tied", "ties", "draw", "both", "neither", "equal", "same", "no preference", "both good", "both bad")
_SHARES = dict.fromkeys(_FIRST, 1.0) | dict.fromkeys(_SECOND, 0.0) | dict.fromkeys(_TIE, 0.5)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Which columns hold a comparison; `choice` is `None` where the first image always won."""

    prompt: str
    images: tuple[str, str]
    choice: str | None
    uids: tuple[str, str] | None
    numbers: Numbers | None
    checks: tuple[str, ...]

    @property
    def small(self) -> list[str]:
        """The columns beside those of images."""
        names = [self.prompt, *([self.choice] if self.choice else []), *(self.uids or ()), *self.checks]
        return list(dict.fromkeys(names))


def pairs_to_scores(
    dataset: datasets.Dataset,
    *,
    method: PairMethod = "wins",
    prompt_column: str | None = None,
    first_column: str | None = None,
    second_column: str | None = None,
    choice_column: str | None = None,
    uid_columns: tuple[str, str] | None = None,
    choice_numbers: Numbers | None = None,
    regularization: float = 0.1,
    image_root: str | Path | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
    name: str = "dataset",
) -> datasets.Dataset:
    """
    Make one row per image from comparisons of two images of a prompt. No image is decoded or copied.

    Recognised without naming columns: Pick-a-Pic v2 (`caption`, `jpg_0`, `jpg_1`, `label_0`, image ids), `prompt` with
    `chosen` and `rejected`, and `image_0`, `image_1` with a choice column. The same image with the same prompt, by its
    id, else by its encoded bytes, else by its path, becomes one row.

    Args:
        dataset ([`datasets.Dataset`]):
            One comparison a row.
        method (`str`, *optional*, defaults to `"wins"`):
            `"wins"`: comparisons won, a tie is half a win, the paper's "aggregating each image's win counts";
            `"win_rate"`: that divided by the comparisons of the image; `"bradley_terry"`: its log-strength among the
            images of its prompt, with mean 0 (needs the extra `ranking`).
        prompt_column (`str`, *optional*):
            By default `prompt`, `caption` or `text`.
        first_column (`str`, *optional*):
            The first images; of `chosen` and `rejected`, the winners.
        second_column (`str`, *optional*):
            The second images.
        choice_column (`str`, *optional*):
            What was chosen: words such as `left`, `second`, `win` (of the first image), `tie`, `both`, the name of an
            image column, the id of an image, or numbers.
        uid_columns (`tuple[str, str]`, *optional*):
            Ids of the images; by default `image_0_uid` and `image_1_uid` where they exist.
        choice_numbers (`str`, *optional*):
            What numbers in the choice column mean: `"share"`, 1 where the first image won and 0 where the second did,
            as `label_0` of Pick-a-Pic; or `"index"`, 0 for the first and 1 for the second. 0.5 is a tie. Needed for
            numbers in any column but `label_0`.
        regularization (`float`, *optional*, defaults to 0.1):
            Of `"bradley_terry"`: λ > 0 in `-log likelihood + λ · Σ strength²`, which keeps undefeated images finite.
        image_root (`str` or `Path`, *optional*):
            Folder that relative paths start from; by default the working directory.
        on_bad_sample (`str`, *optional*, defaults to `"raise"`):
            `"raise"` lists the rows that cannot be used in an error; `"skip"` leaves them out and warns.
        name (`str`, *optional*, defaults to `"dataset"`):
            What messages call the dataset.

    Returns:
        [`datasets.Dataset`]: `prompt`, `image`, `score` and `num_comparisons`, in the order the images come.

    Raises:
        DataError: for a layout that is not recognised, or rows that cannot be used under `"raise"`.
        ImportError: for `"bradley_terry"` without `choix`.
    """
    columns = (prompt_column, first_column, second_column, choice_column, uid_columns, choice_numbers)
    layout = _layout(dataset, columns, on_bad_sample, name)
    return convert_pairs(dataset, layout, method, regularization, image_root, on_bad_sample, name).dataset


def pairs_conversion(dataset: datasets.Dataset, **options: Any) -> Conversion:
    """
    Do what [`pairs_to_scores`] does and return the counts too.

    Args:
        dataset ([`datasets.Dataset`]):
            One comparison a row.
        options (`Any`):
            The arguments of [`pairs_to_scores`].

    Returns:
        [`Conversion`]
    """
    given = {"on_bad_sample": "raise", "name": "dataset", "method": "wins", "regularization": 0.1, **options}
    roles = ("prompt_column", "first_column", "second_column", "choice_column", "uid_columns", "choice_numbers")
    policy, name = given["on_bad_sample"], given["name"]
    layout = _layout(dataset, tuple(given.get(role) for role in roles), policy, name)
    root = given.get("image_root")
    return convert_pairs(dataset, layout, given["method"], given["regularization"], root, policy, name)


def _layout(dataset: datasets.Dataset, columns: tuple[Any, ...], on_bad_sample: str, name: str) -> _Layout:
    check_source(dataset, on_bad_sample, name)
    present = dataset.column_names
    prompt, first, second, choice, uids, numbers = columns
    if numbers not in (None, "share", "index"):
        raise DataError(f"`choice_numbers`: got {numbers!r}; it must be 'share' or 'index'.")
    known = next((pair for pair in _PAIRS if set(pair) <= set(present)), ("image_0", "image_1"))
    images = (
        pick(present, first, known[:1], "first_column", name),
        pick(present, second, known[1:], "second_column", name),
    )
    if images[0] == images[1]:
        raise DataError(f"{name}: `first_column` and `second_column` are both {images[0]!r}. Name two columns.")
    if choice is not None or images[0] != "chosen":
        choice = pick(present, choice, _CHOICES, "choice_column", name)
    if uids is None and set(_UIDS) <= set(present):
        uids = _UIDS
    for uid in uids or ():
        pick(present, uid, (), "uid_columns", name)
    checks = ("has_label", "label_1", "best_image_uid") if choice == "label_0" else ()
    return _Layout(
        prompt=pick(present, prompt, PROMPT_COLUMNS, "prompt_column", name),
        images=images,
        choice=choice,
        uids=uids,
        numbers=numbers or ("share" if choice == "label_0" else None),
        checks=tuple(column for column in checks if column in present),
    )


def convert_pairs(
    dataset: datasets.Dataset,
    layout: _Layout,
    method: str,
    regularization: float,
    image_root: str | Path | None,
    on_bad_sample: Literal["raise", "skip"],
    name: str,
) -> Conversion:
    """Read the comparisons in one pass, score the images, and point one row at each; see [`pairs_to_scores`]."""
    if method not in ("wins", "win_rate", "bradley_terry"):
        raise DataError(f"`method`: got {method!r}; it must be 'wins', 'win_rate' or 'bradley_terry'.")
    if not (math.isfinite(regularization) and regularization > 0):
        raise DataError(f"`regularization`: got {regularization}; it must be above 0, or undefeated images diverge.")
    if method == "bradley_terry":
        _import_choix()  # before the pass over the data
    files = as_files(dataset, layout.images, layout.small, image_root, name)
    index, dropped = ImageIndex(), Dropped()
    firsts, seconds, shares = array("q"), array("q"), array("d")
    for start, table in batches(files):
        cells = {column: table.column(column).to_pylist() for column in layout.small}
        images = [table.column(column) for column in layout.images]
        for offset in range(table.num_rows):
            row = {column: values[offset] for column, values in cells.items()}
            share, cause, value = _read_choice(row, layout, name)
            if not usable_prompt(row[layout.prompt], start + offset, dropped):
                continue
            uids = [row[column] for column in layout.uids] if layout.uids else [None, None]
            keys = [image_key(column[offset], uid) for column, uid in zip(images, uids, strict=True)]
            for column, image, (_, problem) in zip(layout.images, images, keys, strict=True):
                if cause is None and problem is not None:
                    cause, value = f"{problem} in {column!r}", image_path(image[offset])
            if cause is None and keys[0] == keys[1]:
                cause, value = "an image compared with itself", uids[0]
            if cause is not None:
                dropped.add(cause, start + offset, value)
                continue
            firsts.append(index.add(row[layout.prompt], keys[0][0], start + offset, 0))
            seconds.append(index.add(row[layout.prompt], keys[1][0], start + offset, 1))
            shares.append(share)
    dropped.settle(name, len(dataset), on_bad_sample)
    a, b, won = np.array(firsts), np.array(seconds), np.array(shares)
    wins = np.bincount(a, won, len(index)) + np.bincount(b, 1 - won, len(index))
    counts = np.bincount(a, minlength=len(index)) + np.bincount(b, minlength=len(index))
    scores = {"wins": wins, "win_rate": wins / counts}.get(method)
    if scores is None:
        scores = _strengths(a, b, won, np.array(index.prompts), regularization)
    values = {"score": scores, "num_comparisons": counts.astype(np.int64)}
    scored = one_row_per_image(files, layout.prompt, layout.images, index, values)
    return Conversion(scored, len(dataset), len(won), int((won == 0.5).sum()), dict(dropped.counts))


def _read_choice(row: Mapping[str, Any], layout: _Layout, name: str) -> tuple[float, str | None, Any]:
    """Return the first image's share of the win, the cause for which the row cannot be used, and the value shown."""
    if layout.choice is None:
        return 1.0, None, None
    value = row[layout.choice]
    if row.get("has_label") is False or value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan, "no label", value
    share = _share(value, row, layout, name)
    if share is None:
        return math.nan, f"unknown choice in {layout.choice!r}", value
    other, best = row.get("label_1"), row.get("best_image_uid")
    if other is not None and share + other != 1:
        return math.nan, "contradictory labels", f"label_0={value} label_1={other}"
    if best not in (None, "") and layout.uids:
        named = {row[layout.uids[1]]: 0.0, row[layout.uids[0]]: 1.0, "tie": 0.5}.get(best)
        if named != share:
            return math.nan, "contradictory labels", f"label_0={value} best_image_uid={best}"
    return share, None, None


def _share(value: Any, row: Mapping[str, Any], layout: _Layout, name: str) -> float | None:
    uids = [row[column] for column in layout.uids] if layout.uids else []
    # A number is an id only where it cannot be a label.
    if value in uids and uids[0] != uids[1] and (isinstance(value, str) or layout.numbers is None):
        return 1.0 - uids.index(value)
    word = str(value).strip().lower().replace("_", " ").replace("-", " ")
    columns = [column.lower().replace("_", " ").replace("-", " ") for column in layout.images]
    if word in columns:
        return 1.0 - columns.index(word)
    if word.replace(" ", "_") in _SHARES or word in _SHARES:
        return _SHARES.get(word, _SHARES.get(word.replace(" ", "_")))
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if number not in (0.0, 0.5, 1.0):
        return None
    if layout.numbers is None:
        raise DataError(
            f"{name}: column {layout.choice!r} holds numbers, which may mean either image. Say "
            "`choice_numbers='share'` (`--choice_numbers share`) if 1 means that the first image won, or 'index' if 1 "
            "means the second one."
        )
    return number if layout.numbers == "share" else 1.0 - number


def _import_choix() -> Any:
    try:
        import choix
    except ImportError as error:
        raise ImportError(
            "Bradley-Terry strengths are computed by choix, which is not installed: "
            "`pip install 'tgol_trainer[ranking]'`. The methods 'wins' and 'win_rate' need nothing more."
        ) from error
    return choix


def _strengths(
    firsts: np.ndarray, seconds: np.ndarray, shares: np.ndarray, prompts: np.ndarray, regularization: float
) -> np.ndarray:
    """Return the strength of every image; the comparisons of a prompt are independent of those of another."""
    strengths = np.zeros(len(prompts))
    order = np.argsort(prompts[firsts], kind="stable")
    _, starts = np.unique(prompts[firsts][order], return_index=True)
    for group in np.split(order, starts[1:]):
        images, local = np.unique(np.concatenate([firsts[group], seconds[group]]), return_inverse=True)
        games = zip(*np.split(local, 2), shares[group], strict=True)
        data = tuple((int(first), int(second), float(share)) for first, second, share in games)
        strengths[images] = _fit(len(images), data, regularization)
    return strengths


@functools.lru_cache(maxsize=4096)  # most prompts have one of a few small tournaments
def _fit(num_images: int, games: tuple[tuple[int, int, float], ...], regularization: float) -> np.ndarray:
    # choix knows no ties: every comparison is entered twice, a tie once each way, and λ doubled with them.
    data: list[tuple[int, int]] = []
    for first, second, share in games:
        winner, loser = (first, second) if share else (second, first)
        data += [(winner, loser), (loser, winner) if share == 0.5 else (winner, loser)]
    choix = _import_choix()
    for method in ("Newton-CG", "BFGS"):
        strengths = choix.opt_pairwise(num_images, data, alpha=2 * regularization, method=method, tol=1e-9)
        slope = 4 * regularization * strengths
        for winner, loser in data:
            rest = 1 / (1 + math.exp(strengths[winner] - strengths[loser]))
            slope[winner] -= rest
            slope[loser] += rest
        if np.abs(slope).max() <= 1e-5 * max(1, len(data)):  # choix does not say whether it converged
            return strengths
    raise DataError(
        f"`method`: the Bradley-Terry fit of a prompt with {num_images} images and {len(games)} comparisons did not "
        "converge. Raise `regularization`, or use 'win_rate'."
    )
