"""Generate images and videos with fixed seeds from any diffusers pipeline, and leave the pipeline as it was."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

_THINGS = {"images": "image", "frames": "video"}
"""Attribute of a pipeline's output to what one prompt gives."""
ONE_BY_ONE = ("HunyuanVideo15Pipeline",)
"""Pipelines whose batches fail: the attention of this one's autoencoder takes a single video."""


def generate_images(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 8,
    progress: bool = True,
    description: str = "Generating",
    **sampling: Any,
) -> list[Image.Image]:
    """
    Generate one image per prompt, each from its own seed.

    Prompts are taken in fixed chunks of `batch_size`, so the same call gives the same images; another `batch_size`
    may move a pixel by a grey level. Runs without gradients and with every module of the pipeline in eval mode.
    Afterwards training flags, scheduler, progress-bar settings and the global random state are as before, also when
    the pipeline raises.

    Args:
        pipeline (`DiffusionPipeline`): Any text-to-image pipeline.
        prompts (`Sequence[str]`): One prompt per image.
        seeds (`Sequence[int]`):
            One seed per image, for a generator on the CPU, so that images do not depend on the kind of device.
        batch_size (`int`, *optional*, defaults to 8):
            Images per call of the pipeline; always one for a pipeline that takes no list of generators (aMUSEd).
        progress (`bool`, *optional*, defaults to `True`):
            Show one bar over all images instead of the pipeline's bar for each batch.
        description (`str`, *optional*, defaults to `"Generating"`): Text in front of that bar.
        sampling (`Any`):
            Arguments of the pipeline's call, such as `num_inference_steps`, `guidance_scale`, `height` and `width` in
            pixels. `None` leaves the pipeline's own default.

    Returns:
        `list[PIL.Image.Image]`: image `i` belongs to prompt `i` and seed `i`.

    Raises:
        ValueError: if there are no prompts, if the numbers of prompts and seeds differ, if `batch_size` is below 1,
            or if the pipeline returned NaN.
        TypeError: if the pipeline returns no images, as a video pipeline does, or does not know an argument.
    """
    bar = tqdm(total=len(prompts), desc=description, unit="image", disable=not progress)
    arrays = _generate(pipeline, prompts, seeds, batch_size, sampling, "images", bar)
    return [image for chunk in arrays for image in pipeline.numpy_to_pil(chunk)]


def generate_videos(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 1,
    progress: bool = True,
    description: str = "Generating",
    **sampling: Any,
) -> list[list[Image.Image]]:
    """
    Generate one video per prompt, each from its own seed, with the guarantees of [`generate_images`].

    Args:
        pipeline (`DiffusionPipeline`): Any text-to-video pipeline.
        batch_size (`int`, *optional*, defaults to 1): Videos per call of the pipeline.
        sampling (`Any`):
            As in [`generate_images`], and `num_frames`. A number of frames that the pipeline rounds, as Wan does with
            what is not 4·k + 1, is an error.
        prompts, seeds, progress, description: As in [`generate_images`].

    Returns:
        `list[list[PIL.Image.Image]]`: the frames of video `i` belong to prompt `i` and seed `i`.

    Raises:
        ValueError: as [`generate_images`], or if the pipeline returned another number of frames.
        TypeError: if the pipeline returns no videos, as an image pipeline does, or does not know an argument.
    """
    bar = tqdm(total=len(prompts), desc=description, unit="video", disable=not progress)
    arrays = _generate(pipeline, prompts, seeds, batch_size, sampling, "frames", bar)
    videos = [_frames(video) for chunk in arrays for video in chunk]
    num_frames = sampling.get("num_frames")
    if num_frames is not None and len(videos[0]) != num_frames:
        raise ValueError(
            f"{type(pipeline).__name__} was asked for {num_frames} frames and made {len(videos[0])}: ask for "
            f"`num_frames={len(videos[0])}`, or for a number of the form that the model takes."
        )
    return videos


def makes_videos(pipeline: Any) -> bool:
    """Return whether a pipeline makes videos: whether its call takes a number of frames."""
    return _frames_argument(pipeline) is not None


def takes_negative_prompts(pipeline: Any) -> bool:
    """Return whether guidance of a pipeline can lead away from a prompt."""
    return "negative_prompt" in inspect.signature(type(pipeline).__call__).parameters


def _frames_argument(pipeline: Any) -> str | None:
    """Return what a pipeline calls the number of frames; `None` for one of images."""
    known = inspect.signature(type(pipeline).__call__).parameters
    return next((name for name in ("num_frames", "frames") if name in known), None)  # Sana-Video has the second


def _frames(video: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in (video * 255).round().astype(np.uint8)]


def _generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    sampling: dict[str, Any],
    kind: str,
    bar: tqdm,
) -> list[np.ndarray]:
    """Return one array of values in 0..1 per chunk, from the output's `images` or `frames`."""
    if isinstance(prompts, str):
        raise TypeError(f"`prompts` is one string; pass a list with one prompt per {_THINGS[kind]}.")
    if len(prompts) == 0:
        raise ValueError("There are no prompts: pass at least one.")
    if len(prompts) != len(seeds):
        raise ValueError(f"There are {len(prompts)} prompts and {len(seeds)} seeds: pass one seed per prompt.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    given = {name: value for name, value in sampling.items() if value is not None}
    if not _takes_generators(pipeline) or type(pipeline).__name__ in ONE_BY_ONE:
        batch_size = 1
    arrays: list[np.ndarray] = []
    with bar, _pipeline_for_sampling(pipeline), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            arrays.append(_generate_chunk(pipeline, list(prompts[chunk]), list(seeds[chunk]), start, given, kind))
            bar.update(len(arrays[-1]))
    return arrays


def _takes_generators(pipeline: Any) -> bool:
    """Return whether a pipeline takes one generator per image; aMUSEd and Meissonic take a single one."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("generator")
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return True
    return "list" in str(parameter.annotation).lower()


def _generate_chunk(
    pipeline: Any, prompts: list[str], seeds: list[int], start: int, sampling: dict[str, Any], kind: str
) -> np.ndarray:
    if "num_frames" in sampling and (name := _frames_argument(pipeline)):
        sampling = {name if option == "num_frames" else option: value for option, value in sampling.items()}
    schedule = inspect.signature(type(pipeline).__call__).parameters.get("guidance_schedule")
    if schedule is not None and sampling.keys() & {"guidance_scale", "num_inference_steps"}:
        # Ideogram 4 has a scale for each of its default steps, and takes one scale for another number of them.
        sampling = {"guidance_scale": schedule.default[0], **sampling, "guidance_schedule": None}
    if (negative := sampling.get("negative_prompt")) is not None:
        sampling = {**sampling, "negative_prompt": [negative] * len(prompts)}  # some pipelines take a list alone
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    with _private_random_state(int(seeds[0])):
        output = pipeline(
            prompt=prompts,
            # A pipeline that takes a list treats a single generator alike, and the others take no list.
            generator=generators if len(generators) > 1 else generators[0],
            # Rounding to 8 bits turns NaN into black, so it is done here, after the check.
            output_type="np",
            **sampling,
        )
    held = next((name for name in (kind, _THINGS[kind]) if hasattr(output, name)), None)  # Kandinsky 5: `image`
    if held is None:
        raise TypeError(
            f"{type(pipeline).__name__} returned {type(output).__name__}, which holds no {_THINGS[kind]}s."
        )
    arrays = np.asarray(getattr(output, held))
    broken = np.flatnonzero(np.isnan(arrays).reshape(len(arrays), -1).any(axis=1))
    if broken.size:
        first = int(broken[0])
        raise ValueError(
            f"{type(pipeline).__name__} returned NaN, which would be saved as a black {_THINGS[kind]}, for "
            f"{broken.size} of {len(prompts)} prompts; the first is prompt {start + first}, {prompts[first]!r:.80}. "
            "Half precision is the usual reason (load the VAE in float32, or use bfloat16), else weights that "
            "diverged in training."
        )
    return arrays


@contextlib.contextmanager
def _pipeline_for_sampling(pipeline: Any) -> Iterator[None]:
    """Put the modules in eval mode, hide the pipeline's bars and give it a fresh scheduler; undo all of it after."""
    modules = [component for component in pipeline.components.values() if isinstance(component, torch.nn.Module)]
    was_training = [(module, module.training) for root in modules for module in root.modules()]
    scheduler = getattr(pipeline, "scheduler", None)
    # diffusers has no getter for this; the attribute is missing until the setter was called.
    bar_config = dict(getattr(pipeline, "_progress_bar_config", {}))
    try:
        for module in modules:
            module.eval()
        if scheduler is not None:
            # `set_timesteps` overwrites a scheduler's tables; the old scheduler must keep its own.
            pipeline.scheduler = type(scheduler).from_config(scheduler.config)
        pipeline.set_progress_bar_config(disable=True)
        yield
    finally:
        for module, training in was_training:
            module.training = training
        if scheduler is not None:
            pipeline.scheduler = scheduler
        pipeline.set_progress_bar_config(**bar_config)


@contextlib.contextmanager
def _private_random_state(seed: int) -> Iterator[None]:
    """
    Seed torch's global generators and restore them after.

    A few schedulers ignore the generators that a pipeline is given (`FlowMatchEulerDiscreteScheduler` with
    `stochastic_sampling`, `DPMSolverSDEScheduler`); without this they would differ from run to run.
    """
    cuda = torch.cuda.is_initialized()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            torch.cuda.manual_seed_all(seed)
        yield
