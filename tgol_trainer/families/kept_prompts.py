"""Keep what a pipeline makes of prompts that are sampled again and again, so that its text encoders stay away."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .base import ModelFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def keeps_prompts(family: ModelFamily) -> bool:
    """Return whether the pipeline has an `encode_prompt`; those of aMUSEd and Meissonic encode inside their call."""
    return hasattr(family.pipeline, "encode_prompt")


class KeptPrompts:
    """
    The answers of a pipeline's own `encode_prompt`, kept on the CPU by their question.

    The prompts of a batch are encoded together, as without this, so images are the same to the bit. A pipeline
    without `encode_prompt` has its text encoders on the device at each call.

    Args:
        family ([`ModelFamily`]): The model.
        alone (`bool`):
            Move the denoiser off a GPU while prompts are encoded. DistributedDataParallel's hooks do not survive that.
    """

    def __init__(self, family: ModelFamily, alone: bool) -> None:
        self.family, self.alone = family, alone
        self._kept: dict[str, Any] = {}

    @contextmanager
    def pipeline(self) -> Iterator[DiffusionPipeline]:
        """
        Yield the pipeline for a block that calls it with prompts.

        Everything but the text encoders is on the device. They come for prompts that were not met before.
        """
        family = self.family
        if not keeps_prompts(family):
            with family.whole() as pipeline:
                yield pipeline
            return
        # LTX-2's connectors count as text encoders, and its pipeline calls them outside of `encode_prompt`.
        names = [name for name in family.text_encoder_names if name.startswith("text_encoder")]
        encode = family.pipeline.encode_prompt

        @functools.wraps(encode)
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            question = repr((args, kwargs))
            if question not in self._kept:
                with family.present(*names, alone=self.alone):
                    self._kept[question] = _moved(encode(*args, **kwargs), torch.device("cpu"))
            return _moved(self._kept[question], family.device)

        with family.whole(without=names) as pipeline:
            pipeline.encode_prompt = encode_prompt
            try:
                yield pipeline
            finally:
                del pipeline.encode_prompt


def _moved(answer: Any, device: torch.device) -> Any:
    """Return tensors on a device, inside tuples and lists as they came."""
    if isinstance(answer, tuple | list):
        return type(answer)(_moved(each, device) for each in answer)
    return answer.to(device) if isinstance(answer, torch.Tensor) else answer
