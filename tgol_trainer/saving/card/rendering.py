"""Render facts as the Markdown sections and the metadata of a card. Every value is escaped for its place."""

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
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index

from tgol_trainer._hub_ids import is_hub_id
from tgol_trainer._secrets import TOKEN

from .facts import CardFacts

SECTIONS: tuple[str, ...] = ("title", "pictures", "usage", "files", "exports", "threshold", "evaluation")
SECTIONS += ("hyperparameters", "training", "limits", "citation")
TEMPLATE_NAME = "model_card_template.md"

_LOCAL_PATH = re.compile(r"[/~]|\.{1,2}([/\\]|$)|[A-Za-z]:[\\/]|\\\\|file:|(?!\w+://)[^\s/]+/[^\s/]+/", re.IGNORECASE)
# Control characters, lone surrogates, non-characters, and the marks that reverse the reading direction.
_UNREADABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# Entities instead of backslashes: no Markdown parser takes an entity for structure.
_ENTITIES = {ord(char): f"&#{ord(char)};" for char in "\\`*[]|~$"} | {38: "&amp;", 60: "&lt;", 62: "&gt;"}
_EDGE_UNDERSCORE = re.compile(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
# What opens a heading, a list, a rule or a table at the start of a line. The last character is the one to escape.
_LINE_START = re.compile(r"[#=:]|[+-](?!\d)|\d{1,9}[.)](?=\s|$)")


def checked(facts: CardFacts) -> dict[str, Any]:
    """Return the facts as plain data with a title and Hub ids. Refuse a token, and an image outside the folder."""
    data = facts.to_dict()
    refuse_tokens("CardFacts", data)
    for name, value in data.items():
        if isinstance(value, dict):
            data[name] = {key: item for key, item in value.items() if item is not None}
    for path in (image["path"] for image in data["pictures"]):
        if not path or re.search(r"^[/~]|[\\:]", path) or ".." in path.split("/"):
            raise ValueError(
                f"`CardImage.path` must be relative, inside the card's folder, with `/`, but is {path!r}."
            )
    datasets = [item for item in data["datasets"] if any(item.values())]
    data["datasets"] = [item | {"hub_id": hub_id(item["name"], owner=True)} for item in datasets]
    return data | {"title": _title(data), "base_id": hub_id(data["base_model"])}


def refuse_tokens(kind: str, data: Mapping[str, Any]) -> None:
    """Raise a `ValueError` that names the field of the facts in which an access token stands."""
    for name, value in data.items():
        if TOKEN.search(json.dumps(value, ensure_ascii=False, default=str)):
            raise ValueError(f"`{kind}.{name}` holds what looks like an access token; a card is public. Remove it.")


def storable(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked facts without local paths, in the form from which `CardFacts` can be rebuilt."""
    kept = {name: value for name, value in data.items() if name not in ("title", "base_id")}
    for name in ("hyperparameters", "adapter", "threshold", "weights", "training", "versions"):
        kept[name] = _without_paths(kept[name])
    kept["datasets"] = [
        {key: _without_paths(value) for key, value in item.items() if key != "hub_id"} for item in data["datasets"]
    ]
    ids = {"base_model": data["base_id"], "hub_model_id": hub_id(data["hub_model_id"])}
    return kept | {"model_name": data["title"]} | ids


def _without_paths(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return "(a local path)" if isinstance(value, str) and _LOCAL_PATH.match(value) else value


def _joined(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_joined(item)}" for key, item in value.items())
    return ", ".join(map(_joined, value)) if isinstance(value, list) else str(value)


def hub_id(name: str | None, *, owner: bool = False) -> str | None:
    """Return the name if it has the form of a Hub id and is not a path here, which `from_pretrained` would prefer."""
    return name if name and is_hub_id(name, owner=owner) and not os.path.exists(name) else None


# ---- One value in its place ----


class _Safe(str):
    """Text that a filter has escaped."""


def _one_line(value: Any) -> str:
    return " ".join(_UNREADABLE.sub("\ufffd", str(value)).split())


def _escape(value: Any) -> str:
    return _EDGE_UNDERSCORE.sub("&#95;", _one_line(value).translate(_ENTITIES))


def running_text(value: Any) -> _Safe:
    """Escape a value for running text, also at the start of a line."""
    escaped = _escape(value)
    opener = _LINE_START.match(escaped)
    if opener:
        escaped = f"{escaped[: opener.end() - 1]}&#{ord(opener[0][-1])};{escaped[opener.end() :]}"
    return _Safe(escaped)


def cell(value: Any) -> _Safe:
    """Escape a value for a table cell. A local path is replaced by a remark."""
    return _Safe("–" if value is None else _escape(_joined(_without_paths(value))) or "(empty)")


def number(value: Any, form: str | None = None) -> _Safe:
    """Format a number for a table cell, by default with five significant digits; escape anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return cell(value)
    return _Safe((form or ("{:,}" if isinstance(value, int) else "{:.5g}")).format(value))


def _backticks(value: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", value)), default=0))


def code(value: Any) -> _Safe:
    """Format a value as a code span that is safe in a table cell."""
    line = "" if value is None else _one_line(_joined(_without_paths(value)))
    if not line:
        return cell(value)
    if "|" in line:  # a pipe in a code span would still end the table cell
        return _Safe(f"<code>{_escape(line)}</code>")
    fence, pad = _backticks(line, 1), " " if "`" in (line[0], line[-1]) else ""
    return _Safe(f"{fence}{pad}{line}{pad}{fence}")


def fenced(value: Any, language: str) -> _Safe:
    """Format source code as a fenced block."""
    source = re.sub(r"\r\n?", "\n", _UNREADABLE.sub("\ufffd", str(value))).rstrip().strip("\n")
    # A line of a string literal could look like one of our markers. With a space it does not, and still runs.
    source = re.sub(r"(?m)^(\s*)<!--(\s*tgol:)", r"\1<! --\2", source)
    fence = _backticks(source, 3)
    return _Safe(f"{fence}{language}\n{source}\n{fence}")


# ---- The card ----


def _template_text() -> str:
    folders = Path(__file__).resolve().parents[2:4]  # the package of an installed copy, then the root of a checkout
    for folder in folders:
        if (folder / TEMPLATE_NAME).is_file():
            return (folder / TEMPLATE_NAME).read_text(encoding="utf-8")
    raise FileNotFoundError(f"{TEMPLATE_NAME} is neither in {folders[0]} nor in {folders[1]}: reinstall tgol_trainer.")


@functools.cache
def _template() -> jinja2.Template:
    # Autoescape is for HTML and this is Markdown: `finalize` escapes what no filter did.
    engine = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # noqa: S701
    engine.finalize = lambda value: value if isinstance(value, _Safe) else running_text(value)
    engine.filters.update(cell=cell, code=code, alt=running_text, fenced=fenced, num=number)
    engine.filters["href"] = lambda value: _Safe(urllib.parse.quote(_one_line(value), safe="/"))
    return engine.from_string(_template_text())


def _title(data: Mapping[str, Any]) -> str:
    for name in (data["model_name"], data["hub_model_id"]):
        last = re.split(r"[\\/](?=\S)", _one_line(name or "").rstrip("\\/"))[-1]
        if last.strip(".~"):
            return last
    return "TGO fine-tuned model" if data["full_finetuning"] or data["merged"] else "TGO adapter"


def _model_index(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    results = []
    for row in data["evaluations"]:
        name = f"{_one_line(row['name'])} ({'' if row['trained'] else 'not '}used in training)"
        args = {key: row[key] for key in ("trained", "interval", "mean_before", "num_prompts", "num_images")}
        metrics = {"win_rate": ("win rate against the base model", "win_rate"), "mean_score": ("mean", "mean_after")}
        for kind, (label, key) in metrics.items():
            if isinstance(row[key], (int, float)):
                result = EvalResult(
                    task_type=_one_line(data["pipeline_tag"] or "text-to-image"),
                    dataset_type="prompts",
                    dataset_name="Evaluation prompts",
                    metric_type=kind,
                    metric_value=row[key],
                    metric_name=f"{name}: {label}",
                    metric_args=args,
                )
                results.append(result)
    return eval_results_to_model_index(data["title"], results) if results else []


def card_metadata(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of checked facts, in the order in which it is written."""
    adapter = not (data["full_finetuning"] or data["merged"])
    named = data["license"] == "other"  # the Hub reads a license's name and link only then
    tags = ["lora" if adapter else None, "tgol", "trl", data["pipeline_tag"]]
    metadata = {
        "base_model": data["base_id"],
        "base_model_relation": data["base_id"] and ("adapter" if adapter else "finetune"),
        "library_name": "diffusers",
        "pipeline_tag": _one_line(data["pipeline_tag"] or ""),
        "license": _one_line(data["license"] or ""),
        "license_name": _one_line((named and data["license_name"]) or ""),
        "license_link": _one_line((named and data["license_link"]) or ""),
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
