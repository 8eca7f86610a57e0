"""Look for settings with which a run fits a card: the nearest to those that were asked for."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

import torch

from tgol_trainer.families import FROZEN_DTYPE
from tgol_trainer.shapes import embedded_model

from .memory import CONTEXT, Prediction, predict, weights_alone
from .networks import Setup
from .quantized import Quantization

logger = logging.getLogger(__name__)

_SMALLER = (0.75, 0.5)
"""Shares of each side that are tried as a smaller resolution."""


@dataclasses.dataclass(frozen=True)
class Fit:
    """
    What fits, or the least that was found.

    Args:
        prediction ([`Prediction`]): Of that setup.
        flags (`dict[str, str]`): Flags of `tgol train` that differ from what was asked for.
        fits (`bool`): Whether it fits.
    """

    prediction: Prediction
    flags: dict[str, str]
    fits: bool


def fit(first: Prediction, memory: int, *, accepts: Callable[[int], bool] = lambda size: True) -> Fit:
    """
    Find settings that fit, in this order: as asked for; gradient checkpointing; smaller batches with accumulation.

    Where the smallest batch does not fit either, the same again with weights in bfloat16, then with the blocks stored
    in 8 bits, then with the denoiser in 4 bits, then with its blocks on the CPU, then at three quarters and at half of
    the resolution. Text encoders that do not fit by themselves are tried in 4 bits. Sampling is left out of what is
    tried.

    Args:
        first ([`Prediction`]): What was asked for.
        memory (`int`): Bytes of the card.
        accepts (`Callable[[int], bool]`, *optional*): Whether training takes a batch of so many rows.

    Returns:
        [`Fit`]
    """
    if first.needed <= memory:
        return Fit(first, {}, fits=True)
    asked, least = first.setup, first
    sizes = [size for size in range(asked.batch_size, 0, -1) if not asked.batch_size % size and accepts(size)]
    bases = list(_bases(first, memory))
    for base in bases:
        if base is not bases[-1] and weights_alone(base) > memory:
            continue
        smallest = _predict(_with_batch(base, sizes[-1]))
        least = min(least, smallest, key=lambda each: each.needed)
        if smallest.needed > memory:
            continue
        for size in sizes:
            found = smallest if size == sizes[-1] else _predict(_with_batch(base, size))
            if found.needed <= memory:
                return Fit(found, _flags(first, found), fits=True)
    return Fit(least, _flags(first, least), fits=False)


def refusal(prediction: Prediction, memory: int) -> str | None:
    """
    Say why a run cannot fit a card, or return `None` where it may.

    Only tensors count, not what is estimated. Prompts are as long as the model takes them: where short prompts are
    kept short, a run with them may fit a card that this refuses.

    Args:
        prediction ([`Prediction`]): Of the run.
        memory (`int`): Bytes of the card.
    """
    for name, phase in (("Encoding", prediction.encoding), ("Training", prediction.training)):
        if phase is not None and phase.tensors > memory:
            needed, there = (f"{size / 2**30:.1f} GiB" for size in (phase.tensors, memory))
            return f"{name} takes {needed} with prompts of full length, and the card has {there}"
    return None


def _bases(first: Prediction, memory: int) -> Iterator[Setup]:
    """Yield setups to try with ever smaller batches, the nearest to what was asked for first."""
    asked, multiple = dataclasses.replace(first.setup, sampling_batch=0), first.multiple
    if first.encoding is not None and first.encoding.resident.get("text encoders", 0) + CONTEXT > memory:
        asked = dataclasses.replace(asked, text_encoders_in_4bit=not embedded_model(asked.model))
    sizes = [first.size]
    for share in _SMALLER:
        height, width = (max(round(side * share / multiple), 1) * multiple for side in first.size)
        if (height, width) != sizes[-1]:
            sizes.append((height, width))
    for size in sizes:
        base = dataclasses.replace(asked, resolution=size, checkpointing=True)
        yield base
        if asked.lora is None or asked.quantization is not None or embedded_model(asked.model):
            continue  # weights that are trained stay as they are, and an embedded model is what it is
        if asked.dtype == "float32":
            base = dataclasses.replace(base, dtype="bfloat16")
            yield base
        if not asked.lora.use_dora:
            half = base.dtype if base.dtype in ("bfloat16", "float16") else "bfloat16"  # what 4-bit layers compute in
            quantization = Quantization(4, double=True, compute_dtype=getattr(torch, half))
            dtype = half if base.dtype == FROZEN_DTYPE else base.dtype
            if not (asked.group_offload or asked.storage_dtype):  # neither goes with 4 bits
                yield dataclasses.replace(base, storage_dtype="float8_e4m3fn")
                yield dataclasses.replace(base, dtype=dtype, quantization=quantization)
            if not asked.group_offload:
                yield dataclasses.replace(base, group_offload=True)


def _with_batch(base: Setup, size: int) -> Setup:
    return dataclasses.replace(base, batch_size=size, accumulation=base.accumulation * base.batch_size // size)


def _predict(setup: Setup) -> Prediction:
    height, width = setup.resolution or (0, 0)
    logger.info("Trying batches of %d, %dx%d, %s%s", setup.batch_size, height, width, setup.main_dtype, setup.stored)
    return predict(setup)


def _flags(first: Prediction, found: Prediction) -> dict[str, str]:
    asked, setup, flags = first.setup, found.setup, {}
    if setup.checkpointing != asked.checkpointing:
        flags["activation_checkpointing"] = "true"
    if setup.batch_size != asked.batch_size:
        flags["per_device_train_batch_size"] = str(setup.batch_size)
        flags["gradient_accumulation_steps"] = str(setup.accumulation)
    quantised = setup.quantization != asked.quantization
    if setup.dtype != asked.dtype or (quantised and not isinstance(asked.dtype, str)):
        flags["dtype"] = setup.main_dtype if isinstance(setup.dtype, str) else "bfloat16"
    if setup.storage_dtype != asked.storage_dtype:
        flags["storage_dtype"] = str(setup.storage_dtype)
    if setup.group_offload != asked.group_offload:
        flags["group_offload"] = "true"
    if quantised:
        flags |= {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": "true"}
    if setup.text_encoders_in_4bit != asked.text_encoders_in_4bit:
        flags["text_encoders_in_4bit"] = "true"
    if found.size != first.size:
        height, width = found.size
        flags["resolution"] = str(height) if height == width else f"{height}x{width}"
    return flags
