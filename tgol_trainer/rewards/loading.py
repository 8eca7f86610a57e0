"""Load a reward by its name in this library, or as `module:attribute` of the user's."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from typing import TYPE_CHECKING, Any

from .base import Medium, RewardFunction, check_call, reward_takes

if TYPE_CHECKING:
    import torch

REWARDS: dict[str, str] = {
    "hpsv2.1": "tgol_trainer.rewards.hpsv2:HPSv2",
    "hpsv3": "tgol_trainer.rewards.hpsv3:HPSv3",
    "pickscore": "tgol_trainer.rewards.clip:PickScore",
    "imagereward": "tgol_trainer.rewards.imagereward:ImageReward",
    "clip": "tgol_trainer.rewards.clip:ClipScore",
    "aesthetic": "tgol_trainer.rewards.aesthetic:AestheticScore",
    "videoreward": "tgol_trainer.rewards.videoreward:VideoReward",
    "regression": "tgol_trainer.rewards.regression:Regression",
    "judge": "tgol_trainer.rewards.served:Judge",
    "http": "tgol_trainer.rewards.served:ServedScorer",
    "jpeg_compressibility": "tgol_trainer.rewards.jpeg:jpeg_compressibility",
    "jpeg_incompressibility": "tgol_trainer.rewards.jpeg:jpeg_incompressibility",
    "background_darkness": "tgol_trainer.shapes:background_darkness",
    "colour_faithfulness": "tgol_trainer.shapes:colour_faithfulness",
}
"""Name to `module:attribute`, which is imported only when it is loaded."""


def load_reward(
    spec: str, *, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None, **options: Any
) -> RewardFunction:
    """
    Find a reward by name, and load its model if it has one.

    Args:
        spec (`str`):
            A name in [`REWARDS`], or `module:attribute` of your own: a function `(images, prompts) -> scores`, an
            object with such a `__call__`, or a class of such objects. Modules are found in the current directory too.
        device (`str` or `torch.device`, *optional*, defaults to `"cpu"`): Where a model computes.
        dtype (`torch.dtype` or `str`, *optional*):
            Of a model, for instance `"bfloat16"`; the default of its class otherwise, which is `torch.float32` in this
            library.
        options:
            Passed to the class: to its `from_pretrained` together with `device` and `dtype`, or, without that method,
            to the class itself.

    Returns:
        [`RewardFunction`]

    Raises:
        ValueError: if the name is unknown, if the module or the attribute cannot be found, or for an unknown dtype.
        TypeError: if the attribute cannot be called, or does not take the options given.
    """
    found = find_reward(spec)
    if not callable(found):
        raise TypeError(f"`rewards`: {spec!r} is {type(found).__name__}, not a function of images and prompts.")
    if not isinstance(found, type):
        if options:
            raise TypeError(f"`rewards`: {spec!r} is not a class, so it takes no options ({', '.join(options)}).")
        check_call(found, spec)
        return found
    make: Any = getattr(found, "from_pretrained", found)
    if make is not found:
        options = {"device": device, "dtype": _as_dtype(dtype), **options}
    taken = _arguments(make)
    unknown = sorted(options.keys() - set(taken))
    try:
        inspect.signature(make).bind(**options)
        if unknown and spec in REWARDS:  # a class of one's own may use what it takes as `**options`
            raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")
    except TypeError as error:
        raise TypeError(f"`rewards`: {spec!r}: {error}. It takes {', '.join(taken)}.") from error
    made = make(**options)
    if not callable(made):
        raise TypeError(f"`rewards`: objects of {spec!r} cannot be called with images and prompts.")
    check_call(made, spec)
    return made


class RewardLoader:
    """
    Loads a reward when it is called. What is known of it before is checked now.

    Args:
        spec (`str`): As in [`load_reward`], which raises the same errors for a name that cannot be found.
        options: Passed to [`load_reward`].

    Attributes:
        takes (`str`, *optional*):
            `"images"` or `"videos"`; `None` for a class of one's own whose objects alone may say it.
    """

    def __init__(self, spec: str, **options: Any) -> None:
        found = find_reward(spec)
        known = spec in REWARDS or hasattr(found, "takes") or not isinstance(found, type)
        self.takes: Medium | None = reward_takes(found) if known else None
        self._spec, self._options = spec, options

    def __call__(self) -> RewardFunction:
        """Load the reward."""
        return load_reward(self._spec, **self._options)


def _arguments(make: Any) -> list[str]:
    """Return the names of what a function or class takes, with what it passes to its bases."""
    names: list[str] = []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    for each in make.__mro__[:-1] if isinstance(make, type) else (make,):
        parameters = inspect.signature(each).parameters.values()
        names += [given.name for given in parameters if given.kind in kinds and given.name not in names]
        if not any(given.kind is inspect.Parameter.VAR_KEYWORD for given in parameters):
            break
    return names


def _as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if not isinstance(dtype, str):
        return dtype
    import torch

    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"`dtype` is {dtype!r}, which is not a torch dtype such as bfloat16.")
    return found


def find_reward(spec: str) -> Any:
    """
    Find a reward without loading its model, so that a wrong name is reported before any work.

    Args:
        spec (`str`): As in [`load_reward`].

    Returns:
        `Any`: the named function or class.

    Raises:
        ValueError: as [`load_reward`].
    """
    module, separator, attribute = REWARDS.get(spec, spec).partition(":")
    if not separator or not module or module.startswith("."):
        close = difflib.get_close_matches(spec, REWARDS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"`rewards`: {spec!r} is not a known reward.{hint} Known are {', '.join(REWARDS)}; name a function of "
            "your own as module:function."
        )
    # The search path of a command does not hold the current directory. It goes last, so that it hides no module.
    if spec not in REWARDS and not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise ValueError(f"`rewards`: {spec!r} cannot be imported: {error}. It is read as module:function.") from error
