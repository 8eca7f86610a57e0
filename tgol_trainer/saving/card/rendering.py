"""Facts to Markdown sections and metadata, with every value escaped for the place it stands in."""

from __future__ import annotations

import functools
import json
import os
import re
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .facts import CardFacts

SECTIONS: tuple[str, ...] = ("title", "pictures", "usage", "exports", "threshold", "evaluation", "hyperparameters")
SECTIONS += ("training", "limits", "citation")
TEMPLATE_NAME = "model_card_template.md"

_TOKEN = re.compile(r"(?:hf_(?:oauth_)?|api_org_)[A-Za-z0-9]{17,}")
_LOCAL_PATH = re.compile(r"[/~]|\.{1,2}([/\\]|$)|[A-Za-z]:[\\/]|\\\\|file:|(?!\w+://)[^\s/]+/[^\s/]+/", re.IGNORECASE)
# Control characters, lone surrogates, non-characters, and the marks that reverse the reading direction.
_UNREADABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# Entities, not backslashes: an entity never counts as Markdown structure, in no parser.
_ENTITIES = {ord(char): f"&#{ord(char)};" for char in "\\`*[]|~$"} | {38: "&amp;", 60: "&lt;", 62: "&gt;"}
_EDGE_UNDERSCORE = re.compile(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
# What would open a heading, a list, a rule or a table at the start of a line; the last character is the one to hide.
_LINE_START = re.compile(r"[#=:]|[+-](?!\d)|\d{1,9}[.)](?=\s|$)")


def checked(facts: CardFacts) -> dict[str, Any]:
    """Return the facts as plain data with a title and Hub ids; refuse a token or an image outside the folder."""
    data = facts.to_dict()
    for name, value in data.items():
        if _TOKEN.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError(f"`CardFacts.{name}` holds what looks like an access token; a card is public. Remove it.")
        if isinstance(value, dict):
            data[name] = {key: item for key, item in value.items() if item is not None}
    for path in (image["path"] for image in data["pictures"]):
        if not path or re.search(r"^[/~]|[\\:]", path) or ".." in path.split("/"):
            raise ValueError(
                f"`CardImage.path` must be relative, inside the card's folder, with `/`, but is {path!r}."
            )
    datasets = [item for item in data["datasets"] if any(item.values())]
    data["datasets"] = [item | {"hub_id": _hub_id(item["name"], owner=True)} for item in datasets]
    return data | {"title": _title(data), "base_id": _hub_id(data["base_model"])}


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_show(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value)
    return "(a local path)" if isinstance(value, str) and _LOCAL_PATH.match(value) else str(value)


def storable(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked facts without local paths, in the form from which `CardFacts` can be rebuilt."""
    kept = {name: value for name, value in data.items() if name not in ("title", "base_id")}
    hidden = ("hyperparameters", "adapter", "threshold", "weights", "training", "versions")
    kept |= {name: _without_paths(kept[name]) for name in hidden}
    kept |= {"model_name": data["title"], "base_model": data["base_id"]}
    kept["hub_model_id"] = _hub_id(data["hub_model_id"])
    kept["datasets"] = [
        {key: _without_paths(value) for key, value in item.items() if key != "hub_id"} for item in data["datasets"]
    ]
    return kept


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return _show(value) if isinstance(value, str) else value


def _one_line(value: Any) -> str:
    return " ".join(_UNREADABLE.sub("\ufffd", str(value)).split())


class _Safe(str):
    """Text that a filter has made safe for the place it goes to."""


def _escape(value: Any) -> str:
    return _EDGE_UNDERSCORE.sub("&#95;", _one_line(value).translate(_ENTITIES))


def _text(value: Any) -> _Safe:
    escaped = _escape(value)
    opener = _LINE_START.match(escaped)
    if opener:
        escaped = f"{escaped[: opener.end() - 1]}&#{ord(opener[0][-1])};{escaped[opener.end() :]}"
    return _Safe(escaped)


def _cell(value: Any) -> _Safe:
    return _Safe("–" if value is None else _escape(_show(value)) or "(empty)")


def _number(value: Any, form: str | None = None) -> _Safe:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _cell(value)
    return _Safe((form or ("{:,}" if isinstance(value, int) else "{:.5g}")).format(value))


def _backticks(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def _code(value: Any) -> _Safe:
    line = "" if value is None else _one_line(_show(value))
    if not line:
        return _cell(value)
    if "|" in line:  # a pipe in a code span still ends a table cell
        return _Safe(f"<code>{_escape(line)}</code>")
    fence, pad = _backticks(line, 1), " " if "`" in (line[0], line[-1]) else ""
    return _Safe(f"{fence}{pad}{line}{pad}{fence}")


def _fenced(value: Any, language: str) -> _Safe:
    source = re.sub(r"\r\n?", "\n", _UNREADABLE.sub("\ufffd", str(value))).rstrip().strip("\n")
    # A line of a string literal that reads like one of our markers loses that look; the source still runs.
    source = re.sub(r"(?m)^(\s*)<!--(\s*tgol:)", r"\1<! --\2", source)
    fence = _backticks(source, 3)
    return _Safe(f"{fence}{language}\n{source}\n{fence}")


def _template_text() -> str:
    folders = Path(__file__).resolve().parents[2:4]  # an installed copy, then the root of a checkout
    for folder in folders:
        if (folder / TEMPLATE_NAME).is_file():
            return (folder / TEMPLATE_NAME).read_text(encoding="utf-8")
    raise FileNotFoundError(f"{TEMPLATE_NAME} is neither in {folders[0]} nor in {folders[1]}: reinstall tgol_trainer.")


@functools.lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    # Markdown, not HTML: `finalize` escapes what no filter did.
    engine = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    engine.finalize = lambda value: value if isinstance(value, _Safe) else _text(value)
    engine.filters.update(cell=_cell, code=_code, alt=_text, fenced=_fenced, num=_number)
    engine.filters["href"] = lambda value: _Safe(urllib.parse.quote(_one_line(value), safe="/"))
    return engine.from_string(_template_text())


def _hub_id(name: Any, *, owner: bool = False) -> str | None:
    """Return the name if it is a Hub id: of that form, and no folder here, which `from_pretrained` would prefer."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if not name or (owner and "/" not in name) or os.path.exists(name) else name


def _title(data: Mapping[str, Any]) -> str:
    for name in (data["model_name"], data["hub_model_id"]):
        last = re.split(r"[\\/](?=\S)", _one_line(name or "").rstrip("\\/"))[-1]
        if last.strip(".~"):
            return last
    return "TGO fine-tuned model" if data["full_finetuning"] or data["merged"] else "TGO adapter"


def _model_index(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = []
    for row in data["evaluations"]:
        args = {key: row[key] for key in ("trained", "interval", "mean_before", "num_prompts", "num_images")}
        dumped = json.dumps({key: value for key, value in args.items() if value is not None})
        name = f"{_one_line(row['name'])} ({'' if row['trained'] else 'not '}used in training)"
        for kind, key in (("win_rate", "win_rate"), ("mean_score", "mean_after")):
            if isinstance(row[key], (int, float)):
                label = f"{name}: {'win rate against the base model' if key == 'win_rate' else 'mean'}"
                metrics.append({"type": kind, "value": row[key], "name": label, "args": json.loads(dumped)})
    task = {"type": _one_line(data["pipeline_tag"] or "text-to-image")}
    results = {"task": task, "dataset": {"type": "prompts", "name": "Evaluation prompts"}, "metrics": metrics}
    return [{"name": data["title"], "results": [results]}] if metrics else []


def card_metadata(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of checked facts, in the order in which it is written."""
    adapter = not (data["full_finetuning"] or data["merged"])
    other = data["license"] == "other"  # only then does the Hub read name and link
    tags = ["lora" if adapter else None, "tgol", "trl", data["pipeline_tag"]]
    metadata = {
        "base_model": data["base_id"],
        "base_model_relation": data["base_id"] and ("adapter" if adapter else "finetune"),
        "library_name": "diffusers",
        "pipeline_tag": _one_line(data["pipeline_tag"] or ""),
        "license": _one_line(data["license"] or ""),
        "license_name": _one_line((other and data["license_name"]) or ""),
        "license_link": _one_line((other and data["license_link"]) or ""),
        "tags": [_one_line(tag) for tag in tags if tag],
        "datasets": list(dict.fromkeys(item["hub_id"] for item in data["datasets"] if item["hub_id"])),
        "widget": [
            {"text": _one_line(image["prompt"] or image["alt"]) or "-", "output": {"url": image["path"]}}
            for image in data["pictures"]
        ],
        "model-index": _model_index(data),
    }
    return {key: value for key, value in metadata.items() if value}


def render_sections(data: dict[str, Any]) -> dict[str, str]:
    """Return the Markdown of each section of checked facts that is not empty."""
    template = _template()
    blocks = {name: "".join(template.blocks[name](template.new_context(data))) for name in SECTIONS}
    return {name: text.strip() for name, text in blocks.items() if text.strip()}
