"""Define what a reward is, and call rewards batch by batch with a check of what they return."""

from __future__ import annotations

import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from PIL import Image
from tqdm.auto import tqdm

_ROWS_SHOWN = 3
_PROMPT_WORDS = ("prompt", "text", "caption")
_IMAGE_WORDS = ("image", "picture", "video", "frame", "clip", "sample")

Medium = Literal["images", "videos"]


class RewardFunction(Protocol):
    """
    Any callable that turns images and their prompts into scores, higher is better.

    It is called with a batch of `n` images and `n` prompts and returns `n` finite numbers, or `None` for an image that
    it cannot score. A score must not depend on what else is in the batch.

    A reward that scores videos has an attribute `takes = "videos"`; it gets a list of [`Clip`]s (lists of frames)
    instead of the images. A reward that computes several numbers in one pass may have a method `columns`. It is called
    like the reward (with empty lists too) and returns a dictionary of such lists: `""` for the score itself, and an
    ending for each further column (`"_vq"`). A reward that costs something may have a method `starting`, which is
    called with the number of images before the first.
    """

    def __call__(self, images: list[Any], prompts: list[str], /) -> list[float | None]:
        """Return one score per image (or clip), `None` for one that cannot be scored."""
        ...


class Clip(list[Image.Image]):
    """
    The frames of a video: upright, RGB and of one size.

    Args:
        frames (`Iterable[PIL.Image.Image]`): In order.
        fps (`float`, *optional*): Frames per second; `None` where that is not known.
    """

    def __init__(self, frames: Iterable[Image.Image] = (), fps: float | None = None) -> None:
        super().__init__(frames)
        self.fps = fps


@dataclass(frozen=True)
class RewardFacts:
    """
    What the scores of a reward are, for tables and model cards.

    Args:
        name (`str`): Name in tables.
        model_id (`str`, *optional*): Hub repository or path of the reward model.
        revision (`str`, *optional*): Its commit, where it is known.
        scale (`str`, *optional*, defaults to `""`): Unit and direction, in words.
    """

    name: str
    model_id: str | None = None
    revision: str | None = None
    scale: str = ""


def reward_facts(reward: Callable[..., Any]) -> RewardFacts:
    """
    Return what is known about a reward.

    Args:
        reward (`Callable`): A function, a `functools.partial` of one, or an instance with `__call__`.

    Returns:
        [`RewardFacts`]: its attribute `facts` where that is a [`RewardFacts`]. Otherwise only the name: `__name__` of
        the function (for a partial, of the wrapped one), or the class name.
    """
    facts = _attribute(reward, "facts", None)
    if isinstance(facts, RewardFacts):
        return facts
    reward = getattr(reward, "func", reward)
    return RewardFacts(getattr(reward, "__name__", type(reward).__name__))


def reward_name(reward: Callable[..., Any]) -> str:
    """Return the name of a reward in tables and messages: that in its [`reward_facts`]."""
    return reward_facts(reward).name


def reward_takes(reward: Callable[..., Any]) -> Medium:
    """
    Return what a reward scores.

    Args:
        reward (`Callable`): A function, a `functools.partial` of one, or an instance with `__call__`.

    Returns:
        `str`: `"videos"` where its attribute `takes` says so, else `"images"`.

    Raises:
        ValueError: for another value of `takes`.
    """
    takes = _attribute(reward, "takes", "images")
    if takes not in get_args(Medium):
        raise ValueError(
            f"The reward {reward_name(reward)!r} has `takes = {takes!r}`; it must be 'images' or 'videos'."
        )
    return takes


def _attribute(reward: Callable[..., Any], name: str, default: Any) -> Any:
    """Return an attribute of a reward or of the function that a partial wraps."""
    return getattr(reward, name, getattr(getattr(reward, "func", reward), name, default))


def check_call(reward: Callable[..., Any], name: str) -> None:
    """Raise a `TypeError` for a reward that cannot be called with images and prompts, or names them the other way."""
    try:
        signature = inspect.signature(reward)
    except (TypeError, ValueError):  # of compiled code
        return
    takes = reward_takes(reward)
    try:
        bound = signature.bind([], [])
    except TypeError as error:
        raise TypeError(
            f"The reward {name!r} is called as reward({takes}, prompts), with two lists, and takes {signature}: "
            f"{error}."
        ) from error
    names = [given.lower() for given, value in bound.arguments.items() if isinstance(value, list)]
    first, second = [*names, "", ""][:2]
    if any(word in first for word in _PROMPT_WORDS) and any(word in second for word in _IMAGE_WORDS):
        raise TypeError(
            f"The reward {name!r} takes {signature}, prompts first. It is called as reward({takes}, prompts): swap "
            f"its arguments, or give `lambda {takes}, prompts: "
            f"{getattr(reward, '__name__', 'reward')}(prompts, {takes})`."
        )


def check_prompts(images: Sequence[Any], prompts: Sequence[str], takes: Medium = "images") -> None:
    """Raise an error unless `prompts` is a list with one prompt per image, or per video for what takes videos."""
    one = takes.removesuffix("s")
    if isinstance(prompts, str):
        raise TypeError(f"`prompts` is one string; pass a list with one prompt per {one}.")
    if len(images) != len(prompts):
        raise ValueError(f"There are {len(images)} {takes} and {len(prompts)} prompts: pass one prompt per {one}.")


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
    Score images or clips, and return all numbers that the reward computes.

    Args:
        reward (`RewardFunction`): As in [`score_images`], with or without a method `columns`.
        images, prompts, batch_size, progress, first_row:
            As in [`score_images`].

    Returns:
        `dict[str, list[float | None]]`: `""` to what [`score_images`] returns, and the ending of each further column
        to its numbers.

    Raises:
        ValueError, TypeError: as [`score_images`], for each column; and if `columns` returned no `""` or changed its
            names.
    """
    call = getattr(reward, "columns", None) or _as_columns(reward)
    if images:
        check_call(reward, reward_name(reward))
    return _score(reward, call, images, prompts, batch_size, progress, first_row)


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
    Score images batch by batch and check what the reward returns.

    Args:
        reward (`RewardFunction`):
            Called as `reward(images, prompts)` with lists of at most `batch_size`. It may also return a
            one-dimensional array or tensor.
        images (`Sequence[PIL.Image.Image]`):
            The images, or clips (lists of frames) for a reward that takes videos. The reward is not shown an image
            that is `None`, one that could not be read.
        prompts (`Sequence[str]`): One prompt per image.
        batch_size (`int`, *optional*, defaults to 64): Largest number of images per call.
        progress (`bool`, *optional*, defaults to `False`): Show a progress bar over the images.
        first_row (`int`, *optional*, defaults to 0): Number of the first image in messages.

    Returns:
        `list[float | None]`: one score per image, in order; `None` where there is no image or the reward gave none.

    Raises:
        ValueError: if the lengths differ, if `batch_size` is below 1, if the reward returned a wrong number of scores,
            or a NaN or infinite one.
        TypeError: if the reward returned something other than a list of numbers and `None`.
    """
    if images:
        check_call(reward, reward_name(reward))
    return _score(reward, _as_columns(reward), images, prompts, batch_size, progress, first_row)[""]


def _as_columns(reward: RewardFunction) -> Callable[[list[Any], list[str]], dict[str, Any]]:
    return lambda images, prompts: {"": reward(images, prompts) if images else []}


def _score(
    reward: RewardFunction,
    call: Callable[[list[Any], list[str]], Any],
    images: Sequence[Any],
    prompts: Sequence[str],
    batch_size: int,
    progress: bool,
    first_row: int,
) -> dict[str, list[float | None]]:
    name, takes = reward_name(reward), reward_takes(reward)
    check_prompts(images, prompts, takes)
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    found: dict[str, list[float | None]] = {}
    with tqdm(total=len(images), desc=f"Scoring ({name})", unit=takes.removesuffix("s"), disable=not progress) as bar:
        for start in range(0, max(1, len(images)), batch_size):
            batch = images[start : start + batch_size]
            present = [index for index, image in enumerate(batch) if image is not None]
            texts = [prompts[start + index] for index in present]
            returned = _called(call, name, takes, [batch[index] for index in present], texts)
            if not isinstance(returned, Mapping) or "" not in returned or (found and returned.keys() != found.keys()):
                raise ValueError(
                    f"`columns` of the reward {name!r} must return a dictionary with the same keys each time, and '' "
                    "must be one of them."
                )
            rows = [first_row + start + index for index in present]
            for ending, values in returned.items():
                scores: list[float | None] = [None] * len(batch)
                found_here = _checked(values, texts, rows, name + ending, takes)
                for index, score in zip(present, found_here, strict=True):
                    scores[index] = score
                found.setdefault(ending, []).extend(scores)
            bar.update(len(batch))
    return found


def _called(
    call: Callable[[list[Any], list[str]], Any], name: str, takes: Medium, images: list[Any], prompts: list[str]
) -> Mapping[str, Any]:
    """Call a reward; where it takes prompts first under names that do not say so, raise an error that does."""
    try:
        returned: Mapping[str, Any] = call(images, prompts)
        return returned
    except (AttributeError, TypeError) as error:
        try:
            call(prompts, images)  # type: ignore[arg-type]
        except Exception:  # then it fails for another reason, which its own error says
            raise error from None
        raise TypeError(
            f"The reward {name!r} takes prompts first: called with {takes} and prompts it fails, "
            f"{type(error).__name__}: {error}, and the other way round it does not. Swap its arguments."
        ) from error


def _checked(returned: Any, prompts: list[str], rows: list[int], name: str, takes: Medium) -> list[float | None]:
    """Return the scores of one batch as floats, or raise an error that names the reward and the first bad rows."""
    shape, one = tuple(getattr(returned, "shape", ())), takes.removesuffix("s")
    if len(shape) > 1:
        raise TypeError(
            f"The reward {name!r} returned {type(returned).__name__} of shape {shape} for {len(prompts)} {takes}; it "
            f"must return a list with one number, or None, per {one}. `.flatten()` makes one of shape (n, 1), "
            f"`.diagonal()` of a table of all {takes} by all prompts."
        )
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise TypeError(
            f"The reward {name!r} returned {type(returned).__name__}; it must return a list with one number, or None, "
            f"per {one}.{_hint(values, takes)}"
        )
    if len(values) != len(prompts):
        where = f" (rows {rows[0]} to {rows[-1]})" if rows else ""
        raise ValueError(
            f"The reward {name!r} returned {len(values)} scores for {len(prompts)} {takes}{where}. It must return "
            f"one per {one}: None for one that cannot be scored."
        )
    values = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    wrong = [i for i, value in enumerate(values) if not (value is None or isinstance(value, numbers.Real))]
    if wrong:
        raise TypeError(
            f"The reward {name!r} returned something that is not a number for {_shown(wrong, values, prompts, rows)}. "
            f"It must return a float, or None, per {one}."
        )
    wrong = [i for i, value in enumerate(values) if value is not None and not math.isfinite(value)]
    if wrong:
        raise ValueError(
            f"The reward {name!r} returned NaN or infinity for {_shown(wrong, values, prompts, rows)}. "
            "Return None for one that cannot be scored."
        )
    return [None if value is None else float(value) for value in values]


def _hint(returned: Any, takes: Medium) -> str:
    if isinstance(returned, Mapping):
        keys = ", ".join(repr(key) for key in list(returned)[:_ROWS_SHOWN])
        return f" Return the list under one of its keys ({keys}), or see `columns` of RewardFunction for several."
    if isinstance(returned, Iterator):
        return " Make a list of it: `list(...)`."
    if returned is None:
        return " Does the function lack its `return`?"
    if isinstance(returned, numbers.Real):
        return f" It is called with a list of {takes}, not with one."
    if inspect.isawaitable(returned):
        return " An `async` function is not awaited: run it with `asyncio.run` inside the reward."
    return ""


def _shown(wrong: list[int], values: Sequence[Any], prompts: list[str], rows: list[int]) -> str:
    shown = [f"row {rows[i]} ({values[i]!r:.40}, prompt {prompts[i]!r:.60})" for i in wrong[:_ROWS_SHOWN]]
    rest = len(wrong) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
