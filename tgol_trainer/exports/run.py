"""Run one export: load the trained model, write it, read it back into a fresh model, compare both, write the card."""

from __future__ import annotations

import dataclasses
import datetime
import gc
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from tgol_trainer import adapters
from tgol_trainer._files import settle
from tgol_trainer.families import ModelFamily, ModelOrigin
from tgol_trainer.saving.card import CardFacts, ExportRow, write_card
from tgol_trainer.saving.comfyui import layout_of
from tgol_trainer.saving.sharing import comfyui_name, in_other_program

from .checks import TOLERANCE, Trained, check_modules, check_state, measure_and_round, observe, record_differences
from .formats import (
    read_comfyui,
    read_diffusers,
    read_peft,
    set_strength,
    write_comfyui,
    write_diffusers,
    write_merged,
    write_peft,
)
from .source import Source, check_directory, check_fits, find_base, folder_facts, in_float32

logger = logging.getLogger(__name__)

FORMATS = ("diffusers", "peft", "comfyui", "merged")


def export(
    directory: str | Path,
    output_dir: str | Path,
    export_format: str,
    *,
    model_name_or_path: str | None = None,
    weight: float = 1.0,
    dtype: torch.dtype = torch.float32,
    model_init_kwargs: dict[str, Any] | None = None,
    device: str = "cpu",
) -> ExportRow:
    """
    Write trained weights in another format, load that into a fresh model, and compare it with the trained one.

    Args:
        directory (`str` or `Path`): `output_dir` of a run, or one of its checkpoints.
        output_dir (`str` or `Path`):
            New or empty folder for the export and its card. For `"comfyui"` it may be `directory` itself.
        export_format (`str`):
            `"diffusers"` (for `pipe.load_lora_weights`), `"peft"` (for `PeftModel.from_pretrained`), `"comfyui"` (one
            file for `models/loras`) or `"merged"` (a complete pipeline that needs no PEFT).
        model_name_or_path (`str`, *optional*): Base model. The default is the one that the folder's card records.
        weight (`float`, *optional*, defaults to 1.0): Strength of the adapter, as in diffusers' `set_adapters`.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`):
            Dtype of the exported weights. The comparison runs in float32, with the weights rounded to this dtype.
        model_init_kwargs (`dict`, *optional*): Arguments for loading the base model, as in [`TGOLConfig`].
        device (`str`, *optional*, defaults to `"cpu"`): Device of the comparison.

    Returns:
        [`card.ExportRow`]: the results of the checks, and the differences that were measured.

    Raises:
        ValueError: if the format does not exist for this model, or arguments contradict each other.
        FileNotFoundError: if the folder holds no trained weights.
        FileExistsError: if `output_dir` is not empty.
        ExportError: if the model read back is not the trained one.
    """
    directory, output_dir = Path(directory), Path(output_dir)
    check_directory(directory)
    if export_format not in FORMATS:
        raise ValueError(f"`format` is {export_format!r}; it must be one of {', '.join(FORMATS)}.")
    _check_target(directory, output_dir, export_format)
    if dtype not in TOLERANCE:
        raise ValueError(f"`dtype` is {dtype}; it must be torch.float32, torch.float16 or torch.bfloat16.")
    facts = folder_facts(directory)
    model, options = find_base(directory, facts, model_name_or_path, dict(model_init_kwargs or {}))
    source = Source(directory, facts, model, options, dtype, export_format == "merged", device)
    if not source.is_adapter and (export_format != "merged" or weight != 1.0):
        raise ValueError(
            f"{directory} holds a whole fine-tuned denoiser and no adapter. It can only be exported with "
            "`format='merged'` and `weight=1`."
        )
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    # A draft beside the target, so that an export that fails leaves nothing.
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as draft:
        folder = Path(draft)
        row, exported = _export(source, folder, export_format, weight)
        output_dir.mkdir(exist_ok=True)
        settle(folder)
        for path in folder.iterdir():
            path.replace(output_dir / path.name)
    if output_dir.resolve() == directory.resolve():
        others = [other for other in facts.exports if other.files != row.files]
        write_card(dataclasses.replace(facts, exports=[*others, row]), output_dir)
        return row
    for image in exported.pictures:
        (output_dir / image.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(directory / image.path, output_dir / image.path)
    write_card(dataclasses.replace(exported, exports=[row]), output_dir)
    return row


def _export(source: Source, folder: Path, export_format: str, weight: float) -> tuple[ExportRow, CardFacts]:
    """Write the files into a folder and read them back. Return the result and the facts of the export's card."""
    prompt = source.facts.example_prompt or "a photo"
    family = source.load_base()
    if export_format == "comfyui":
        layout_of(type(family.pipeline).__name__)  # raises, before the long part, if there is none
    base_output = family.probe().float().cpu()
    family = _load_trained(family, source, weight)
    trained = measure_and_round(family, base_output, prompt, torch.float32 if source.rounds_base else source.dtype)
    if trained.effect == 0:
        logger.warning("The weights in %s do not change the base model's output.", source.directory)
    name = comfyui_name(source.facts.model_name or source.directory.resolve().name)
    facts = _facts(source, family, export_format, prompt)
    origin = family.origin
    if export_format == "comfyui":
        write_comfyui(family, folder / name)
    elif export_format == "merged":
        write_merged(family, folder, source)
    else:
        (write_diffusers if export_format == "diffusers" else write_peft)(family, folder, weight)
    note = _note(family, export_format, name)
    del family
    gc.collect()
    row = ExportRow(
        format=export_format,
        files=sorted(path.name for path in folder.iterdir()),
        dtype=str(source.dtype).removeprefix("torch."),
        weight=weight,
        note=note,
    )
    fresh = _read_back(row, source, folder, origin, trained)
    record_differences(row, observe(fresh, prompt), trained, source.dtype, rounds_base=source.rounds_base)
    return row, facts


def _load_trained(family: ModelFamily, source: Source, weight: float) -> ModelFamily:
    name = family.denoiser_name
    if source.is_adapter:
        check_fits(source, family)
        adapters.load_initial(family.pipeline, name, str(source.directory), keep_as_reference=False)
        set_strength(family, weight)
        return family
    folder = source.directory / name
    if not folder.is_dir():
        raise ValueError(
            f"{type(family.pipeline).__name__} trains its {name}, but {source.directory} holds no folder of that "
            "name. These weights belong to another base model: name it with `model_name_or_path`."
        )
    denoiser = type(family.denoiser).from_pretrained(str(folder))
    setattr(family.pipeline, name, denoiser.to(source.device))
    return type(family)(family.pipeline, family.origin, family.settings)


def _read_back(row: ExportRow, source: Source, folder: Path, origin: ModelOrigin, trained: Trained) -> ModelFamily:
    """Return a fresh model with the export in it. Write into the row which weights matched."""
    if row.format == "merged":
        return source.load_exported(folder, origin)
    exact = source.dtype == torch.float32
    if row.format == "comfyui":
        family, modules, row.num_tensors = read_comfyui(source, folder / row.files[0])
        row.weights_equal = check_modules(modules, trained) and exact
        return family
    family, state = (read_diffusers if row.format == "diffusers" else read_peft)(source, folder)
    row.weights_equal, row.num_tensors = check_state(state, trained) and exact, len(state)
    return in_float32(family)


def _note(family: ModelFamily, export_format: str, name: str) -> str | None:
    """Return what the card says of an export: how it is used, and what the other program would make of it."""
    if export_format == "diffusers":
        return in_other_program(family, "diffusers")
    if export_format != "comfyui":
        return None
    base = "the base model's file for low noise" if family.denoiser_name == "transformer_2" else "the base model"
    return (
        f"copy {name} into ComfyUI's folder models/loras and load it onto {base} with the node "
        "LoraLoaderModelOnly at strength 1. Its names were compared with those of ComfyUI's loader, converted back, "
        "and applied by the formulas of that loader. ComfyUI itself was not run. "
        + in_other_program(family, "comfyui")
    )


def _facts(source: Source, family: ModelFamily, export_format: str, prompt: str) -> CardFacts:
    """Return the facts of the export's card: the run's facts, with the snippet of this format."""
    facts, origin = source.facts, family.origin
    snippets = {"diffusers": family.usage, "peft": family.peft_usage, "merged": family.merged_usage}
    return dataclasses.replace(
        facts,
        base_model=facts.base_model or origin.hub_id,
        base_model_revision=facts.base_model_revision or origin.revision,
        base_model_note=facts.base_model_note or origin.note,
        pipeline_class=type(family.pipeline).__name__,
        pipeline_tag=family.pipeline_tag,
        merged=export_format == "merged",
        files=[],
        usage=snippets[export_format](".", prompt) if export_format in snippets else "",
        pictures=[image for image in facts.pictures if (source.directory / image.path).is_file()],
        created=datetime.date.today().isoformat(),
    )


def _check_target(directory: Path, output_dir: Path, export_format: str) -> None:
    beside = export_format == "comfyui" and output_dir.resolve() == directory.resolve()
    if output_dir.exists() and not beside and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"`output_dir` {output_dir} exists and is not empty: name a new folder.")
