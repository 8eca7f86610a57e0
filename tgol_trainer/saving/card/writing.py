"""Write a card, and bring an existing one up to date without losing what a person wrote in it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tgol_trainer._files import write_file, write_json

from .facts import CardFacts
from .rendering import SECTIONS, card_metadata, checked, render_sections, storable

logger = logging.getLogger(__name__)

FACTS_NAME = "card_facts.json"
"""The facts of a card, beside it, without secrets and local paths. [`update_card`] starts from them."""

_FRONT_MATTER = re.compile(r"(?s)\s*---[ \t]*\n(?:|(.*?)\n)---[ \t]*(?:\n|\Z)")
_STATE = re.compile(r"(?m)^<!-- tgol:(metadata|sections)((?: \S+)*) --> *(?:\n|\Z)")
_SECTION = re.compile(r"(?ms)^<!-- tgol:begin (\w+) ([0-9a-f]{8}) --> *\n(.*?)^<!-- tgol:end \1 --> *(?:\n|\Z)")


def _digest(content: str) -> str:
    lines = "\n".join(line.rstrip() for line in content.split("\n")).strip("\n")
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _dump(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=math.inf).rstrip("\n")


def _merge_metadata(block: str, new: Mapping[str, Any], digests: dict[str, str]) -> str:
    """Bring the generated keys of a YAML block, and `digests`, up to date. A person's lines stay as they are."""
    try:
        old = yaml.safe_load(block) or {}
        if not isinstance(old, dict):
            raise yaml.YAMLError("it is not a mapping")
    except yaml.YAMLError as error:
        logger.warning("The metadata of README.md cannot be read and are left as they are: %s", error)
        return block
    merged = {}
    for key in dict.fromkeys([*old, *new]):
        if key in old and digests.get(key) != _digest(repr(old[key])):
            merged[key] = old[key]  # a person added or changed it
        elif key in new and (key in old or key not in digests):
            merged[key] = old[key] if key in old and old[key] == new[key] else new[key]
            digests[key] = _digest(repr(merged[key]))
        elif key in old:
            del digests[key]  # it was generated once and is not among the facts any more
    keys, lines = getattr(yaml.compose(block), "value", []), block.split("\n")
    edges = [0, *(key.start_mark.line for key, _ in keys[1:]), len(lines)]
    written = {key.value: "\n".join(lines[a:b]) for (key, _), a, b in zip(keys, edges, edges[1:], strict=False)}
    kept = {key: written.get(key) for key in merged if key in old and merged[key] == old[key]}
    notes = {key: [line for line in text.split("\n") if line.startswith("#")] for key, text in written.items()}
    text = "\n".join(kept.get(key) or "\n".join([*notes.get(key, []), _dump({key: merged[key]})]) for key in merged)
    try:
        return text if yaml.safe_load(text) == merged else _dump(merged)
    except yaml.YAMLError:  # flow style, or an alias whose anchor was replaced
        return _dump(merged)


def _merge_sections(body: str, new: Mapping[str, str], seen: set[str], names: Sequence[str]) -> str:
    """Bring the generated sections of a text, and `seen`, the names generated so far, up to date."""
    marked = {
        name: f"<!-- tgol:begin {name} {_digest(text)} -->\n\n{text}\n\n<!-- tgol:end {name} -->"
        for name, text in new.items()
    }
    pieces, end = [], 0
    for match in _SECTION.finditer(body):
        name, digest, content = match.groups()
        pieces.append(("", body[end : match.start()]))
        end = match.end()
        if digest != _digest(content):
            pieces.append((name, match[0]))  # a person changed it
        elif name in marked:
            pieces.append((name, marked[name]))
        else:
            seen.discard(name)
    pieces.append(("", body[end:]))
    for order, name in enumerate(names):
        there = [piece[0] for piece in pieces]
        if name in marked and name not in seen and name not in there:
            after = [at + 1 for at, other in enumerate(there) if other in names[:order]]
            before = [at for at, other in enumerate(there) if other in names[order:]]
            pieces.insert(after[-1] if after else [*before, len(pieces)][0], (name, marked[name]))
    seen.update(name for name, _ in pieces if name)
    return "\n\n".join(text.strip("\n") for _, text in pieces if text.strip())


def updated_text(text: str, metadata: Mapping[str, Any], sections: Mapping[str, str], names: Sequence[str]) -> str:
    """Return a card's text with new metadata and sections; `names` lists every possible section in order."""
    newline = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
    text = text.replace("\r\n", "\n")
    front = _FRONT_MATTER.match(text)
    body = text[front.end() :] if front else text
    state: dict[str, list[str]] = {"metadata": [], "sections": []}
    for kind, words in _STATE.findall(body):
        state[kind] += words.split()
    digests, seen = dict(word.rpartition("=")[::2] for word in state["metadata"]), set(state["sections"])
    block = _merge_metadata((front[1] or "") if front else "", metadata, digests)
    body = _merge_sections(_STATE.sub("", body), sections, seen, names)
    marks = [["metadata", *(f"{key}={digest}" for key, digest in digests.items())], ["sections", *sorted(seen)]]
    comments = "\n".join(f"<!-- tgol:{' '.join(words)} -->" for words in marks)
    return f"---\n{block}\n---\n{comments}\n\n{body}\n".replace("\n", newline)


def update_file(path: Path, metadata: Mapping[str, Any], sections: Mapping[str, str], names: Sequence[str]) -> None:
    """Write a card, or update the one that exists, in one step. Bytes of it that are not UTF-8 stay."""
    old = path.read_bytes().decode("utf-8-sig", "surrogateescape") if path.exists() else ""
    write_file(path, updated_text(old, metadata, sections, names).encode("utf-8", "surrogateescape"))


def render_card(facts: CardFacts) -> str:
    """
    Render a new model card.

    Args:
        facts ([`CardFacts`]): What the card states.

    Returns:
        `str`: metadata and Markdown, the text of a README.md.

    Raises:
        ValueError: if a fact looks like an access token, or an image's path is not inside the card's folder.
        FileNotFoundError: if the template is missing from the installation.
    """
    data = checked(facts)
    return updated_text("", card_metadata(data), render_sections(data), SECTIONS)


def write_card(facts: CardFacts, directory: str | os.PathLike[str]) -> Path:
    """
    Write README.md, or update an existing one. What a person wrote, changed or deleted in it stays so.

    The facts themselves go into `card_facts.json` beside it, for [`update_card`].

    Args:
        facts ([`CardFacts`]): What the card states.
        directory (`str` or `os.PathLike`):
            Folder of the card. It is made if it is missing. Each file is replaced in one step.

    Returns:
        `Path`: the path of README.md.

    Raises:
        ValueError: if a fact looks like an access token, or an image's path is not inside the card's folder.
        FileNotFoundError: if the template is missing from the installation.
    """
    path, data = Path(directory) / "README.md", checked(facts)
    update_file(path, card_metadata(data), render_sections(data), SECTIONS)
    write_json(path.with_name(FACTS_NAME), storable(data))
    return path


def read_facts(directory: str | os.PathLike[str]) -> CardFacts:
    """
    Read the facts of a card that [`write_card`] wrote.

    Args:
        directory (`str` or `os.PathLike`): Folder of the card.

    Returns:
        [`CardFacts`]

    Raises:
        FileNotFoundError: if the folder has no `card_facts.json`.
        ValueError: if that file does not hold the facts of a card.
    """
    path = Path(directory) / FACTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {FACTS_NAME}, so the facts of its card are not known. TGOLTrainer saves one with "
            "each adapter. For any other folder, write a card with `write_card(CardFacts(...), directory)`."
        )
    try:
        return CardFacts.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error} Write the card again with `write_card`.") from error


def update_card(directory: str | os.PathLike[str], **changes: Any) -> Path:
    """
    Replace some facts of an existing card. Everything else it states, and a person's edits, stay.

    Args:
        directory (`str` or `os.PathLike`): Folder of a card that [`write_card`] wrote.
        changes (`Any`):
            Fields of [`CardFacts`] with their new values, such as `evaluations`, `evaluation_note`, `pictures`. To
            add to a list, extend the one that [`read_facts`] returns.

    Returns:
        `Path`: the path of README.md.

    Raises:
        TypeError: if a name is not a field of [`CardFacts`].
        FileNotFoundError: as [`read_facts`].
        ValueError: as [`read_facts`] and [`write_card`].
    """
    return write_card(dataclasses.replace(read_facts(directory), **changes), directory)
