"""Images and videos with fixed seeds from any diffusers pipeline, which stays, as the random state, as it was."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm


def generate_images(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    batch_size: int = 8,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
    description: str = "Generating",
) -> list[Image.Image]:
    """
    Draw one image a prompt, each from its own seed.

    Prompts are taken in fixed chunks of `batch_size`, so the same call gives the same images; another `batch_size`
    may move a pixel by a grey level. Runs without gradients and with every module of the pipeline in eval mode.
    Afterwards training flags, scheduler, progress-bar settings and the global random state are as before, also when
    the pipeline raises.

    Args:
        pipeline (`DiffusionPipeline`):
            Any text-to-image pipeline.
        prompts (`Sequence[str]`):
            One prompt an image.
        seeds (`Sequence[int]`):
            One seed an image, for a generator on the CPU, so that images do not depend on the kind of device.
        batch_size (`int`, *optional*, defaults to 8):
            Images a call of the pipeline; always one for a pipeline that takes no list of generators (aMUSEd).
        num_inference_steps (`int`, *optional*):
            Denoising steps. `None` leaves the pipeline's default, as for the next three.
        guidance_scale (`float`, *optional*):
            Strength of classifier-free guidance.
        height (`int`, *optional*):
            Height of the images, in pixels.
        width (`int`, *optional*):
            Width of the images, in pixels.
        progress (`bool`, *optional*, defaults to `True`):
            Show one bar over all images instead of the pipeline's bar for each batch.
        description (`str`, *optional*, defaults to `"Generating"`):
            Text in front of that bar.

    Returns:
        `list[PIL.Image.Image]`: image `i` belongs to prompt `i` and seed `i`.

    Raises:
        ValueError: if there are no prompts, if the numbers of prompts and seeds differ, if `batch_size` is below 1,
            or if the pipeline returned NaN.
        TypeError: if the pipeline returns no images, as a video pipeline does.
    """
    sizes = {"height": height, "width": width}
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **sizes}
    bar = tqdm(total=len(prompts), desc=description, unit="image", disable=not progress)
    arrays = _generate(pipeline, prompts, seeds, batch_size, options, "images", bar)
    return [image for chunk in arrays for image in pipeline.numpy_to_pil(chunk)]


def generate_videos(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_frames: int | None = None,
    batch_size: int = 1,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    progress: bool = True,
    description: str = "Generating",
) -> list[list[Image.Image]]:
    """
    Draw one video a prompt, each from its own seed, with the guarantees of [`generate_images`].

    Args:
        pipeline (`DiffusionPipeline`):
            Any text-to-video pipeline.
        prompts (`Sequence[str]`):
            One prompt a video.
        seeds (`Sequence[int]`):
            One seed a video, for a generator on the CPU, so that videos do not depend on the kind of device.
        num_frames (`int`, *optional*):
            Frames of each video. `None` leaves the pipeline's default, as for the other numbers below. One that the
            pipeline rounds, as Wan does what is not 4·k + 1, is an error.
        batch_size (`int`, *optional*, defaults to 1):
            Videos a call of the pipeline.
        num_inference_steps (`int`, *optional*):
            Denoising steps.
        guidance_scale (`float`, *optional*):
            Strength of classifier-free guidance.
        height (`int`, *optional*):
            Height of the frames, in pixels.
        width (`int`, *optional*):
            Width of the frames, in pixels.
        progress (`bool`, *optional*, defaults to `True`):
            Show one bar over all videos.
        description (`str`, *optional*, defaults to `"Generating"`):
            Text in front of that bar.

    Returns:
        `list[list[PIL.Image.Image]]`: the frames of video `i` belong to prompt `i` and seed `i`.

    Raises:
        ValueError: as [`generate_images`], or if the pipeline returned another number of frames.
        TypeError: if the pipeline returns no videos, as an image pipeline does.
    """
    sizes = {"height": height, "width": width, "num_frames": num_frames}
    options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, **sizes}
    bar = tqdm(total=len(prompts), desc=description, unit="video", disable=not progress)
    arrays = _generate(pipeline, prompts, seeds, batch_size, options, "frames", bar)
    videos = [_frames(video) for chunk in arrays for video in chunk]
    if num_frames is not None and len(videos[0]) != num_frames:
        raise ValueError(
            f"{type(pipeline).__name__} was asked for {num_frames} frames and drew {len(videos[0])}: ask for "
            f"`num_frames={len(videos[0])}`, or for a number of the form that the model takes."
        )
    return videos


def makes_videos(pipeline: Any) -> bool:
    """Return whether a pipeline makes videos: whether it can be told a number of frames."""
    return "num_frames" in inspect.signature(type(pipeline).__call__).parameters


def _frames(video: np.ndarray) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in (video * 255).round().astype(np.uint8)]


def _generate(
    pipeline: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    batch_size: int,
    options: dict[str, Any],
    kind: str,
    bar: tqdm,
) -> list[np.ndarray]:
    """Return one array of values in 0..1 a chunk, from the output's `images` or `frames`."""
    thing = "image" if kind == "images" else "video"
    if isinstance(prompts, str):
        raise TypeError(f"`prompts` is one string; pass a list with one prompt a {thing}.")
    if len(prompts) == 0:
        raise ValueError("There are no prompts: pass at least one.")
    if len(prompts) != len(seeds):
        raise ValueError(f"There are {len(prompts)} prompts and {len(seeds)} seeds: pass one seed a prompt.")
    if batch_size < 1:
        raise ValueError(f"`batch_size` is {batch_size}; it must be at least 1.")
    options = {name: value for name, value in options.items() if value is not None}
    if not _takes_generators(pipeline):
        batch_size = 1
    arrays: list[np.ndarray] = []
    with bar, _pipeline_for_sampling(pipeline), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            chunk = slice(start, start + batch_size)
            arrays.append(_generate_chunk(pipeline, list(prompts[chunk]), list(seeds[chunk]), start, options, kind))
            bar.update(len(arrays[-1]))
    return arrays


def _takes_generators(pipeline: Any) -> bool:
    """Return whether a pipeline takes one generator an image; aMUSEd and Meissonic take a single one."""
    parameter = inspect.signature(type(pipeline).__call__).parameters.get("generator")
    if parameter is None or parameter.annotation is inspect.Parameter.empty:
        return True
    return "list" in str(parameter.annotation).lower()


def _generate_chunk(
    pipeline: Any, prompts: list[str], seeds: list[int], start: int, options: dict[str, Any], kind: str
) -> np.ndarray:
    generators = [torch.Generator("cpu").manual_seed(int(seed)) for seed in seeds]
    with _private_random_state(int(seeds[0])):
        output = pipeline(
            prompt=prompts,
            # A lone generator is the same to a pipeline that takes a list, and all that the others take.
            generator=generators if len(generators) > 1 else generators[0],
            # The step to 8 bits turns NaN into black, so it is taken here, after looking.
            output_type="np",
            **options,
        )
    if not hasattr(output, kind):
        other = {"images": "no images", "frames": "no videos"}[kind]
        raise TypeError(f"{type(pipeline).__name__} returned {type(output).__name__}, which holds {other}.")
    arrays = np.asarray(getattr(output, kind))
    broken = np.flatnonzero(np.isnan(arrays).reshape(len(arrays), -1).any(axis=1))
    if broken.size:
        first = int(broken[0])
        thing = "image" if kind == "images" else "video"
        raise ValueError(
            f"{type(pipeline).__name__} returned NaN, which would be saved as a black {thing}, for {broken.size} of "
            f"{len(prompts)} prompts; the first is prompt {start + first}, {prompts[first]!r:.80}. Half precision is "
            "the usual reason (load the VAE in float32, or use bfloat16), else weights that diverged in training."
        )
    return arrays


@contextlib.contextmanager
def _pipeline_for_sampling(pipeline: Any) -> Iterator[None]:
    """Put the modules in eval mode, silence the pipeline's bars and lend it a fresh scheduler; undo it all after."""
    modules = [component for component in pipeline.components.values() if isinstance(component, torch.nn.Module)]
    was_training = [(module, module.training) for root in modules for module in root.modules()]
    scheduler = getattr(pipeline, "scheduler", None)
    # diffusers has a setter for this and no getter; the attribute is missing until the setter was called.
    bar_config = dict(getattr(pipeline, "_progress_bar_config", {}))
    try:
        for module in modules:
            module.eval()
        if scheduler is not None:
            # `set_timesteps` overwrites a scheduler's tables; whoever holds the old one must not see that.
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
