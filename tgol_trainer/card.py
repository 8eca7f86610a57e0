"""The model card: facts of a run to README.md, with data escaped and a person's edits kept. Imports no torch."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import urllib.parse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

logger = logging.getLogger(__name__)

SECTIONS = "title", "pictures", "usage", "threshold", "evaluation", "hyperparameters", "training", "limits", "citation"
TEMPLATE_NAME = "model_card_template.md"

_TOKEN = re.compile(r"(?:hf_(?:oauth_)?|api_org_)[A-Za-z0-9]{17,}")
_SECRET_NAME = re.compile(r"((^|_)token|password|passwd|secret|api_key)$", re.IGNORECASE)
_LOCAL_PATH = re.compile(r"[/~]|\.{1,2}([/\\]|$)|[A-Za-z]:[\\/]|\\\\|file:|(?!\w+://)[^\s/]+/[^\s/]+/", re.IGNORECASE)
# Control characters, lone surrogates, non-characters, and the marks that reverse the reading direction.
_UNREADABLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
# Entities, not backslashes: an entity never counts as Markdown structure, in no parser.
_ENTITIES = {ord(char): f"&#{ord(char)};" for char in "\\`*[]|~$"} | {38: "&amp;", 60: "&lt;", 62: "&gt;"}
_EDGE_UNDERSCORE = re.compile(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])")
# What would open a heading, a list, a rule or a table at the start of a line; the last character is the one to hide.
_LINE_START = re.compile(r"[#=:]|[+-](?!\d)|\d{1,9}[.)](?=\s|$)")

_FRONT_MATTER = re.compile(r"(?s)\s*---[ \t]*\n(?:|(.*?)\n)---[ \t]*(?:\n|\Z)")
_STATE = re.compile(r"(?m)^<!-- tgol:(metadata|sections)((?: \S+)*) --> *(?:\n|\Z)")
_SECTION = re.compile(r"(?ms)^<!-- tgol:begin (\w+) ([0-9a-f]{8}) --> *\n(.*?)^<!-- tgol:end \1 --> *(?:\n|\Z)")


@dataclasses.dataclass
class DatasetFacts:
    """
    One dataset of the run.

    Args:
        name (`str`, *optional*): Hub id, or any other name; what reads like a local path is replaced by a remark.
        revision (`str`, *optional*): Commit of the dataset.
        num_rows (`int`, *optional*): Rows trained on.
        num_dropped (`int`, *optional*): Rows left out as unusable.
        columns (`list[str]`, *optional*, defaults to `[]`): Names of the columns used.
    """

    name: str | None = None
    revision: str | None = None
    num_rows: int | None = None
    num_dropped: int | None = None
    columns: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Hyperparameter:
    """
    One setting of the run.

    Args:
        name (`str`): Its name. Names that hold a secret (`hub_token`, `*_token`, `*password`, `*secret`) are left out.
        value (`Any`, *optional*): Its value; local paths are replaced by a remark.
        is_default (`bool`, *optional*, defaults to `False`):
            Whether the value is the default; defaults go into a folded table.
    """

    name: str
    value: Any = None
    is_default: bool = False


@dataclasses.dataclass
class EvaluationRow:
    """
    One score, measured before and after training on the same prompts and seeds.

    Args:
        name (`str`): Name of the score.
        trained (`bool`, *optional*, defaults to `False`): Whether this score made the training labels.
        win_rate (`float`, *optional*): Share of images that score above the base model's, 0 to 1.
        interval (`tuple[float, float]`, *optional*):
            Interval of the win rate, 0 to 1; its level belongs into `CardFacts.evaluation_note`.
        mean_before (`float`, *optional*): Mean score of the base model.
        mean_after (`float`, *optional*): Mean score of the trained model.
        num_prompts (`int`, *optional*): Prompts evaluated.
        num_images (`int`, *optional*): Images evaluated.
    """

    name: str
    trained: bool = False
    win_rate: float | None = None
    interval: tuple[float, float] | None = None
    mean_before: float | None = None
    mean_after: float | None = None
    num_prompts: int | None = None
    num_images: int | None = None


@dataclasses.dataclass
class Picture:
    """
    One picture of the card.

    Args:
        path (`str`): Path relative to the card, with forward slashes, not leaving its folder.
        alt (`str`, *optional*, defaults to `""`): What the picture shows, for those who cannot see it.
        prompt (`str`, *optional*): Prompt of the picture, shown below it; without one, `alt` stands in the metadata.
    """

    path: str
    alt: str = ""
    prompt: str | None = None


@dataclasses.dataclass
class CardFacts:
    """
    What a model card states. Every field may stay empty; a section without facts is left out of the card.

    Args:
        model_name (`str`, *optional*, defaults to `""`): Title; of a path or Hub id, the last part is used.
        hub_model_id (`str`, *optional*): Hub id of the trained model; names the card where `model_name` is empty.
        base_model (`str`, *optional*): Hub id of the base model; anything that is no Hub id is dropped.
        base_model_revision (`str`, *optional*): Commit of the base model.
        base_model_note (`str`, *optional*):
            What the base model is, where it has no Hub id, such as `"a local folder, name not recorded"`.
        pipeline_class (`str`, *optional*): Name of the diffusers pipeline class.
        pipeline_tag (`str`, *optional*, defaults to `"text-to-image"`): Task on the Hub.
        license (`str`, *optional*): License identifier, only where known.
        datasets (`list[DatasetFacts]`, *optional*, defaults to `[]`): Training data.
        threshold (`dict[str, Any]`, *optional*, defaults to `{}`):
            `value`, `source`, `percentile`, `num_positive`, `num_negative`, `num_ties`, `moved_from`, `normalization`
            (`method`, `center`, `scale`). Other keys become a line each; `None` counts as absent.
        weights (`dict[str, Any]`, *optional*, defaults to `{}`):
            `mean`, `max`, `top_1_percent_share` (0 to 1) and `confidence_scale` of the confidence weights.
        adapter (`dict[str, Any]`, *optional*, defaults to `{}`):
            Adapter configuration: `r`, `lora_alpha`, `target_modules` and so on.
        full_finetuning (`bool`, *optional*, defaults to `False`): Whether all weights were trained, not an adapter.
        hyperparameters (`list[Hyperparameter]`, *optional*, defaults to `[]`): Settings of the run.
        training (`dict[str, Any]`, *optional*, defaults to `{}`):
            `steps`, `epochs`, `train_seconds`; every other key is a final metric.
        evaluations (`list[EvaluationRow]`, *optional*, defaults to `[]`): One row a score.
        evaluation_note (`str`, *optional*): How the evaluation was made: level of the intervals, seeds, sampler.
        pictures (`list[Picture]`, *optional*, defaults to `[]`): Before-and-after pictures.
        usage (`str`, *optional*, defaults to `""`): Python source that loads the model and makes an image.
        hardware (`str`, *optional*): What it was trained on.
        versions (`dict[str, str]`, *optional*, defaults to `{}`): Package name to version.
        limits (`list[str]`, *optional*, defaults to `[]`): Known limits, a sentence each.
        created (`str`, *optional*): Date of the card.
    """

    model_name: str = ""
    hub_model_id: str | None = None
    base_model: str | None = None
    base_model_revision: str | None = None
    base_model_note: str | None = None
    pipeline_class: str | None = None
    pipeline_tag: str | None = "text-to-image"
    license: str | None = None
    datasets: list[DatasetFacts] = dataclasses.field(default_factory=list)
    threshold: dict[str, Any] = dataclasses.field(default_factory=dict)
    weights: dict[str, Any] = dataclasses.field(default_factory=dict)
    adapter: dict[str, Any] = dataclasses.field(default_factory=dict)
    full_finetuning: bool = False
    hyperparameters: list[Hyperparameter] = dataclasses.field(default_factory=list)
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    evaluations: list[EvaluationRow] = dataclasses.field(default_factory=list)
    evaluation_note: str | None = None
    pictures: list[Picture] = dataclasses.field(default_factory=list)
    usage: str = ""
    hardware: str | None = None
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    limits: list[str] = dataclasses.field(default_factory=list)
    created: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """
        Return the facts as plain JSON types; non-finite numbers and unknown objects become text.

        Returns:
            `dict[str, Any]`: The fields, without hyperparameters and dictionary keys whose name says they are secret.
        """
        return _plain(self)


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        value = value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if not _SECRET_NAME.search(str(key))}
    if isinstance(value, (list, tuple, set, frozenset)):
        items = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(x) for x in items if not (isinstance(x, Hyperparameter) and _SECRET_NAME.search(x.name))]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "tolist"):  # NumPy and torch, neither imported here
        return _plain(value.tolist())
    return str(getattr(value, "__name__", value))


def _checked(facts: CardFacts) -> dict[str, Any]:
    data = facts.to_dict()
    for name, value in data.items():
        if _TOKEN.search(json.dumps(value, ensure_ascii=False)):
            raise ValueError(f"`CardFacts.{name}` holds what looks like an access token; a card is public. Remove it.")
        if isinstance(value, dict):
            data[name] = {key: item for key, item in value.items() if item is not None}
    for path in (picture["path"] for picture in data["pictures"]):
        if not path or re.search(r"^[/~]|[\\:]", path) or ".." in path.split("/"):
            raise ValueError(f"`Picture.path` must be relative, inside the card's folder, with `/`, but is {path!r}.")
    datasets = [item for item in data["datasets"] if any(item.values())]
    data["datasets"] = [item | {"hub_id": _hub_id(item["name"], owner=True)} for item in datasets]
    return data | {"title": _title(data), "base_id": _hub_id(data["base_model"])}


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_show(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_show(item) for item in value)
    return "(a local path)" if isinstance(value, str) and _LOCAL_PATH.match(value) else str(value)


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
    folders = Path(__file__).resolve().parents[:2]  # an installed copy, then the root of a checkout
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
    return "TGO fine-tuned model" if data["full_finetuning"] else "TGO adapter"


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


def _metadata(data: Mapping[str, Any]) -> dict[str, Any]:
    tags = [None if data["full_finetuning"] else "lora", "tgol", "trl", data["pipeline_tag"]]
    metadata = {
        "base_model": data["base_id"],
        "base_model_relation": data["base_id"] and ("finetune" if data["full_finetuning"] else "adapter"),
        "library_name": "diffusers",
        "pipeline_tag": _one_line(data["pipeline_tag"] or ""),
        "license": _one_line(data["license"] or ""),
        "tags": [_one_line(tag) for tag in tags if tag],
        "datasets": list(dict.fromkeys(item["hub_id"] for item in data["datasets"] if item["hub_id"])),
        "widget": [
            {"text": _one_line(picture["prompt"] or picture["alt"]) or "-", "output": {"url": picture["path"]}}
            for picture in data["pictures"]
        ],
        "model-index": _model_index(data),
    }
    return {key: value for key, value in metadata.items() if value}


def _rendered(data: dict[str, Any]) -> dict[str, str]:
    template = _template()
    blocks = {name: "".join(template.blocks[name](template.new_context(data))) for name in SECTIONS}
    return {name: text.strip() for name, text in blocks.items() if text.strip()}


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


def _merge_sections(body: str, new: Mapping[str, str], seen: set[str]) -> str:
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
    for order, name in enumerate(SECTIONS):
        names = [piece[0] for piece in pieces]
        if name in marked and name not in seen and name not in names:
            after = [at + 1 for at, other in enumerate(names) if other in SECTIONS[:order]]
            before = [at for at, other in enumerate(names) if other in SECTIONS[order:]]
            pieces.insert(after[-1] if after else [*before, len(pieces)][0], (name, marked[name]))
    seen.update(name for name, _ in pieces if name)
    return "\n\n".join(text.strip("\n") for _, text in pieces if text.strip())


def _updated(text: str, facts: CardFacts) -> str:
    data = _checked(facts)
    newline = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
    text = text.replace("\r\n", "\n")
    front = _FRONT_MATTER.match(text)
    body = text[front.end() :] if front else text
    state: dict[str, list[str]] = {"metadata": [], "sections": []}
    for kind, words in _STATE.findall(body):
        state[kind] += words.split()
    digests, seen = dict(word.rpartition("=")[::2] for word in state["metadata"]), set(state["sections"])
    block = _merge_metadata((front[1] or "") if front else "", _metadata(data), digests)
    body = _merge_sections(_STATE.sub("", body), _rendered(data), seen)
    marks = [["metadata", *(f"{key}={digest}" for key, digest in digests.items())], ["sections", *sorted(seen)]]
    comments = "\n".join(f"<!-- tgol:{' '.join(words)} -->" for words in marks)
    return f"---\n{block}\n---\n{comments}\n\n{body}\n".replace("\n", newline)


def render_card(facts: CardFacts) -> str:
    """
    Render a new model card.

    Args:
        facts ([`CardFacts`]):
            What the card states.

    Returns:
        `str`: Metadata and Markdown, the text of a README.md.

    Raises:
        ValueError: If a fact looks like an access token, or a picture's path is not inside the card's folder.
        FileNotFoundError: If the template is missing from the installation.
    """
    return _updated("", facts)


def write_card(facts: CardFacts, directory: str | os.PathLike[str]) -> Path:
    """
    Write README.md, or bring an existing one up to date. What a person wrote, changed or deleted in it stays so.

    Args:
        facts ([`CardFacts`]):
            What the card states.
        directory (`str` or `os.PathLike`):
            Folder of the card; made where missing. The file is replaced in one step.

    Returns:
        `Path`: The path of README.md.

    Raises:
        ValueError: If a fact looks like an access token, or a picture's path is not inside the card's folder.
        FileNotFoundError: If the template is missing from the installation.
    """
    path = Path(directory) / "README.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.read_bytes().decode("utf-8-sig", "surrogateescape") if path.exists() else ""
    temporary = path.with_name(f".README.md.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(_updated(old, facts).encode("utf-8", "surrogateescape"))
        if path.exists():
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
