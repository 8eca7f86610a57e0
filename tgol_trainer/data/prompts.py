"""Find in prompts what other programs read as instructions, and a text encoder as words; take it out on request."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal

logger = logging.getLogger(__name__)

PromptSyntax = Literal["keep", "strip"]

# A digit before the colon is no weight but a ratio or a time, as in (16:9), unless the number has a point.
_WEIGHT = r"(?:(?<=[^\d\s])\s*:\s*-?\d(?:\.\d*)?|\s*:\s*-?\d?\.\d+)\s*"
_NETWORK = re.compile(r"<(?:lora|lyco|hypernet|embedding):[^<>]+>|\bembedding:[^\s,()]+", re.IGNORECASE)
_BREAK = re.compile(r"(?:^|(?<=[\s,]))BREAK(?=[\s,]|$)")
_SETTINGS = re.compile(r"\bnegative prompt:.*|\bSteps: \d+, Sampler:.*", re.IGNORECASE | re.DOTALL)
_CHANGE = re.compile(r"\[([^\[\]:]*):(?:([^\[\]:]*):)?\s*\d*\.?\d+\s*\]")
_NUMBERED = re.compile(r"-?\d+(?:\.\d+)?::(.*?)::", re.DOTALL)
# Upper case between two prompts; not in a line of capitals, such as the words on a sign.
_AND = re.compile(r"(?<=[^\sA-Z])\s+AND\s+(?!\W*[A-Z]+\b)(?=\S)")
_WEIGHT_OF_PART = re.compile(r"(?<![\d\s])\s*:\s*-?\d*\.?\d+\s*$")
_BOTH = re.compile(r"\[([^\[\]{}|]*(?:\|[^\[\]{}|]*)+)\]")
_EITHER = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")
_CHANCE = re.compile(r"^\s*[\d-]+\$\$(?:[^$]*\$\$)?|(?:^|(?<=\|))\s*\d*\.?\d+::")
_WILDCARD = re.compile(r"(?<!\w)__[^\W\d_](?:[\w/*-]{0,80}[^\W_])?__(?!\w)")
_SYNTAX = {
    "a weight such as (word:1.3)": re.compile(rf"\([^()]+{_WEIGHT}\)"),
    "emphasis such as ((word)) or {word}": re.compile(r"\(\(|\[\[|\\[()\[\]]|\{\{|\{[\w ,'-]+\}"),
    "a weight such as 1.3::word::": _NUMBERED,
    "a change such as [a:b:0.5]": _CHANGE,
    "alternatives such as [a|b] or {a|b}": re.compile(f"{_BOTH.pattern}|{_EITHER.pattern}"),
    "a wildcard such as __colour__": _WILDCARD,
    "a network such as <lora:name:0.8>": _NETWORK,
    "BREAK": _BREAK,
    "AND between prompts": _AND,
    "a negative prompt or settings": _SETTINGS,
}
_EMPHASIS = (
    re.compile(rf"\(([^()\[\]{{}}]*?)(?:{_WEIGHT})?\)"),
    re.compile(r"\[([^()\[\]{}]*)\]"),
    re.compile(r"\{([^()\[\]{}|]*)\}"),
)
_ESCAPED = {"\\(": "\ue000", "\\)": "\ue001", "\\[": "\ue002", "\\]": "\ue003"}  # signs of no language
_DEEPEST = 20
REMEDY = (
    "Remove it if the model that the adapter is for gets plain prompts, as diffusers' pipelines do: "
    "`--prompt_syntax strip` trains on the plain text. A negative prompt trains the very words that it should keep "
    "away."
)
_SHOWN = 60


def foreign_syntax(prompt: str) -> list[str]:
    """Return what a prompt holds that other programs read as instructions, in words; nothing for a plain prompt."""
    return [name for name, pattern in _SYNTAX.items() if pattern.search(prompt)]


def strip_syntax(prompt: str) -> str:
    """
    Return the plain text of a prompt that holds instructions for other programs; any other prompt as it is.

    Weights and emphasis leave their words, a change `[a:b:0.5]` what it ends with, `[a|b]` both, and `{a|b}`, of which
    the text does not say which it was, "a or b". Networks and wildcards leave nothing, BREAK and AND a comma. A
    negative prompt or settings, and what follows them, go.

    Args:
        prompt (`str`): A prompt in the syntax of A1111, ComfyUI or NovelAI.

    Returns:
        `str`: may be empty.
    """
    if not foreign_syntax(prompt):
        return prompt
    text = _WILDCARD.sub("", _NETWORK.sub("", _SETTINGS.sub("", prompt)))
    text = ", ".join(_WEIGHT_OF_PART.sub("", part) for part in parts) if len(parts := _AND.split(text)) > 1 else text
    for written, sign in _ESCAPED.items():
        text = text.replace(written, sign)
    text = _NUMBERED.sub(r"\1", text)
    for _ in range(_DEEPEST):
        before = text
        text = _BOTH.sub(lambda found: " ".join(_alternatives(found[1])), text)
        text = _EITHER.sub(lambda found: " or ".join(_alternatives(_CHANCE.sub("", found[1]))), text)
        text = _CHANGE.sub(lambda found: (found[2] or "").strip() or found[1].strip(), text)
        for pattern in _EMPHASIS:
            text = pattern.sub(r"\1", text)
        if text == before:
            break
    text = _BREAK.sub(",", text)
    for written, sign in _ESCAPED.items():
        text = text.replace(sign, written[1])
    text = re.sub(r"\s+", " ", text)
    text = re.sub(r"\s*,(?:\s*,)+\s*|\s+,\s*", ", ", text)
    return text.strip(" ,")


def _alternatives(inside: str) -> list[str]:
    return [text.strip() for text in inside.split("|") if text.strip()]


def apply_syntax(prompt: str, syntax: PromptSyntax) -> str:
    """Return a prompt as it is (`"keep"`), or its plain text (`"strip"`)."""
    return strip_syntax(prompt) if syntax == "strip" else prompt


def warn_of_prompts(name: str, prompts: Iterable[str], syntax: PromptSyntax = "keep") -> None:
    """
    Warn of prompts that begin or end with blanks, and of instructions for other programs, or say that these are out.

    Args:
        name (`str`): The argument that the dataset was given as.
        prompts (`Iterable[str]`): Its different prompts, as they were given.
        syntax (`str`, *optional*, defaults to `"keep"`): `"strip"` where the instructions are taken out.
    """
    texts, found = list(prompts), Counter[str]()
    blank = [prompt for prompt in texts if prompt != prompt.strip()]
    if blank:
        logger.warning(
            "%s: %d of %d different prompts begin or end with blanks, such as %r. They are trained as they are, and "
            "groups and the cache keep them apart from the same words alone. Strip them unless that is meant.",
            *(name, len(blank), len(texts), blank[0][:_SHOWN]),
        )
    shown: dict[str, str] = {}
    number = 0
    for prompt in texts:
        kinds = foreign_syntax(prompt)
        number += bool(kinds)
        found.update(kinds)
        for kind in kinds:
            shown.setdefault(kind, prompt)
    if found and syntax == "strip":
        first = next(iter(shown.values()))
        logger.info(
            "%s: instructions for other programs are taken out of %d of %d different prompts, such as %r, now %r.",
            *(name, number, len(texts), first[:_SHOWN], strip_syntax(first)[:_SHOWN]),
        )
    elif found:
        examples = ", ".join(f"{kind} in {found[kind]}, {prompt[:_SHOWN]!r}" for kind, prompt in shown.items())
        logger.warning(
            "%s: %d of %d different prompts hold instructions for other programs, which the text encoder takes for "
            "words: %s. %s",
            *(name, number, len(texts), examples, REMEDY),
        )
