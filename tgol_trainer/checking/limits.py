"""Find out what a model takes, from its configs and tokenizers alone: resolution, frames, length of prompts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets

from tgol_trainer.data.images import DataError

# Where a CLIP tokenizer often lies on a machine that has run diffusers: (repository, vocabulary).
_CLIP = (
    ("openai/clip-vit-large-patch14", "vocab.json"),
    ("stable-diffusion-v1-5/stable-diffusion-v1-5", "tokenizer/vocab.json"),
    ("openai/clip-vit-base-patch32", "vocab.json"),
)

CountLongPrompts = Callable[[Sequence[str]], tuple[int, int]]
"""Prompts to (how many are cut, the limit in tokens), as `ModelFamily.count_long_prompts`."""


@dataclasses.dataclass(frozen=True)
class ModelLimits:
    """
    What a model takes.

    Args:
        resolution (`tuple[int, int]`, *optional*):
            (height, width) in pixels that will be trained on. Without it sizes are compared with 512 x 512, and what
            does not fit is a note.
        num_frames (`int`, *optional*): Frames of a training clip; `None` for images.
        count_long_prompts (`Callable`, *optional*):
            Counts prompts that the text encoder cuts, such as `ModelFamily.count_long_prompts`. Without it they are
            not counted, and a note says so.
        multiple (`int`, *optional*, defaults to 8): Sides of training images are multiples of it.
        max_side (`int`, *optional*): The longest side that the model takes.
    """

    resolution: tuple[int, int] | None = None
    num_frames: int | None = None
    count_long_prompts: CountLongPrompts | None = None
    multiple: int = 8
    max_side: int | None = None


def load_limits(model: str | None, *, revision: str | None = None, num_frames: int | None = None) -> ModelLimits:
    """
    Return the limits of a model; no weights are loaded.

    Args:
        model (`str`, *optional*):
            Hub id or folder of a diffusers pipeline, `"shapes"` or `"shapes-masked"`. Without a model, prompts are
            counted with the 77 tokens of CLIP if a CLIP tokenizer is on this machine.
        revision (`str`, *optional*): Revision on the Hub.
        num_frames (`int`, *optional*): Frames of a training clip, in place of the model's own number.

    Returns:
        [`ModelLimits`]

    Raises:
        DataError: if configs or tokenizers cannot be read.
    """
    if model is None:
        return ModelLimits(num_frames=num_frames, count_long_prompts=_clip_counter())
    from tgol_trainer.families import FamilySettings
    from tgol_trainer.families.skeleton import load_skeleton

    try:
        family = load_skeleton(model, revision=revision, settings=FamilySettings(num_frames=num_frames))
    except OSError as error:
        raise DataError(
            f"`--model_name_or_path`: configs and tokenizers of {model!r} could not be read: {error}\nCheck the name "
            "and the network; log in with `hf auth login` for a gated model. Without a model, `--resolution` sets the "
            "size that images are compared with."
        ) from error
    return ModelLimits(
        resolution=family.native_size,
        num_frames=num_frames or family.num_frames,
        count_long_prompts=family.count_long_prompts,
        multiple=family.resolution_multiple,
        max_side=family.max_side,
    )


def _clip_counter() -> CountLongPrompts | None:
    """Return what counts prompts of more than 77 tokens, if a CLIP tokenizer is in the Hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    for repository, file in _CLIP:
        vocabulary = try_to_load_from_cache(repository, file)
        # Without its files transformers makes a tokenizer of two words instead of an error.
        if isinstance(vocabulary, str) and Path(vocabulary).with_name("merges.txt").exists():
            from transformers import CLIPTokenizer

            from tgol_trainer.families.prompts import count_cut_prompts

            tokenizer = CLIPTokenizer.from_pretrained(Path(vocabulary).parent)
            return functools.partial(count_cut_prompts, limits=[(tokenizer, 77)])
    return None


def refuse_unnamed_videos(dataset: datasets.Dataset | datasets.IterableDataset, image_column: str) -> None:
    """Raise a `DataError` that names the options for videos, if there are videos but no column of images."""
    features = dataset.features or {}
    found = next((name for name, feature in features.items() if isinstance(feature, datasets.Video)), None)
    if found is not None and image_column not in features:
        raise DataError(
            f"The column {found!r} holds videos. Give `--video_column {found} --num_frames N`, where N is the number "
            "of frames of a training clip, or give a video model with `--model_name_or_path`."
        )
