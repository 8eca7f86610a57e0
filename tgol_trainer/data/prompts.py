"""Prompts from a text file, a table, a dataset, or one of the test sets that papers report on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets

from tgol_trainer.data.images import DataError
from tgol_trainer.data.loading import load_scored_dataset
from tgol_trainer.data.rows import prompt_problem

_COLUMNS = ("prompt", "caption", "text", "Prompt")
_STYLES = ("anime", "concept-art", "paintings", "photo")


@dataclasses.dataclass(frozen=True)
class PromptSource:
    """
    Where a named prompt set lies on the Hub.

    Args:
        repo_id (`str`):
            Dataset repository.
        revision (`str`):
            Branch, tag or commit.
        split (`str`, *optional*):
            Split of a dataset that `datasets` loads.
        column (`str`, *optional*):
            Column of prompts.
        category (`str`, *optional*):
            Column of categories.
        files (`tuple[str, ...]`, *optional*):
            JSON files, each a list of strings, whose names are the categories; instead of split and columns.
    """

    repo_id: str
    revision: str = "main"
    split: str | None = None
    column: str | None = None
    category: str | None = None
    files: tuple[str, ...] = ()


PROMPT_SETS: dict[str, PromptSource] = {
    "pickapic-test": PromptSource("yuvalkirstain/pickapic_v1_no_images", split="test_unique", column="caption"),
    "partiprompts": PromptSource("nateraw/parti-prompts", split="train", column="Prompt", category="Category"),
    "hpsv2": PromptSource("zhwang/HPDv2", files=tuple(f"benchmark/{style}.json" for style in _STYLES)),
    **{f"hpsv2-{style}": PromptSource("zhwang/HPDv2", files=(f"benchmark/{style}.json",)) for style in _STYLES},
}
"""Named sets: Pick-a-Pic v1's 500 unique test prompts (the paper uses 424 of such prompts and does not say which),
PartiPrompts' 1632 and HPSv2's 4 × 800. Nothing is filtered; Pick-a-Pic holds prompts that are not safe for work."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """
    Prompts with their categories, where there are any.

    Args:
        texts (`list[str]`):
            Prompts, in order.
        categories (`list[str]`, *optional*):
            One a prompt.
    """

    texts: list[str]
    categories: list[str] | None = None


def load_prompts(
    source: str, *, column: str | None = None, category_column: str | None = None, split: str = "train"
) -> Prompts:
    """
    Read prompts.

    Args:
        source (`str`):
            A name of [`PROMPT_SETS`]; a text file with one prompt a line (blank lines are passed over); a CSV, JSON
            Lines or Parquet file; a folder or Hub id of a dataset.
        column (`str`, *optional*):
            Column of a table; by default the first of `prompt`, `caption`, `text` that exists.
        category_column (`str`, *optional*):
            Column of a table that holds the category of each prompt. Named sets that have categories bring them.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a dataset.

    Returns:
        [`Prompts`]

    Raises:
        DataError: if the source cannot be read, has no such column, or holds blank or missing prompts.
    """
    path = Path(source).expanduser()
    if source in PROMPT_SETS and not path.exists():
        return _named(source)
    if path.is_file() and path.suffix.lower() in (".txt", ""):
        if category_column is not None:
            raise DataError(f"prompts: {source!r} is a text file, which has no column {category_column!r}.")
        texts = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
        return _checked(Prompts([text for text in texts if text]), source, None)
    if not path.exists() and "/" not in source:
        raise DataError(
            f"prompts: {source!r} is no file here and no named set. The sets are {', '.join(PROMPT_SETS)}."
        )
    dataset = load_scored_dataset(source, split=split)
    names = list(dataset.column_names or [])
    found = column if column is not None else next((name for name in _COLUMNS if name in names), None)
    if found is None or found not in names:
        raise DataError(
            f"prompts: {source!r} has no column {column or 'prompt'!r}; its columns are {names}. Name the one that "
            "holds the prompts."
        )
    categories = None
    if category_column is not None:
        if category_column not in names:
            raise DataError(f"prompts: {source!r} has no column {category_column!r}; its columns are {names}.")
        categories = [str(value) for value in dataset.select_columns([category_column])[category_column]]
    return _checked(Prompts(list(dataset.select_columns([found])[found]), categories), source, found)


def _named(name: str) -> Prompts:
    source = PROMPT_SETS[name]
    try:
        if source.files:
            return _from_files(source)
        dataset: Any = datasets.load_dataset(source.repo_id, split=source.split, revision=source.revision)
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"prompts: the set {name!r} is read from the Hub dataset {source.repo_id}, which could not be loaded: "
            f"{type(error).__name__}: {str(error)[:300]}\nCheck the connection (HF_HUB_OFFLINE, proxy), or give a "
            "text file with one prompt a line."
        ) from error
    categories = list(dataset[source.category]) if source.category else None
    return _checked(Prompts(list(dataset[source.column]), categories), name, source.column)


def _from_files(source: PromptSource) -> Prompts:
    from huggingface_hub import hf_hub_download

    texts: list[str] = []
    categories: list[str] = []
    for file in source.files:
        local = hf_hub_download(source.repo_id, file, repo_type="dataset", revision=source.revision)
        found = json.loads(Path(local).read_text(encoding="utf-8"))
        texts += found
        categories += [Path(file).stem] * len(found)
    return Prompts(texts, categories)


def _checked(prompts: Prompts, source: str, column: str | None) -> Prompts:
    bad = [(row, cause) for row, text in enumerate(prompts.texts) if (cause := prompt_problem(text))]
    where = f"column {column!r} of {source!r}" if column else repr(source)
    if bad:
        rows = ", ".join(f"row {row}: {cause}" for row, cause in bad[:5])
        raise DataError(f"prompts: {where}: {len(bad)} of {len(prompts.texts)} cannot be used ({rows}). Mend them.")
    if not prompts.texts:
        raise DataError(f"prompts: {where} holds none.")
    return prompts
