"""`tgol check`: list what training would refuse in a dataset, what it would warn of, and what is good to know."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .console import FOLDER_SCORES, counted, hide_local_bars, plain_errors, set_up_logging

if TYPE_CHECKING:
    from tgol_trainer.checking.findings import Diagnosis

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
    add = parser.add_argument
    add("source", help="Hub id, folder, or a CSV, JSON Lines or Parquet file")
    add("--split", default="train", help="split to read (default: %(default)s)")
    add("--dataset_config", help="configuration, for a dataset on the Hub that has several")
    add("--folder_scores", action="store_true", help=FOLDER_SCORES)
    add("--streaming", action="store_true", help="read the dataset as a stream, without downloading it first")
    for role in ("prompt", "image", "score"):
        add(f"--{role}_column", default=role, help=f"column of {role}s (default: %(default)s)")
    add("--prompt_syntax", choices=("keep", "strip"), default="keep", help="as in training (default: %(default)s)")
    add("--score_columns", nargs="+", metavar="COLUMN", help="several columns of scores, in place of --score_column")
    add("--video_column", help="column of videos, to read them instead of images")
    add("--num_frames", type=int, help="frames of a training clip (default: the model's)")
    add("--model_name_or_path", help="model to train: Hub id, folder or `shapes`; its token limit and size are used")
    add("--model_revision", help="revision of the model on the Hub")
    text = "training size: a side, or height and width as in 480x832 (default: the model's, or 512)"
    add("--resolution", "-r", type=_resolution, metavar="PIXELS", help=text)
    text = "bits of 256 in which near duplicates may differ; lower it for drawings (default: %(default)s)"
    add("--max_distance", type=int, default=6, help=text)
    add("--num_proc", type=int, default=min(8, os.cpu_count() or 1), help="decoding processes (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the report to this file; `-` prints it instead of text")
    add("--strict", action="store_true", help="exit with 1 for warnings too")
    args = parser.parse_args(argv)
    several = args.score_columns or []
    if several and (args.score_column != "score" or len(set(several)) < len(several)):
        parser.error("--score_columns: name each column once, and leave out --score_column")
    if args.num_frames is not None and args.num_frames < 1:
        parser.error("--num_frames must be at least 1")
    if not 0 <= args.max_distance < 32:
        parser.error("--max_distance must lie between 0 and 31")
    if args.num_proc < 1:
        parser.error("--num_proc must be at least 1")
    return args


def _resolution(text: str) -> int | str | None:
    """Read a size that is written as in training."""
    from tgol_trainer.config import read_resolution

    try:
        return read_resolution(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """
    Check a dataset.

    Args:
        argv (`Sequence[str]`, *optional*): Options; by default those of the process.

    Returns:
        `int`: 0 or 1, as the epilog of `--help` says.
    """
    args = _parse(sys.argv[1:] if argv is None else argv)
    set_up_logging()
    logging.getLogger("tgol_trainer.data.checks").setLevel(logging.ERROR)  # the report says the same
    logging.getLogger("tgol_trainer.sources.image_folder").setLevel(logging.WARNING)
    start = time.monotonic()
    with plain_errors():
        diagnosis = _diagnose(args)
    code = diagnosis.exit_code(strict=args.strict)
    report = {"source": args.source, "exit_code": code, "seconds": round(time.monotonic() - start, 1)}
    text = json.dumps(report | diagnosis.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
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


def _diagnose(args: argparse.Namespace) -> Diagnosis:
    from datasets.utils.logging import disable_progress_bar

    from tgol_trainer.checking.findings import diagnose
    from tgol_trainer.checking.limits import load_limits, refuse_unnamed_videos
    from tgol_trainer.config import check_sides, size_of
    from tgol_trainer.data import Columns, DataError
    from tgol_trainer.sources import load_scored_dataset
    from tgol_trainer.sources.found import found_in

    limits = load_limits(args.model_name_or_path, revision=args.model_revision, num_frames=args.num_frames)
    if args.model_name_or_path is not None:
        check_sides(limits.multiple, limits.max_side, resolution=args.resolution)
    if (size := size_of(args.resolution)) is not None:
        limits = dataclasses.replace(limits, resolution=size)
    video = args.video_column or ("video" if limits.num_frames else None)
    if video and not limits.num_frames:
        raise DataError(
            "`--video_column`: the number of frames of a clip is not known. Give `--num_frames`, or a video model "
            "with `--model_name_or_path`."
        )
    columns, *_ = [
        Columns(
            args.prompt_column,
            args.image_column,
            score,
            video,
            limits.num_frames,
            prompt_syntax=args.prompt_syntax,
        )
        for score in args.score_columns or [args.score_column]
    ]
    hide_local_bars(args.source)
    dataset = load_scored_dataset(
        args.source,
        name=args.dataset_config,
        split=args.split,
        streaming=args.streaming,
        columns=columns,
        folder_scores=args.folder_scores,
    )
    disable_progress_bar()  # ours follows
    if args.model_name_or_path is None and columns.video is None:
        refuse_unnamed_videos(dataset, columns.image)
    diagnosis = diagnose(
        dataset,
        columns,
        score_columns=args.score_columns,
        limits=limits,
        name=args.source,
        num_proc=args.num_proc,
        max_distance=args.max_distance,
    )
    found = found_in(dataset)
    if found is None:
        return diagnosis
    return dataclasses.replace(diagnosis, facts={**diagnosis.facts, "found": found})


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
    lines = [f"  found    {name}: {places}" for name, places in facts.get("found", {}).items()]
    if "scores" not in facts:
        return lines
    scores, prompts, sizes = facts["scores"], facts["prompts"], facts["sizes"]
    common = ", ".join(f"{size['width']}x{size['height']} ({size['count']})" for size in sizes["most_common"][:3])
    common += ", ..." if sizes["num_different"] > 3 else ""
    trained = ", ".join(f"{size['width']}x{size['height']} ({size['count']})" for size in sizes["buckets"][:4])
    limit = f", at most {prompts['token_limit']} tokens fit" if prompts["token_limit"] else ""
    most = counted(prompts["most_rows_of_one"], "row")
    return [
        *lines,
        *(f"  {'scores' if len(scores) == 1 else column:<7}  {_extent(found)}" for column, found in scores.items()),
        f"  prompts  {prompts['num_distinct']} different, up to {most} each{limit}",
        f"  sizes    {sizes['num_different']} different (width x height): {common}",
        f"  buckets  trained at {trained}{', ...' if len(sizes['buckets']) > 4 else ''}",
    ]


def _extent(scores: dict[str, Any]) -> str:
    from tgol_trainer.thresholds import shown

    labels = f"; {scores['num_positive']} at or above the threshold" if "threshold" in scores else ""
    low, high, middle = (shown(scores[name], scores["std"]) for name in ("min", "max", "median"))
    extent = f"{low:g} to {high:g}, median {middle:g}"
    return f"{extent}, {scores['num_distinct']} different{labels}"
