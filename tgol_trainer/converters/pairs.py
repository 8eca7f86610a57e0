"""Convert pairwise comparisons to one row per image, scored by the comparisons that it won."""

from __future__ import annotations

import dataclasses
import functools
import math
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import datasets
import numpy as np

from tgol_trainer.data.images import DataError

from .base import Conversion, Dropped, ImageIndex, Problem, Source, read_rows

PairMethod = Literal["wins", "win_rate", "bradley_terry"]
ChoiceNumbers = Literal["share", "index"]

_PROMPTS = ("prompt", "caption", "text")
_PAIRS = (("jpg_0", "jpg_1"), ("image_0", "image_1"), ("chosen", "rejected"), ("image_a", "image_b"))
_UIDS = ("image_0_uid", "image_1_uid")
_CHOICES = ("label_0", "choice", "preference", "winner", "label", "preferred", "vote", "best_image_uid")
_FIRST = ("win", "won", "first", "left", "a", "model a", "better")
_SECOND = ("loss", "lose", "lost", "second", "right", "b", "model b", "worse")
_TIE = ("tie", "tied", "ties", "draw", "both", "neither", "equal", "same", "no preference", "both good", "both bad")
_SHARES = dict.fromkeys(_FIRST, 1.0) | dict.fromkeys(_SECOND, 0.0) | dict.fromkeys(_TIE, 0.5)


@dataclasses.dataclass(frozen=True)
class PairColumns:
    """
    The columns of a dataset of comparisons. Columns that are not given are found by their usual names.

    Args:
        prompt (`str`, *optional*): Texts; by default `prompt`, `caption` or `text`.
        first (`str`, *optional*): The first images; of `chosen` and `rejected`, the winners.
        second (`str`, *optional*): The second images.
        choice (`str`, *optional*):
            What was chosen: words such as `left`, `second`, `win` (of the first image), `tie`, `both`, the name of an
            image column, the id of an image, or numbers.
        uids (`tuple[str, str]`, *optional*):
            Ids of the images; by default `image_0_uid` and `image_1_uid` where they exist.
    """

    prompt: str | None = None
    first: str | None = None
    second: str | None = None
    choice: str | None = None
    uids: tuple[str, str] | None = None


def pairs_to_scores(
    dataset: datasets.Dataset,
    columns: PairColumns | None = None,
    *,
    method: PairMethod = "wins",
    choice_numbers: ChoiceNumbers | None = None,
    regularization: float = 0.1,
    image_root: str | Path | None = None,
    on_bad_sample: Literal["raise", "skip"] = "raise",
) -> datasets.Dataset:
    """
    Make one row per image from comparisons of two images of a prompt. No image is decoded or copied.

    Recognised without naming columns: Pick-a-Pic v2 (`caption`, `jpg_0`, `jpg_1`, `label_0`, image ids), `prompt` with
    `chosen` and `rejected`, and `image_0`, `image_1` with a choice column. Images with the same prompt become one row
    if they have the same id, or without ids the same encoded bytes, or without bytes the same path.

    Args:
        dataset ([`datasets.Dataset`]): One comparison per row.
        columns ([`PairColumns`], *optional*): Its columns; by default those of the layouts above.
        method (`str`, *optional*, defaults to `"wins"`):
            `"wins"`: comparisons won, a tie is half a win, the paper's "aggregating each image's win counts";
            `"win_rate"`: that divided by the comparisons of the image; `"bradley_terry"`: its log-strength among the
            images of its prompt, with mean 0 (needs the extra `ranking`).
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

    Returns:
        [`datasets.Dataset`]: `prompt`, `image`, `score` and `num_comparisons`, in the order the images come.

    Raises:
        DataError: for a layout that is not recognised, or rows that cannot be used under `"raise"`.
        ImportError: for `"bradley_terry"` without `choix`.
    """
    source = Source(dataset, image_root, on_bad_sample)
    return convert_pairs(source, columns or PairColumns(), method, choice_numbers, regularization).dataset


def convert_pairs(
    source: Source,
    columns: PairColumns,
    method: PairMethod = "wins",
    choice_numbers: ChoiceNumbers | None = None,
    regularization: float = 0.1,
) -> Conversion:
    """Convert the comparisons of a source as [`pairs_to_scores`] does, and return the counts too."""
    layout = _find_layout(source, columns, choice_numbers)
    if method not in get_args(PairMethod):
        raise DataError(f"`method`: got {method!r}; it must be 'wins', 'win_rate' or 'bradley_terry'.")
    if not (math.isfinite(regularization) and regularization > 0):
        raise DataError(f"`regularization`: got {regularization}; it must be above 0, or undefeated images diverge.")
    if method == "bradley_terry":
        _import_choix()  # a missing library is reported before the pass over the data
    files = source.undecoded(layout.images, layout.others)
    index, dropped = ImageIndex(), Dropped()
    firsts, seconds, shares = array("q"), array("q"), array("d")
    for row in read_rows(files, layout.prompt, layout.images, layout.uids):
        share, problem = _read_choice(row.cells, layout, source.name)
        problem = row.prompt_problem or problem or row.image_problem
        if problem is None and row.keys[0] == row.keys[1]:
            problem = "an image compared with itself", row.cells[layout.uids[0]] if layout.uids else None
        if problem is not None:
            dropped.add(row.number, problem)
            continue
        firsts.append(index.add(row.cells[layout.prompt], row, 0))
        seconds.append(index.add(row.cells[layout.prompt], row, 1))
        shares.append(share)
    dropped.raise_or_warn(source)
    a, b, won = np.array(firsts), np.array(seconds), np.array(shares)
    scores = np.bincount(a, won, len(index)) + np.bincount(b, 1 - won, len(index))
    counts = np.bincount(a, minlength=len(index)) + np.bincount(b, minlength=len(index))
    if method == "win_rate":
        scores = scores / counts
    elif method == "bradley_terry":
        scores = _strengths(a, b, won, index.prompt_ids, regularization)
    values = {"score": scores, "num_comparisons": counts.astype(np.int64)}
    scored = index.one_row_per_image(files, layout.prompt, layout.images, values)
    return Conversion(scored, len(files), len(won), int((won == 0.5).sum()), dropped.num_rows)


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The columns that hold a comparison; `choice` is `None` where the first image always won."""

    prompt: str
    images: tuple[str, str]
    choice: str | None
    uids: tuple[str, ...]
    numbers: ChoiceNumbers | None
    others: list[str]


def _find_layout(source: Source, columns: PairColumns, numbers: ChoiceNumbers | None) -> _Layout:
    if numbers not in (None, *get_args(ChoiceNumbers)):
        raise DataError(f"`choice_numbers`: got {numbers!r}; it must be 'share' or 'index'.")
    present = source.dataset.column_names
    first, second = next((pair for pair in _PAIRS if set(pair) <= set(present)), ("image_0", "image_1"))
    first = source.column(columns.first, "first_column", [first])
    second = source.column(columns.second, "second_column", [second])
    if first == second:
        raise DataError(f"{source.name}: the first and the second images are both {first!r}. Name two columns.")
    choice = columns.choice
    if choice is not None or first != "chosen":
        choice = source.column(choice, "choice_column", _CHOICES)
    usual = _UIDS if set(_UIDS) <= set(present) else ()
    uids = usual if columns.uids is None else columns.uids
    for uid in uids:
        source.column(uid, "uid_columns")
    prompt = source.column(columns.prompt, "prompt_column", _PROMPTS)
    others = [prompt, *uids]
    if choice is not None:
        others.append(choice)
    if choice == "label_0":
        numbers = numbers or "share"
        others += [name for name in ("has_label", "label_1", "best_image_uid") if name in present]
    return _Layout(prompt, (first, second), choice, uids, numbers, others)


def _read_choice(cells: Mapping[str, Any], layout: _Layout, name: str) -> tuple[float, Problem | None]:
    """Return the first image's share of the win, and why the choice cannot be used or `None`."""
    if layout.choice is None:
        return 1.0, None
    value = cells[layout.choice]
    if cells.get("has_label") is False or value is None or (isinstance(value, float) and math.isnan(value)):
        return math.nan, ("no label", value)
    uids = [cells[column] for column in layout.uids]
    share = _read_share(value, uids, layout, name)
    if share is None:
        return math.nan, (f"unknown choice in {layout.choice!r}", value)
    other, best = cells.get("label_1"), cells.get("best_image_uid")
    if other is not None and share + other != 1:
        return math.nan, ("contradictory labels", f"label_0={value} label_1={other}")
    if best not in (None, "") and uids and {uids[1]: 0.0, uids[0]: 1.0, "tie": 0.5}.get(best) != share:
        return math.nan, ("contradictory labels", f"label_0={value} best_image_uid={best}")
    return share, None


def _read_share(value: Any, uids: list[Any], layout: _Layout, name: str) -> float | None:
    # A number is an id only where it cannot be a label.
    if value in uids and uids[0] != uids[1] and (isinstance(value, str) or layout.numbers is None):
        return 1.0 - uids.index(value)
    word, images = _plain_word(value), [_plain_word(column) for column in layout.images]
    if word in images:
        return 1.0 - images.index(word)
    if word in _SHARES:
        return _SHARES[word]
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


def _plain_word(value: Any) -> str:
    return str(value).strip().lower().replace("_", " ").replace("-", " ")


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
    firsts: np.ndarray, seconds: np.ndarray, shares: np.ndarray, prompt_ids: np.ndarray, regularization: float
) -> np.ndarray:
    """Return the strength of every image; the comparisons of one prompt are independent of those of another."""
    strengths = np.zeros(len(prompt_ids))
    order = np.argsort(prompt_ids[firsts], kind="stable")
    _, starts = np.unique(prompt_ids[firsts][order], return_index=True)
    for group in np.split(order, starts[1:]):
        images, local = np.unique(np.concatenate([firsts[group], seconds[group]]), return_inverse=True)
        games = zip(*np.split(local, 2), shares[group], strict=True)
        data = tuple((int(first), int(second), float(share)) for first, second, share in games)
        strengths[images] = _fit_strengths(len(images), data, regularization)
    return strengths


@functools.lru_cache(maxsize=4096)  # most prompts have one of a few small tournaments
def _fit_strengths(num_images: int, games: tuple[tuple[int, int, float], ...], regularization: float) -> np.ndarray:
    # choix knows no ties: every comparison is entered twice, a tie once each way, and λ is doubled with them.
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
