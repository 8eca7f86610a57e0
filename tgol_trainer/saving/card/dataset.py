"""The card of a dataset of scored images: facts to README.md, escaped like the card of a model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .rendering import _cell, _code, _fenced, _hub_id, _number, _text
from .writing import brought_up_to_date, rewrite

DATASET_SECTIONS = ("title", "columns", "scores", "making", "limits")
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclasses.dataclass
class ScoreFacts:
    """
    One column of scores.

    Args:
        column (`str`): Its name.
        scorer (`str`, *optional*): Hub id or name of what scored.
        revision (`str`, *optional*): Commit of the scorer.
        scale (`str`, *optional*, defaults to `""`): Unit and direction, in words.
        missing (`int`, *optional*, defaults to 0): Rows without a score.
        statistics (`dict[str, float]`, *optional*, defaults to `{}`): Name to value, such as `mean`; in order.
        histogram (`list[tuple[float, int]]`, *optional*, defaults to `[]`): Lower edge and count of each bin.
    """

    column: str
    scorer: str | None = None
    revision: str | None = None
    scale: str = ""
    missing: int = 0
    statistics: dict[str, float] = dataclasses.field(default_factory=dict)
    histogram: list[tuple[float, int]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class DatasetCardFacts:
    """
    What the card of a dataset states.

    Args:
        repository (`str`): Hub id.
        num_rows (`int`): Rows.
        columns (`dict[str, str]`): Column to its type.
        scores (`list[ScoreFacts]`, *optional*, defaults to `[]`): Columns of scores.
        source (`str`, *optional*): Hub id of the dataset that was scored, or name of the set of prompts.
        source_revision (`str`, *optional*): Commit of it.
        generators (`list[dict[str, Any]]`, *optional*, defaults to `[]`):
            `model`, `revision`, `adapter`, `settings` and `license` of what made the images.
        video (`bool`, *optional*, defaults to `False`): Whether rows hold videos.
    """

    repository: str
    num_rows: int
    columns: dict[str, str]
    scores: list[ScoreFacts] = dataclasses.field(default_factory=list)
    source: str | None = None
    source_revision: str | None = None
    generators: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    video: bool = False


def _metadata(facts: DatasetCardFacts) -> dict[str, Any]:
    size = next((name for limit, name in _SIZES if facts.num_rows < limit), "n>1M")
    task = "text-to-video" if facts.video else "text-to-image"
    source = _hub_id(facts.source, owner=True)
    tags = ["tgol", *(["scored"] if facts.scores else []), *(["synthetic"] if facts.generators else [])]
    metadata: dict[str, Any] = {
        "task_categories": [task],
        "size_categories": [size],
        "tags": tags,
        "source_datasets": [source] if source else None,
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}],
    }
    return {name: value for name, value in metadata.items() if value}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(facts: DatasetCardFacts) -> str:
    name = facts.repository.rpartition("/")[2]
    medium = "videos" if facts.video else "pictures"
    load = [f"dataset = load_dataset({facts.repository!r}, split='train')"]
    if facts.scores:
        column = facts.scores[0].column
        config = f"TGOLConfig(output_dir='adapter', score_column={column!r})"
        load += [f"trainer = TGOLTrainer('a base model', {config}, dataset)", "trainer.train()"]
        load = ["from datasets import load_dataset", "from tgol_trainer import TGOLConfig, TGOLTrainer", "", *load]
    else:
        load = ["from datasets import load_dataset", "", *load]
    about = f"{facts.num_rows:,} {medium} with their prompts"
    about += (
        f" and {len(facts.scores)} column{'s' if len(facts.scores) > 1 else ''} of scores." if facts.scores else "."
    )
    made = "written with [tgol_trainer](https://arxiv.org/abs/2605.04653)'s `tgol generate` and `tgol score`"
    return f"# {_text(name)}\n\n{about} The files were {made}.\n\n{_fenced(chr(10).join(load), 'python')}"


def _columns(facts: DatasetCardFacts) -> str:
    meaning = {
        "prompt": "text the image was made from",
        "seed": "seed of this image",
        "image_index": "number of the image among those of its prompt",
        "video_index": "number of the video among those of its prompt",
        "model": "what made it",
        "revision": "commit of the model",
        "adapter": "adapter that was loaded",
        "settings": "arguments of sampling, as JSON",
    } | {score.column: "score; higher is better" for score in facts.scores}
    rows = [[_code(name), _cell(kind), _cell(meaning.get(name, ""))] for name, kind in facts.columns.items()]
    return "## Columns\n\n" + _table(["Column", "Type", "Meaning"], rows)


def _scores(facts: DatasetCardFacts) -> str:
    if not facts.scores:
        return ""
    names = list(dict.fromkeys(name for score in facts.scores for name in score.statistics))
    rows = [
        [
            _code(score.column),
            _cell(score.scorer),
            _code(score.revision),
            _cell(score.scale),
            _number(score.missing),
            *(_number(score.statistics.get(name)) for name in names),
        ]
        for score in facts.scores
    ]
    text = "## Scores\n\n" + _table(["Column", "Scorer", "Revision", "Scale", "Missing", *names], rows)
    for score in facts.scores:
        most = max((count for _, count in score.histogram), default=0)
        bars = [f"{edge:>12.5g}  {'█' * round(40 * count / most):<40} {count}" for edge, count in score.histogram]
        if bars:
            text += f"\n\nDistribution of {_code(score.column)}, lower edge and count of each bin:\n\n"
            text += _fenced("\n".join(bars), "text")
    return text


def _making(facts: DatasetCardFacts) -> str:
    lines = []
    if facts.source:
        revision = f", revision {_code(facts.source_revision)}" if facts.source_revision else ""
        lines.append(f"* Source: {_code(facts.source)}{revision}")
    for made in facts.generators:
        parts = [f"model {_code(made.get('model'))}"]
        parts += [f"{name} {_code(made[name])}" for name in ("revision", "adapter", "settings") if made.get(name)]
        parts.append(f"license of the model: {_text(made.get('license') or 'not known here, see its card')}")
        lines.append(f"* Made with {', '.join(parts)}")
    return "## How it was made\n\n" + "\n".join(lines) if lines else ""


def _limits(facts: DatasetCardFacts) -> str:
    lines = ["* The terms of the model that made the images, and of the prompts' source, apply to them."]
    if facts.scores:
        lines.append("* The scores are those of the scorers named above, not of people.")
    return "## Limits\n\n" + "\n".join(lines)


def write_dataset_card(facts: DatasetCardFacts, directory: str | os.PathLike[str]) -> Path:
    """
    Write README.md, or bring an existing one up to date; what a person wrote in it stays.

    Args:
        facts ([`DatasetCardFacts`]):
            What the card states.
        directory (`str` or `os.PathLike`):
            Folder of the dataset.

    Returns:
        `Path`: The path of README.md.
    """
    made: Mapping[str, str] = {
        "title": _title(facts),
        "columns": _columns(facts),
        "scores": _scores(facts),
        "making": _making(facts),
        "limits": _limits(facts),
    }
    sections = {name: text for name, text in made.items() if text}
    path = Path(directory) / "README.md"
    rewrite(path, lambda old: brought_up_to_date(old, _metadata(facts), sections, DATASET_SECTIONS))
    return path
