"""`tgol plan`: predict what a run takes from configs alone, and say with which flags it fits a card."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl import TrlParser

from tgol_trainer.config import TGOLConfig

from .console import plain_errors, set_up_logging
from .model import ModelArguments, planned_setup
from .recipes import parse_flags
from .train import SampleArguments, TrainArguments

if TYPE_CHECKING:
    from tgol_trainer.planning import Card, Fit, Phase, Prediction

_GIB = 2**30
_ROWS = ("denoiser", "adapter", "reference", "optimizer", "text encoders", "autoencoder")


@dataclass
class PlanArguments:
    """What `tgol plan` takes beside the flags and settings files of `tgol train`."""

    vram: float | None = field(
        default=None, metadata={"help": "Memory of the card in GiB. None: that of --card, or of this machine's card."}
    )
    card: str | None = field(
        default=None,
        metadata={
            "help": "Card whose memory and published rate are used: 3090, 4090, l4, a10, l40s, a100-40, a100, h100, "
            "h200. None: this machine's, if it has one."
        },
    )
    num_images: int = field(default=10_000, metadata={"help": "Images of the dataset, for the size of the cache."})
    num_prompts: int = field(default=10_000, metadata={"help": "Different prompts, for the size of the cache."})
    json: str | None = field(
        default=None, metadata={"help": "Also write the plan to this file; `-` prints it instead of text."}
    )


def main(argv: Sequence[str] | None = None) -> int:
    """
    Plan a run.

    Args:
        argv (`Sequence[str]`, *optional*): A model and flags, `--config file.yaml` among them; by default those of the
            process.

    Returns:
        `int`: 0, or 1 if nothing that was tried fits.
    """
    set_up_logging()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and not arguments[0].startswith("-"):
        arguments[:1] = ["--model_name_or_path", arguments[0]]
    parser = TrlParser(
        (PlanArguments, TrainArguments, TGOLConfig, ModelArguments, SampleArguments),
        prog="tgol plan",
        usage="tgol plan [MODEL] [--vram GIB] [--card CARD] [flags of tgol train]",
    )
    # What fits does not depend on this machine's device.
    plan, script, training, model, _ = parse_flags(parser, [*arguments, "--use_cpu", "true"])
    from diffusers.utils import logging as diffusers_logging

    from tgol_trainer import planning

    diffusers_logging.set_verbosity_error()  # SDXL's autoencoder is turned into float32 on purpose
    card = _card(plan)
    with plain_errors():
        first = planning.predict(planned_setup(script, training, model))
        found = planning.fit(first, card.memory, accepts=lambda size: _accepts(training, size)) if card else None
    text = json.dumps(_to_dict(plan, first, card, found), indent=2)
    if plan.json == "-":
        print(text)
    else:
        print("\n".join(_report(plan, first, card, found)))
        if plan.json:
            Path(plan.json).write_text(text + "\n", encoding="utf-8")
    return 0 if found is None or found.fits else 1


def _card(plan: PlanArguments) -> Card | None:
    from tgol_trainer.planning import CARDS, Card, found_card

    if plan.card is not None and plan.card.lower() not in CARDS:
        raise SystemExit(f"error: --card: {plan.card!r} is not known; known are {', '.join(CARDS)}. Or give --vram.")
    card = CARDS[plan.card.lower()] if plan.card else found_card()
    if plan.vram is None:
        return card
    if plan.vram <= 0:
        raise SystemExit(f"error: --vram: {plan.vram} is not a number of GiB above 0.")
    rate = card.rate if plan.card and card else None
    return Card(card.name if plan.card and card else "the card", int(plan.vram * _GIB), rate)


def _accepts(training: TGOLConfig, size: int) -> bool:
    try:
        training.check_method(size)
    except ValueError:
        return False
    return True


# ---- Output ----


def _to_dict(plan: PlanArguments, first: Prediction, card: Card | None, found: Fit | None) -> dict[str, Any]:
    result: dict[str, Any] = {"asked": _numbers(plan, first, card)}
    if card is not None and found is not None:
        result |= {"card": {"name": card.name, "memory": card.memory}, "fits": found.fits, "flags": found.flags}
        result["planned"] = _numbers(plan, found.prediction, card)
    return result


def _numbers(plan: PlanArguments, prediction: Prediction, card: Card | None) -> dict[str, Any]:
    setup, step = prediction.setup, prediction.step
    phases = {name: phase for name, phase in _phases(prediction).items() if phase is not None}
    seconds = prediction.update_seconds(card) if card else None
    return {
        "model": str(setup.model),
        "pipeline": prediction.pipeline,
        "height": prediction.size[0],
        "width": prediction.size[1],
        "num_frames": prediction.num_frames,
        "batch_size": setup.batch_size,
        "accumulation": setup.accumulation,
        "num_trained": prediction.num_trained,
        "bytes": {
            name: {**phase.resident, "working": phase.working, "tensors": phase.tensors, "total": phase.total}
            for name, phase in phases.items()
        },
        "activations": step.activations,
        "gradients": step.gradients,
        "flops_per_update": step.flops * setup.accumulation,
        "seconds_per_update": list(seconds) if seconds else None,
        "cache_bytes": _cache_bytes(plan, prediction),
    }


def _phases(prediction: Prediction) -> dict[str, Phase | None]:
    return {"encoding": prediction.encoding, "training": prediction.training, "sampling": prediction.sampling}


def _cache_bytes(plan: PlanArguments, prediction: Prediction) -> int:
    return plan.num_images * prediction.bytes_per_image + plan.num_prompts * prediction.bytes_per_prompt


def _report(plan: PlanArguments, first: Prediction, card: Card | None, found: Fit | None) -> list[str]:
    lines = _table(first, card)
    medium = "images" if first.num_frames is None else "clips"
    if first.encoding is not None:
        number, disk = f"{plan.num_images:,} {medium} and {plan.num_prompts:,} prompts", _cache_bytes(plan, first)
        lines += ["", f"Cache of {number}: {_size(disk)} on disk, at most."]
    if card is None or found is None:
        return [*lines, "", "Give --vram or --card to know whether it fits, and with which flags."]
    if not found.flags:
        return [*lines, *_seconds(found.prediction, card), "", f"It fits {card.name} as it is."]
    flags = " ".join(f"--{name} {value}" for name, value in found.flags.items())
    needed = f"{_size(found.prediction.needed)} of {_size(card.memory)}"
    if found.fits:
        lines += ["", f"It fits {card.name} with these flags ({needed}):", f"    {flags}"]
        return lines + _seconds(found.prediction, card)
    return [*lines, "", f"Nothing that was tried fits {card.name}. The least, {needed}, takes:", f"    {flags}"]


def _seconds(prediction: Prediction, card: Card) -> list[str]:
    seconds = prediction.update_seconds(card)
    if seconds is None:
        return []
    low, high = (f"{each:.0f}" if each >= 10 else f"{each:.2g}" for each in seconds)
    return [f"An update takes {low} to {high} s, an estimate from the card's published rate."]


def _table(prediction: Prediction, card: Card | None) -> list[str]:
    setup, step, (height, width) = prediction.setup, prediction.step, prediction.size
    frames = f", {prediction.num_frames} frames" if prediction.num_frames else ""
    kind = f"LoRA r {setup.lora.r}" if setup.lora else "all weights"
    batch = f"batch {setup.batch_size}" + (f" x {setup.accumulation}" if setup.accumulation > 1 else "")
    saving = ", gradient checkpointing" if setup.checkpointing else ""
    phases = {name: phase for name, phase in _phases(prediction).items() if phase is not None}
    names = [name for name in _ROWS if any(name in phase.resident for phase in phases.values())]

    def row(name: str, values: Sequence[int | None]) -> str:
        return f"  {name:<34}" + "".join(f"{_size(value) if value is not None else '-':>12}" for value in values)

    lines = [
        f"{setup.model}: {prediction.pipeline}, {height}x{width}{frames}, {setup.main_dtype}{setup.stored}",
        f"{kind} ({prediction.num_trained / 1e6:,.1f} M trained), {batch}{saving}, {setup.optimizer}",
        "",
        f"  {'memory of the device':<34}" + "".join(f"{name:>12}" for name in phases),
        *(row(name, [phase.resident.get(name) for phase in phases.values()]) for name in names),
        row("working memory", [phase.working for phase in phases.values()]),
        row("context, slack (estimate)", [phase.total - phase.tensors for phase in phases.values()]),
        row("together", [phase.total for phase in phases.values()]),
    ]
    if card is not None:
        verdicts = ("fits" if phase.total <= card.memory else "too much" for phase in phases.values())
        lines.append(f"  {'of ' + _size(card.memory):<34}" + "".join(f"{text:>12}" for text in verdicts))
    kept = f"activations {_size(step.activations)}, gradients {_size(step.gradients)}"
    lines += ["", f"  In training, a pass of {setup.batch_size} keeps {kept}."]
    lines.append(f"  Sampling is for {setup.sampling_batch} at once (--per_device_eval_batch_size).")
    return lines


def _size(number: int) -> str:
    for unit, factor in (("GiB", _GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:,.1f} {unit}" if unit == "GiB" else f"{number / factor:,.0f} {unit}"
    return f"{number} B"
