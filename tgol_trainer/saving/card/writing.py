"""A card as a file: generated sections and metadata brought up to date, a person's edits kept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from .facts import CardFacts
from .rendering import SECTIONS, card_metadata, checked, render_sections, storable

logger = logging.getLogger(__name__)

FACTS_NAME = "card_facts.json"
"""The facts of a card, beside it, without secrets and local paths: what [`update_card`] starts from."""

_FRONT_MATTER = re.compile(r"(?s)\s*---[ \t]*\n(?:|(.*?)\n)---[ \t]*(?:\n|\Z)")
_STATE = re.compile(r"(?m)^<!-- tgol:(metadata|sections)((?: \S+)*) --> *(?:\n|\Z)")
_SECTION = re.compile(r"(?ms)^<!-- tgol:begin (\w+) ([0-9a-f]{8}) --> *\n(.*?)^<!-- tgol:end \1 --> *(?:\n|\Z)")


def _digest(content: str) -> str:
    lines = "\n".join(line.rstrip() for line in content.split("\n")).strip("\n")
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _dump(metadata: Mapping[str, Any]) -> str:
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True, width=math.inf).rstrip("\n")


def _merge_metadata(block: str, new: Mapping[str, Any], digests: dict[str, str]) -> str:
    """Bring the generated keys of a YAML block, and `digests`, up to date; a person's lines stay as written."""
    try:
        old = yaml.safe_load(block) or {}
        if not isinstance(old, dict):
            raise yaml.YAMLError("it is no mapping")
    except yaml.YAMLError as error:
        logger.warning("The metadata of README.md cannot be read and is left as it is: %s", error)
        return block
    merged = {}
    for key in dict.fromkeys([*old, *new]):
        if key in old and digests.get(key) != _digest(repr(old[key])):
            merged[key] = old[key]  # added or changed by a person
        elif key in new and (key in old or key not in digests):
            merged[key], digests[key] = new[key], _digest(repr(new[key]))
        elif key in old:
            del digests[key]  # generated once, no fact any more
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
            pieces.append((name, match[0]))  # changed by a person
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


def brought_up_to_date(
    text: str, metadata: Mapping[str, Any], sections: Mapping[str, str], names: Sequence[str]
) -> str:
    """
    Return the text of a card with new metadata and sections, and a person's edits kept.

    Args:
        text (`str`):
            The card as it is; may be empty.
        metadata (`Mapping[str, Any]`):
            Generated keys of the YAML block.
        sections (`Mapping[str, str]`):
            Name to Markdown.
        names (`Sequence[str]`):
            Every section that may be, in order.
    """
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


def _updated(text: str, facts: CardFacts) -> str:
    data = checked(facts)
    return brought_up_to_date(text, card_metadata(data), render_sections(data), SECTIONS)


def render_card(facts: CardFacts) -> str:
    """
    Render a new model card.

    Args:
        facts ([`CardFacts`]):
            What the card states.

    Returns:
        `str`: Metadata and Markdown, the text of a README.md.

    Raises:
        ValueError: If a fact looks like an access token, or an image's path is not inside the card's folder.
        FileNotFoundError: If the template is missing from the installation.
    """
    return _updated("", facts)


def write_card(facts: CardFacts, directory: str | os.PathLike[str]) -> Path:
    """
    Write README.md, or bring an existing one up to date. What a person wrote, changed or deleted in it stays so.

    The facts themselves go into `card_facts.json` beside it, for [`update_card`].

    Args:
        facts ([`CardFacts`]):
            What the card states.
        directory (`str` or `os.PathLike`):
            Folder of the card; made where missing. Each file is replaced in one step.

    Returns:
        `Path`: The path of README.md.

    Raises:
        ValueError: If a fact looks like an access token, or an image's path is not inside the card's folder.
        FileNotFoundError: If the template is missing from the installation.
    """
    path = Path(directory) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = json.dumps(storable(checked(facts)), indent=2)
    rewrite(path, lambda old: _updated(old, facts))
    _replace(path.with_name(FACTS_NAME), f"{stored}\n".encode())
    return path


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Replace a text file, or what would be its empty text, in one step; bytes that are no UTF-8 stay."""
    old = path.read_bytes().decode("utf-8-sig", "surrogateescape") if path.exists() else ""
    _replace(path, change(old).encode("utf-8", "surrogateescape"))


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_facts(directory: str | os.PathLike[str]) -> CardFacts:
    """
    Read the facts of a card that [`write_card`] wrote.

    Args:
        directory (`str` or `os.PathLike`):
            Folder of the card.

    Returns:
        [`CardFacts`]

    Raises:
        FileNotFoundError: Without `card_facts.json` in the folder.
        ValueError: If that file holds something else.
    """
    path = Path(directory) / FACTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{directory} holds no {FACTS_NAME}, so what its card states is not known. A folder that TGOLTrainer "
            "saved has one; for any other, write a card with `write_card(CardFacts(...), directory)`."
        )
    try:
        return CardFacts.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {error} Write the card anew with `write_card`.") from error


def update_card(directory: str | os.PathLike[str], **changes: Any) -> Path:
    """
    Replace some facts of an existing card; everything else it states, and a person's edits, stay.

    Args:
        directory (`str` or `os.PathLike`):
            Folder of a card that [`write_card`] wrote.
        changes (`Any`):
            Fields of [`CardFacts`] with their new values, such as `evaluations`, `evaluation_note`, `pictures`. To
            add to a list, extend that of [`read_facts`].

    Returns:
        `Path`: The path of README.md.

    Raises:
        TypeError: For a name that is no field of [`CardFacts`].
        FileNotFoundError: As [`read_facts`].
        ValueError: As [`read_facts`] and [`write_card`].
    """
    return write_card(dataclasses.replace(read_facts(directory), **changes), directory)
