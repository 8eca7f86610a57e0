"""`tgol check`: what training would refuse in a dataset, what it would warn of, and what is good to know."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .console import counted, hide_local_bars, plain_errors, set_up_logging

if TYPE_CHECKING:
    from tgol_trainer.checking.findings import Diagnosis
    from tgol_trainer.data import Columns
    from tgol_trainer.families import ModelFamily
    from tgol_trainer.sources.loading import AnyDataset

# Where a CLIP tokenizer often lies on a machine that has run diffusers: (repository, vocabulary).
_CLIP = (
    ("openai/clip-vit-large-patch14", "vocab.json"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/vocab.json"),
    ("openai/clip-vit-base-patch32", "vocab.json"),
)
_TITLES: dict[Literal["problem", "warning", "note"], str] = {
    "problem": "Problems: training refuses these",
    "warning": "Warnings",
    "note": "Notes",
}


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tgol check",
        description="Check a dataset by the rules of training, and look for what else may be wrong: duplicates with "
        "different scores, prompts that are too long, sizes that do not fit. No model is loaded.",
        epilog="Exit code: 0 fine, 1 training would refuse the data (or, with --strict, a warning), 2 a command line "
        "that is not understood.",
    )
    parser.add_argument("source", help="Hub id, folder, or a CSV, JSON Lines or Parquet file")
    parser.add_argument("--split", default="train", help="default: %(default)s")
    parser.add_argument("--dataset_config", help="configuration of a dataset on the Hub")
    parser.add_argument("--streaming", action="store_true", help="read it as a stream, without downloading it first")
    parser.add_argument("--prompt_column", default="prompt", help="default: %(default)s")
    parser.add_argument("--image_column", default="image", help="default: %(default)s")
    parser.add_argument("--score_column", default="score", help="default: %(default)s")
    parser.add_argument(
        "--score_columns", nargs="+", metavar="COLUMN", help="several columns of scores, in place of it"
    )
    parser.add_argument("--video_column", help="column of videos, which are read instead of images")
    parser.add_argument("--num_frames", type=int, help="frames of a training clip (default: the model's)")
    parser.add_argument("--model_name_or_path", help="Hub id, folder, or `shapes`: its token limit and resolution")
    parser.add_argument("--model_revision", help="revision of the model on the Hub")
    parser.add_argument(
        *("--resolution", "-r"), type=int, nargs="+", metavar="PIXELS", help="side, or height and width (default: "
        "the model's, or 512)"
    )  # fmt: skip
    parser.add_argument("--max_distance", type=int, default=6, help="bits of 256 in which near duplicates may differ "
                        "(default: %(default)s)")  # fmt: skip
    parser.add_argument("--num_proc", type=int, default=min(8, os.cpu_count() or 1), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too; `-` prints it instead")
    parser.add_argument("--strict", action="store_true", help="exit with 1 for warnings too")
    args = parser.parse_args(argv)
    several = args.score_columns or []
    if several and (args.score_column != "score" or len(set(several)) < len(several)):
        parser.error("--score_columns: name each column once, and leave out --score_column")
    if args.num_frames is not None and args.num_frames < 1:
        parser.error("--num_frames must be at least 1")
    if args.resolution is not None and (len(args.resolution) > 2 or min(args.resolution) < 1):
        parser.error("--resolution: give a side, or a height and a width, in pixels")
    if not 0 <= args.max_distance < 32:
        parser.error("--max_distance must lie between 0 and 31")
    if args.num_proc < 1:
        parser.error("--num_proc must be at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """
    Check a dataset.

    Args:
        argv (`Sequence[str]`, *optional*):
            Options; by default those of the process.

    Returns:
        `int`: 0 or 1, as the epilog of `--help` says.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    logging.getLogger("tgol_trainer.data.checks").setLevel(logging.ERROR)  # the report says the same
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.checking.findings import diagnose
    from tgol_trainer.data import Columns, DataError
    from tgol_trainer.sources import load_scored_dataset

    start = time.monotonic()
    with plain_errors():
        family = _skeleton(args)
        native = family.native_size if family is not None else None
        if args.resolution is not None:
            native = (args.resolution[0], args.resolution[-1])
        num_frames = args.num_frames or (family.num_frames if family is not None else None)
        video = args.video_column or ("video" if num_frames else None)
        if video and not num_frames:
            raise DataError(
                "`--video_column`: how many frames a clip has is not known. Give `--num_frames`, or a model of videos "
                "by `--model_name_or_path`."
            )
        scores = args.score_columns or [args.score_column]
        columns, *_ = [Columns(args.prompt_column, args.image_column, score, video, num_frames) for score in scores]
        hide_local_bars(args.source)
        dataset = load_scored_dataset(
            args.source, name=args.dataset_config, split=args.split, streaming=args.streaming, columns=columns
        )
        disable_progress_bar()  # ours follows
        _refuse_unnamed_videos(dataset, columns, family)
        diagnosis = diagnose(
            dataset,
            columns,
            score_columns=args.score_columns,
            name=args.source,
            resolution=native,
            count_long_prompts=family.count_long_prompts if family is not None else _clip_counter(),
            num_proc=args.num_proc,
            max_distance=args.max_distance,
        )
    code = diagnosis.exit_code(strict=args.strict)
    report = {"source": args.source, "exit_code": code, "seconds": round(time.monotonic() - start, 1)}
    text = json.dumps(_plain(report | diagnosis.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)
    if args.json == Path("-"):
        print(text)
        return code
    for line in _report(diagnosis):
        print(line)
    if args.json is not None:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            raise SystemExit(f"error: `--json`: {args.json} cannot be written: {error}") from error
    return code


def _plain(value: Any) -> Any:
    """Return a value without infinite numbers (of scores beyond 1e150), which JSON does not have."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _refuse_unnamed_videos(dataset: AnyDataset, columns: Columns, family: ModelFamily | None) -> None:
    from datasets import Video

    from tgol_trainer.data import DataError

    features = dataset.features or {}
    if family is None and columns.video is None and columns.image not in features:
        found = next((name for name, feature in features.items() if isinstance(feature, Video)), None)
        if found is not None:
            raise DataError(
                f"The column {found!r} holds videos. Give `--video_column {found} --num_frames N`, N the frames of a "
                "training clip, or a model of videos by `--model_name_or_path`."
            )


def _skeleton(args: argparse.Namespace) -> ModelFamily | None:
    if args.model_name_or_path is None:
        return None
    from tgol_trainer.data import DataError
    from tgol_trainer.families import FamilySettings
    from tgol_trainer.families.skeleton import load_skeleton

    model, settings = args.model_name_or_path, FamilySettings(num_frames=args.num_frames)
    try:
        return load_skeleton(model, revision=args.model_revision, settings=settings)
    except OSError as error:
        raise DataError(
            f"`--model_name_or_path`: configs and tokenizers of {model!r} could not be read: {error}\nCheck the name "
            "and the network; log in with `hf auth login` for a gated model. `--resolution` says without a model what "
            "sizes are compared with."
        ) from error


def _clip_counter() -> Callable[[Sequence[str]], tuple[int, int]] | None:
    """Return what counts prompts beyond the 77 tokens of CLIP, where its tokenizer is on this machine already."""
    from functools import partial

    from huggingface_hub import try_to_load_from_cache

    for repository, file in _CLIP:
        vocabulary = try_to_load_from_cache(repository, file)
        # Without its files transformers makes a tokenizer of two words instead of an error.
        if isinstance(vocabulary, str) and Path(vocabulary).with_name("merges.txt").exists():
            from transformers import CLIPTokenizer

            from tgol_trainer.families.base import count_cut_prompts

            tokenizer = CLIPTokenizer.from_pretrained(Path(vocabulary).parent)
            return partial(count_cut_prompts, limits=[(tokenizer, 77)])
    return None


def _report(diagnosis: Diagnosis) -> list[str]:
    from tgol_trainer.data.rows import CAUSES

    read = counted(diagnosis.num_rows, "row") if diagnosis.num_rows else "no row read"
    lines = [f"{diagnosis.name}: {read}, {diagnosis.num_usable} usable", *_facts(diagnosis.facts)]
    said = set()
    for level, title in _TITLES.items():
        findings = diagnosis.of_level(level)
        lines += ["", title] if findings else []
        for finding in findings:
            first, *others = finding.text.splitlines()
            count = f" ({finding.count})" if finding.count else ""
            lines += [f"- {finding.check}{count}: {first}", *(f"    {line}" for line in others)]
            if finding.remedy and finding.remedy not in said:  # two causes may share one
                said.add(finding.remedy)
                lines += [f"    {line}" for line in finding.remedy.splitlines()]
    problems, warnings = diagnosis.of_level("problem"), diagnosis.of_level("warning")
    lines += ["", f"{counted(len(problems) or 'no', 'problem')}, {counted(len(warnings) or 'no', 'warning')}."]
    if problems and all(finding.check in CAUSES for finding in problems):
        unusable = diagnosis.num_rows - diagnosis.num_usable
        rows = counted(unusable, "unusable row")
        lines[-1] += f" `tgol train --on_bad_sample skip` leaves the {rows} out."
    return lines


def _facts(facts: dict[str, Any]) -> list[str]:
    if not facts:
        return []
    scores, prompts, sizes = facts["scores"], facts["prompts"], facts["sizes"]
    common = ", ".join(f"{size['width']}x{size['height']} ({size['count']})" for size in sizes["most_common"][:3])
    limit = f", at most {prompts['token_limit']} tokens fit" if prompts["token_limit"] else ""
    most = counted(prompts["most_rows_of_one"], "row")
    return [
        *(f"  {'scores' if len(scores) == 1 else column:<7}  {_extent(found)}" for column, found in scores.items()),
        f"  prompts  {prompts['num_distinct']} different, up to {most} each{limit}",
        f"  sizes    {sizes['num_different']} different: {common}{', ...' if sizes['num_different'] > 3 else ''}",
    ]


def _extent(scores: dict[str, Any]) -> str:
    labels = f"; {scores['num_positive']} at or above the threshold" if "threshold" in scores else ""
    extent = f"{scores['min']:g} to {scores['max']:g}, median {scores['median']:g}"
    return f"{extent}, {scores['num_distinct']} different{labels}"
