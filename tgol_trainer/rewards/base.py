"""The protocol of a reward and the one place where rewards are called."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from PIL import Image
from tqdm.auto import tqdm

_ROWS_SHOWN = 3

Medium = Literal["images", "videos"]


class RewardFunction(Protocol):
    """
    Any callable that turns images and their prompts into scores, higher is better.

    Called with a batch of `n` images and `n` prompts, it returns `n` finite numbers; `None` stands for an image
    that could not be scored. It must not depend on what else is in the batch.

    A reward of videos says so by an attribute `takes = "videos"` and is called with a list of [`Clip`]s, lists of
    frames, in place of the images. A reward that finds several numbers in one pass may have a method `columns`,
    called like it (with empty lists too), that returns them as a dictionary of such lists: `""` for the score itself,
    and the endings of the other columns (`"_vq"`).
    """

    def __call__(self, images: list[Any], prompts: list[str], /) -> list[float | None]:
        """Return one score an image (or clip), or `None` for one that could not be scored."""
        ...


class Clip(list[Image.Image]):
    """
    The frames of a video, upright and RGB, of one size, and how fast they are shown.

    Args:
        frames (`Iterable[PIL.Image.Image]`):
            In order.
        fps (`float`, *optional*):
            Frames a second; `None` where that is not known.
    """

    def __init__(self, frames: Iterable[Image.Image] = (), fps: float | None = None) -> None:
        super().__init__(frames)
        self.fps = fps


@dataclass(frozen=True)
class RewardFacts:
    """
    What the scores of a reward are, for tables and model cards.

    Args:
        name (`str`):
            Name in tables.
        model_id (`str`, *optional*):
            Hub repository or path of the reward model.
        revision (`str`, *optional*):
            Commit of it, where it is known.
        scale (`str`, *optional*, defaults to `""`):
            Unit and direction, in words.
    """

    name: str
    model_id: str | None = None
    revision: str | None = None
    scale: str = ""


def reward_facts(reward: Callable[..., Any]) -> RewardFacts:
    """
    Return what is known about a reward.

    Args:
        reward (`Callable`):
            A function, a `functools.partial` of one, or an instance with `__call__`.

    Returns:
        [`RewardFacts`]: its attribute `facts` where that is a [`RewardFacts`], else the name alone: `__name__`, that
        of the wrapped function for a partial, or the class name.
    """
    facts = getattr(reward, "facts", None)
    reward = getattr(reward, "func", reward)
    facts = facts or getattr(reward, "facts", None)
    if isinstance(facts, RewardFacts):
        return facts
    return RewardFacts(getattr(reward, "__name__", type(reward).__name__))


def reward_name(reward: Callable[..., Any]) -> str:
    """
    Return the name under which a reward appears in tables and messages.

    Args:
        reward (`Callable`):
            A function, a `functools.partial` of one, or an instance with `__call__`.

    Returns:
        `str`: the name in [`reward_facts`].
    """
    return reward_facts(reward).name


def reward_takes(reward: Callable[..., Any]) -> Medium:
    """
    Return what a reward scores.

    Args:
        reward (`Callable`):
            A function, a `functools.partial` of one, or an instance with `__call__`.

    Returns:
        `str`: `"videos"` where its attribute `takes` says so, else `"images"`.

    Raises:
        ValueError: for another value of `takes`.
    """
    takes: Any = getattr(reward, "takes", getattr(getattr(reward, "func", reward), "takes", "images"))
    if takes not in get_args(Medium):
        raise ValueError(
            f"The reward {reward_name(reward)!r} has `takes = {takes!r}`; it must be 'images' or 'videos'."
        )
    return takes


def score_columns(
    reward: RewardFunction,
    images: Sequence[Any],
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    first_row: int = 0,
) -> dict[str, list[float | None]]:
    """
    Score images or clips, and return all numbers that the reward finds.

    Args:
        reward (`RewardFunction`):
            As in [`score_images`], with or without a method `columns`.
        images, prompts, batch_size, progress, first_row:
            As in [`score_images`].

    Returns:
        `dict[str, list[float | None]]`: `""` to what [`score_images`] returns, and the ending of each further column
        to its numbers.

    Raises:
        ValueError, TypeError: as [`score_images`], for each column; and if `columns` returned no `""` or changed its
            names.
    """
    columns = getattr(reward, "columns", None)
    if columns is None:
        scores = score_images(reward, images, prompts, batch_size=batch_size, progress=progress, first_row=first_row)
        return {"": scores}
    return _score(columns, reward_name(reward), images, prompts, batch_size, progress, first_row)


def score_images(
    reward: RewardFunction,
    images: Sequence[Any],
    prompts: Sequence[str],
    *,
    batch_size: int = 64,
    progress: bool = False,
    first_row: int = 0,
) -> list[float | None]:
    """
    Score images batch by batch and check what comes back.

    Args:
        reward (`RewardFunction`):
            Called as `reward(images, prompts)` with lists of at most `batch_size`. A one-dimensional array or tensor
            is accepted as a result too.
        images (`Sequence[PIL.Image.Image]`):
            The images, or clips (lists of frames) for a reward that takes videos. `None` stands for one that could
            not be had; the reward does not see it.
        prompts (`Sequence[str]`):
            One prompt an image.
        batch_size (`int`, *optional*, defaults to 64):
            Largest number of images a call.
        progress (`bool`, *optional*, defaults to `False`):
            Show a progress bar over the images.
        first_row (`int`, *optional*, defaults to 0):
            Number of the first image in messages.

    Returns:
        `list[float | None]`: one score an image, in order; `None` where there is no image or the reward gave none.

    Raises:
        ValueError: if the lengths differ, if `batch_size` is below 1, if the reward returned a wrong number of scores,
            or a NaN or infinite one.
        TypeError: if the reward returned something other than a list of numbers and `None`.
    """

    def alone(batch: list[Any], texts: list[str]) -> dict[str, Any]:
        return {"": reward(batch, texts) if batch else []}

    return _score(alone, reward_name(reward), images, prompts, batch_size, progress, first_row)[""]


def _score(
    call: Callable[[list[Any], list[str]], Any],
    name: str,
    images: Sequence[Any],
    prompts: Sequence[str],
    batch_size: int,
    progress: bool,
    first_row: int,
) -> dict[str, list[float | None]]:
    if isinstance(prompts, str):
        raise TypeError("`prompts` is one string; pass a list with one prompt an image.")
    if len(images) != len(prompts):
        raise ValueError(f"There are {len(images)} images and {len(prompts)} prompts: pass one prompt an image.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    found: dict[str, list[float | None]] = {}
    with tqdm(total=len(images), desc=f"Scoring ({name})", unit="image", disable=not progress) as bar:
        for start in range(0, max(1, len(images)), batch_size):
            batch = images[start : start + batch_size]
            there = [index for index, image in enumerate(batch) if image is not None]
            texts = [prompts[start + index] for index in there]
            returned = call([batch[index] for index in there], texts)
            if not isinstance(returned, Mapping) or "" not in returned or (found and returned.keys() != found.keys()):
                raise ValueError(
                    f"`columns` of the reward {name!r} must return a dictionary with always the same keys, '' among "
                    "them."
                )
            rows = [first_row + start + index for index in there]
            for ending, values in returned.items():
                scores: list[float | None] = [None] * len(batch)
                for index, score in zip(there, _checked(values, texts, rows, name + ending), strict=True):
                    scores[index] = score
                found.setdefault(ending, []).extend(scores)
            bar.update(len(batch))
    return found


def _checked(returned: Any, prompts: list[str], rows: list[int], name: str) -> list[float | None]:
    """Return the scores of one batch as floats, or raise an error that names the reward and the first bad rows."""
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(
            f"The reward {name!r} returned {type(returned).__name__}; it must return a list with one number, or None, "
            "an image."
        )
    if len(values) != len(prompts):
        where = f" (rows {rows[0]} to {rows[-1]})" if rows else ""
        raise ValueError(
            f"The reward {name!r} returned {len(values)} scores for {len(prompts)} images{where}. It must return "
            "one an image: None for one that cannot be scored."
        )
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    wrong = [i for i, value in enumerate(values) if not (value is None or isinstance(value, numbers.Real))]
    if wrong:
        raise TypeError(
            f"The reward {name!r} returned something that is no number for {_shown(wrong, values, prompts, rows)}. "
            "It must return a float, or None, an image."
        )
    wrong = [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"The reward {name!r} returned NaN or infinity for {_shown(wrong, values, prompts, rows)}. "
            "Return None for an image that cannot be scored."
        )
    return [None if value is None else float(value) for value in values]


def _shown(wrong: list[int], values: Sequence[Any], prompts: list[str], rows: list[int]) -> str:
    shown = [f"row {rows[i]} ({values[i]!r:.40}, prompt {prompts[i]!r:.60})" for i in wrong[:_ROWS_SHOWN]]
    rest = len(wrong) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
