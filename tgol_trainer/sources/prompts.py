"""Read prompts from a text file, a table, a dataset, or one of the test sets that papers report on."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from pathlib import Path

import datasets

from tgol_trainer._files import NotTextError, read_text
from tgol_trainer.data.images import DataError
from tgol_trainer.data.prompts import PromptSyntax, strip_syntax
from tgol_trainer.data.rows import prompt_problem

from .loading import LOAD_ERRORS, AnyDataset, hub_commit, load_scored_dataset

logger = logging.getLogger(__name__)

_COLUMNS = ("prompt", "caption", "text", "Prompt")
_STYLES = ("anime", "concept-art", "paintings", "photo")


@dataclasses.dataclass(frozen=True)
class PromptSource:
    """
    The place of a named prompt set on the Hub.

    Args:
        repo_id (`str`): Dataset repository.
        count (`int`): Number of its prompts, as published.
        revision (`str`): Branch, tag or commit.
        split (`str`, *optional*): Split of a dataset that `datasets` loads.
        column (`str`, *optional*): Column of prompts.
        category (`str`, *optional*): Column of categories.
        files (`tuple[str, ...]`, *optional*):
            JSON files, each a list of strings, instead of split and columns. Their names are the categories.
    """

    repo_id: str
    count: int
    revision: str = "main"
    split: str | None = None
    column: str | None = None
    category: str | None = None
    files: tuple[str, ...] = ()


_HPD = "zhwang/HPDv2"
PROMPT_SETS: dict[str, PromptSource] = {
    "pickapic-test": PromptSource("yuvalkirstain/pickapic_v1_no_images", 500, split="test_unique", column="caption"),
    "partiprompts": PromptSource("nateraw/parti-prompts", 1632, split="train", column="Prompt", category="Category"),
    "hpsv2": PromptSource(_HPD, 3200, files=tuple(f"benchmark/{style}.json" for style in _STYLES)),
    **{f"hpsv2-{style}": PromptSource(_HPD, 800, files=(f"benchmark/{style}.json",)) for style in _STYLES},
}
"""Named sets: Pick-a-Pic v1's 500 unique test prompts (the paper uses 424 of such prompts and does not say which),
PartiPrompts' 1632 and HPSv2's 4 × 800. Nothing is filtered; Pick-a-Pic holds prompts that are not safe for work."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """
    Prompts, with their categories where there are any.

    Args:
        texts (`list[str]`): Prompts, in order.
        categories (`list[str]`, *optional*): One per prompt.
        revision (`str`, *optional*): Commit of the Hub that they were read from.
    """

    texts: list[str]
    categories: list[str] | None = None
    revision: str | None = None


def prompt_set(source: str) -> tuple[str, PromptSource] | None:
    """
    Look up a named set.

    Args:
        source (`str`): A name of [`PROMPT_SETS`], or one with a revision: `"hpsv2@main"`.

    Returns:
        `tuple[str, PromptSource]`, *optional*: the name, and its source at that revision; `None` for other text.
    """
    name, _, revision = source.partition("@")
    if name not in PROMPT_SETS:
        return None
    found = PROMPT_SETS[name]
    return name, dataclasses.replace(found, revision=revision) if revision else found


def load_prompts(
    source: str,
    *,
    column: str | None = None,
    category_column: str | None = None,
    split: str = "train",
    prompt_syntax: PromptSyntax = "keep",
) -> Prompts:
    """
    Read prompts.

    Args:
        source (`str`):
            A name of [`PROMPT_SETS`], alone or with a revision (`"hpsv2@main"`); a text file with one prompt per line
            (blank lines are skipped); a CSV, JSON Lines or Parquet file; a folder or Hub id of a dataset.
        column (`str`, *optional*):
            Column of a table; by default that of the named set, or the first of `prompt`, `caption`, `text` that
            exists.
        category_column (`str`, *optional*):
            Column of a table that holds the category of each prompt. Some named sets have categories of their own.
        split (`str`, *optional*, defaults to `"train"`): Split of a dataset.
        prompt_syntax (`str`, *optional*, defaults to `"keep"`):
            `"strip"` takes instructions for other programs out of the prompts ([`strip_syntax`]).

    Returns:
        [`Prompts`]

    Raises:
        DataError: if the source cannot be read, has no such column, or holds blank or missing prompts.
    """
    prompts = _load(source, column, category_column, split)
    if prompt_syntax == "keep":
        return prompts
    plain = dataclasses.replace(prompts, texts=[strip_syntax(text) for text in prompts.texts])
    return _checked(plain, f"{source} without instructions for other programs", None)


def _load(source: str, column: str | None, category_column: str | None, split: str) -> Prompts:
    path, named = Path(source).expanduser(), prompt_set(source)
    if named and not path.exists():
        return _named(*named, column, category_column)
    if path.is_file() and path.suffix.lower() in (".txt", ""):
        if category_column is not None:
            raise DataError(f"prompts: {source!r} is a text file, which has no column {category_column!r}.")
        try:
            lines = re.split(r"\r\n|\r|\n", read_text(path))  # `splitlines` also cuts at U+2028, inside a prompt
        except NotTextError as error:
            raise DataError(f"prompts: {error}") from error
        texts = [line.strip() for line in lines]
        return _checked(Prompts([text for text in texts if text]), source, None)
    if not path.exists() and "/" not in source:
        raise DataError(
            f"prompts: {source!r} is not a file here and not a named set. The sets are {', '.join(PROMPT_SETS)}."
        )
    return _from_table(load_scored_dataset(source, split=split), source, column, category_column)


def _from_table(dataset: AnyDataset, source: str, column: str | None, category_column: str | None) -> Prompts:
    names = list(dataset.column_names or [])
    found = column or next((name for name in _COLUMNS if name in names), "prompt")
    for wanted, remedy in ((found, " Name the one that holds the prompts."), (category_column, "")):
        if wanted is not None and wanted not in names:
            raise DataError(f"prompts: {source!r} has no column {wanted!r}; its columns are {names}.{remedy}")
    categories = None
    if category_column is not None:
        categories = [str(value) for value in dataset.select_columns([category_column])[category_column]]
    texts = list(dataset.select_columns([found])[found])
    return _checked(Prompts(texts, categories, hub_commit(dataset)), source, found)


def _named(name: str, source: PromptSource, column: str | None, category_column: str | None) -> Prompts:
    if source.files and (column or category_column):
        raise DataError(f"prompts: the set {name!r} has no columns {column or category_column!r}: name none.")
    try:
        if source.files:
            prompts = _checked(_from_files(source), name, None)
        else:
            dataset = datasets.load_dataset(source.repo_id, split=source.split, revision=source.revision)
            prompts = _from_table(dataset, name, column or source.column, category_column or source.category)
    except DataError:
        raise
    except LOAD_ERRORS as error:
        raise DataError(
            f"prompts: the set {name!r} is read from the Hub dataset {source.repo_id} at {source.revision!r}, which "
            f"could not be loaded: {type(error).__name__}: {str(error)[:300]}\nCheck the connection (HF_HUB_OFFLINE, "
            "proxy), or give a text file with one prompt per line."
        ) from error
    if len(prompts.texts) != source.count:
        logger.warning(
            "prompts: the set %r has %d prompts at %r of %s, and had %d when papers used it. Name an earlier commit: "
            "%s@COMMIT.",
            *(name, len(prompts.texts), source.revision, source.repo_id, source.count, name),
        )
    return prompts


def _from_files(source: PromptSource) -> Prompts:
    from huggingface_hub import hf_hub_download

    texts, categories, commit = [], [], None
    for file in source.files:
        # Every file is of the commit of the first one: the branch may move in between.
        path = hf_hub_download(source.repo_id, file, repo_type="dataset", revision=commit or source.revision)
        local = Path(path)
        commit = local.parts[-1 - len(Path(file).parts)]
        found = json.loads(local.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise ValueError(f"{file} is not a JSON list")
        texts += found
        categories += [local.stem] * len(found)
    return Prompts(texts, categories, commit)


def _checked(prompts: Prompts, source: str, column: str | None) -> Prompts:
    where = f"column {column!r} of {source!r}" if column else repr(source)
    if not prompts.texts:
        raise DataError(f"prompts: {where} holds none.")
    bad = [f"row {row}: {cause}" for row, text in enumerate(prompts.texts) if (cause := prompt_problem(text))]
    if bad:
        raise DataError(
            f"prompts: {where}: {len(bad)} of {len(prompts.texts)} cannot be used ({', '.join(bad[:5])}). Mend them."
        )
    return prompts
