"""Find in prompts what other programs read as instructions, and a text encoder as words."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable

logger = logging.getLogger(__name__)

_SYNTAX = {
    "a weight such as (word:1.3)": re.compile(r"\([^()]+:\s*-?\d*\.?\d+\s*\)"),
    "a change such as [a:b:0.5]": re.compile(r"\[[^\[\]]*:[^\[\]]*:\s*\d*\.?\d+\s*\]"),
    "a network such as <lora:name:0.8>": re.compile(r"<(?:lora|lyco|hypernet|embedding):[^<>]+>", re.IGNORECASE),
    "BREAK": re.compile(r"(?:^|[\s,])BREAK(?:[\s,]|$)"),
    "a negative prompt or settings": re.compile(r"negative prompt:|\bSteps: \d+, Sampler:", re.IGNORECASE),
}
REMEDY = (
    "Remove it if the model that the adapter is for gets plain prompts, as diffusers' pipelines do. A negative prompt "
    "trains the very words that it should keep away."
)
_SHOWN = 60


def foreign_syntax(prompt: str) -> str | None:
    """Return what a prompt holds that other programs read as an instruction, in words; `None` for a plain prompt."""
    return next((name for name, pattern in _SYNTAX.items() if pattern.search(prompt)), None)


def warn_of_syntax(name: str, prompts: Iterable[str]) -> None:
    """
    Warn of prompts that hold instructions for other programs.

    Args:
        name (`str`): The argument that the dataset was given as.
        prompts (`Iterable[str]`): Its different prompts.
    """
    texts, found = list(prompts), Counter[str]()
    shown: dict[str, str] = {}
    for prompt in texts:
        kind = foreign_syntax(prompt)
        if kind is not None:
            found[kind] += 1
            shown.setdefault(kind, prompt)
    if found:
        examples = ", ".join(f"{kind} in {prompt[:_SHOWN]!r}" for kind, prompt in shown.items())
        logger.warning(
            "%s: %d of %d different prompts hold instructions for other programs, which the text encoder takes for "
            "words: %s. %s",
            *(name, found.total(), len(texts), examples, REMEDY),
        )
