"""Write the card of a dataset of scored images."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .rendering import cell, code, fenced, hub_id, number, refuse_tokens, running_text
from .writing import update_file

_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
_MEANINGS = {
    "prompt": "text from which the {medium} was made",
    "seed": "seed of this {medium}",
    "image_index": "number of the image among those of its prompt",
    "video_index": "number of the video among those of its prompt",
    "model": "model that made the {medium}",
    "revision": "commit of the model",
    "adapter": "adapter that was loaded",
    "settings": "arguments of sampling, as JSON",
}


@dataclasses.dataclass
class ScoreFacts:
    """
    One column of scores.

    Args:
        column (`str`): Name of the column.
        scorer (`str`, *optional*): Hub id or name of the reward.
        revision (`str`, *optional*): Commit of the reward.
        scale (`str`, *optional*, defaults to `""`): Unit and direction, in words.
        missing (`int`, *optional*, defaults to 0): Rows without a score.
        statistics (`dict[str, float]`, *optional*, defaults to `{}`): Ordered values by name, such as `mean`.
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
        num_rows (`int`): Number of rows.
        columns (`dict[str, str]`): Type of each column.
        scores (`list[ScoreFacts]`, *optional*, defaults to `[]`): The columns of scores.
        source (`str`, *optional*): Hub id of the dataset that was scored, or name of the set of prompts.
        source_revision (`str`, *optional*): Commit of the source.
        generators (`list[dict[str, Any]]`, *optional*, defaults to `[]`):
            `model`, `revision`, `adapter`, `settings` and `license` of each model that made images.
        video (`bool`, *optional*, defaults to `False`): Whether the rows hold videos.
        raters (`int`, *optional*): Number of people who gave the scores with `tgol rate`.
        data_files (`list[str]`, *optional*, defaults to `["data/train-*"]`): Patterns of the files with the rows.
    """

    repository: str
    num_rows: int
    columns: dict[str, str]
    scores: list[ScoreFacts] = dataclasses.field(default_factory=list)
    source: str | None = None
    source_revision: str | None = None
    generators: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    video: bool = False
    raters: int | None = None
    data_files: list[str] = dataclasses.field(default_factory=lambda: ["data/train-*"])


def _metadata(facts: DatasetCardFacts) -> dict[str, Any]:
    source = hub_id(facts.source, owner=True)
    paths: Any = facts.data_files[0] if len(facts.data_files) == 1 else facts.data_files
    metadata: dict[str, Any] = {
        "task_categories": ["text-to-video" if facts.video else "text-to-image"],
        "size_categories": [next((name for limit, name in _SIZES if facts.num_rows < limit), "n>1M")],
        "tags": ["tgol", *(["scored"] if facts.scores else []), *(["synthetic"] if facts.generators else [])],
        "source_datasets": [source] if source else None,
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": paths}]}],
    }
    return {name: value for name, value in metadata.items() if value}


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def _medium(facts: DatasetCardFacts) -> str:
    return "video" if facts.video else "image"


def _title(facts: DatasetCardFacts) -> str:
    about = f"{facts.num_rows:,} {_medium(facts)}s with their prompts"
    imports, source = ["from datasets import load_dataset"], []
    if facts.scores:
        about += f" and {len(facts.scores)} column{'s' if len(facts.scores) > 1 else ''} of scores"
        config = f"TGOLConfig(output_dir='adapter', score_column={facts.scores[0].column!r})"
        imports += ["from tgol_trainer import TGOLConfig, TGOLTrainer"]
        source = [f"trainer = TGOLTrainer('a base model', {config}, dataset)", "trainer.train()"]
    source = [*imports, "", f"dataset = load_dataset({facts.repository!r}, split='train')", *source]
    name, snippet = running_text(facts.repository.rpartition("/")[2]), fenced("\n".join(source), "python")
    commands = "`tgol generate` and `tgol score`" if facts.raters is None else "`tgol rate`"
    made = f"{commands} of [tgol_trainer](https://arxiv.org/abs/2605.04653) wrote the files."
    return f"# {name}\n\n{about}. {made}\n\n{snippet}"


def _columns(facts: DatasetCardFacts) -> str:
    made = {name: meaning.format(medium=_medium(facts)) for name, meaning in _MEANINGS.items()}
    meanings = made | {score.column: "score; higher is better" for score in facts.scores}
    rows = [[code(name), cell(kind), cell(meanings.get(name))] for name, kind in facts.columns.items()]
    return "## Columns\n\n" + _table(["Column", "Type", "Meaning"], rows)


def _scores(facts: DatasetCardFacts) -> str:
    if not facts.scores:
        return ""
    names = list(dict.fromkeys(name for score in facts.scores for name in score.statistics))
    rows = []
    for score in facts.scores:
        about = [code(score.column), cell(score.scorer), code(score.revision), cell(score.scale)]
        rows.append([*about, number(score.missing), *(number(score.statistics.get(name)) for name in names)])
    text = "## Scores\n\n" + _table(["Column", "Scorer", "Revision", "Scale", "Missing", *names], rows)
    for score in facts.scores:
        most = max((count for _, count in score.histogram), default=0)
        bars = [f"{edge:>12.5g}  {'█' * round(40 * count / most):<40} {count}" for edge, count in score.histogram]
        if bars:
            text += f"\n\nDistribution of {code(score.column)}, with the lower edge and the count of each bin:\n\n"
            text += fenced("\n".join(bars), "text")
    return text


def _making(facts: DatasetCardFacts) -> str:
    lines = []
    if facts.source:
        revision = f", revision {code(facts.source_revision)}" if facts.source_revision else ""
        lines.append(f"* Source: {code(facts.source)}{revision}")
    for made in facts.generators:
        parts = [f"model {code(made.get('model'))}"]
        parts += [f"{name} {code(made[name])}" for name in ("revision", "adapter", "settings") if made.get(name)]
        parts.append(f"license of the model: {running_text(made.get('license') or 'not known here, see its card')}")
        lines.append(f"* Made with {', '.join(parts)}")
    return "## How it was made\n\n" + "\n".join(lines) if lines else ""


def _limits(facts: DatasetCardFacts) -> str:
    made = f"{_medium(facts)}s"
    lines = [f"* The terms of the model that made the {made}, and of the source of the prompts, apply to the {made}."]
    if facts.raters is not None:
        lines.append(f"* The scores come from {facts.raters} {'person' if facts.raters == 1 else 'people'}.")
    elif facts.scores:
        lines.append("* The scores come from the scorers named above, not from people.")
    return "## Limits\n\n" + "\n".join(lines)


_SECTIONS = {"title": _title, "columns": _columns, "scores": _scores, "making": _making, "limits": _limits}


def write_dataset_card(facts: DatasetCardFacts, directory: str | os.PathLike[str]) -> Path:
    """
    Write README.md, or update an existing one. What a person wrote in it stays.

    Args:
        facts ([`DatasetCardFacts`]): What the card states.
        directory (`str` or `os.PathLike`): Folder of the dataset.

    Returns:
        `Path`: the path of README.md.

    Raises:
        ValueError: if a fact looks like an access token.
    """
    refuse_tokens("DatasetCardFacts", dataclasses.asdict(facts))
    sections = {name: render(facts) for name, render in _SECTIONS.items()}
    path = Path(directory) / "README.md"
    update_file(path, _metadata(facts), {name: text for name, text in sections.items() if text}, tuple(_SECTIONS))
    return path
