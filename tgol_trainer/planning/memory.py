"""Predict the memory of encoding, training and sampling by tracing each without weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import torch

from tgol_trainer.config import check_sides
from tgol_trainer.families import Conditioning, ModelFamily, keeps_prompts
from tgol_trainer.likelihoods import RowGenerators

from .cards import REACHED, Card
from .networks import Setup, build, forget_weights, networks, weight_bytes
from .tracing import LiveBytes, without_memory

CONTEXT = 2**30
"""Estimate of what CUDA and the libraries of kernels take before and beside the first tensor."""

SLACK = 0.1
"""Estimate of what the allocator cannot use, and of kernels' own work space, as a share of what comes and goes."""

# Bytes of optimizer states for each trained value of `size` bytes: torch's AdamW keeps two values of the weight's own
# dtype; bitsandbytes' of 8 bits two bytes, and two float32 scales for 256 values.
_TWO_STATES = ("adamw_torch", "adamw_torch_fused")
_STATES_FLOAT32 = {"paged_adamw_32bit": 2, "lion_32bit": 1, "paged_lion_32bit": 1}
_STATES_8BIT = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "lion_8bit": 1, "paged_lion_8bit": 1}
_SMALLEST_8BIT, _BLOCK_8BIT = 4096, 256

WORDS = 1200
"""Words of a prompt that is planned, longer than what most models take."""

KNOWN_OPTIMIZERS = (*_TWO_STATES, "sgd", *_STATES_FLOAT32, *_STATES_8BIT)
"""Values of `TrainingArguments.optim` whose memory is known."""


@dataclasses.dataclass(frozen=True)
class Phase:
    """
    What one part of the work holds on the device, in bytes.

    Args:
        resident (`dict[str, int]`): What stays for all of it, by name; exact.
        working (`int`): Most that comes and goes, as PyTorch's dispatcher sees it.
    """

    resident: dict[str, int]
    working: int

    @property
    def tensors(self) -> int:
        """Everything that is a tensor."""
        return sum(self.resident.values()) + self.working

    @property
    def total(self) -> int:
        """With the estimates of context and slack; the card must have so much."""
        return self.tensors + CONTEXT + int(SLACK * self.working)


@dataclasses.dataclass(frozen=True)
class Step:
    """
    One pass of training over a batch, forward and backward. Bytes are those beside weights and optimizer.

    Args:
        peak (`int`): Most bytes that it holds: batch, activations, gradients.
        activations (`int`): Bytes that the policy's forward pass keeps for the backward pass.
        gradients (`int`): Bytes of the gradients after it.
        flops (`int`): Floating-point operations, the reference's pass included where there is one.
        prompts (`int`, *optional*, defaults to 0): Most bytes while prompts are encoded, without a cache.
        images (`int`, *optional*, defaults to 0): Most bytes while images are encoded, without a cache.
        states (`int`, *optional*, defaults to 0): Bytes that the optimizer keeps of weights that a gradient reaches.
    """

    peak: int
    activations: int
    gradients: int
    flops: int
    prompts: int = 0
    images: int = 0
    states: int = 0


@dataclasses.dataclass(frozen=True)
class Encoding:
    """
    What encoding takes and makes.

    Args:
        prompts (`int`): Most bytes that encoding prompts holds beside weights.
        images (`int`): The same of images.
        bytes_per_prompt (`int`): Size of what a cache keeps of a prompt, at most.
        bytes_per_image (`int`): Size of what a cache keeps of an image or clip.
        conditioning (`Conditioning`): One row, without values.
        latents (`torch.Tensor`): One row, without values.
    """

    prompts: int
    images: int
    bytes_per_prompt: int
    bytes_per_image: int
    conditioning: Conditioning
    latents: torch.Tensor


@dataclasses.dataclass(frozen=True)
class Prediction:
    """
    What a setup takes.

    Args:
        setup ([`Setup`]): The run.
        pipeline (`str`): Name of the pipeline's class.
        size (`tuple[int, int]`): Height and width in pixels.
        multiple (`int`): What both are multiples of.
        num_frames (`int`, *optional*): Frames of a clip.
        num_trained (`int`): Values that are trained.
        encoding ([`Phase`], *optional*): Filling the cache; `None` without one.
        training ([`Phase`]): Steps.
        sampling ([`Phase`], *optional*): Generating images with the trained denoiser during training.
        step ([`Step`]): What a pass over a batch holds and computes.
        bytes_per_prompt (`int`): See [`Encoding`].
        bytes_per_image (`int`): See [`Encoding`].
    """

    setup: Setup
    pipeline: str
    size: tuple[int, int]
    multiple: int
    num_frames: int | None
    num_trained: int
    encoding: Phase | None
    training: Phase
    sampling: Phase | None
    step: Step
    bytes_per_prompt: int
    bytes_per_image: int

    @property
    def needed(self) -> int:
        """Most bytes that encoding and training take."""
        return max(phase.total for phase in (self.encoding, self.training) if phase is not None)

    def update_seconds(self, card: Card) -> tuple[float, float] | None:
        """
        Estimate the least and most seconds of an update from what makers say of a card.

        `None` where the card's rate is not that of the products: in float32, in 4 or 8 bits, or where it is not known.
        """
        setup = self.setup
        halves = setup.autocast is not None or setup.main_dtype in ("bfloat16", "float16")
        if card.rate is None or not halves or setup.quantization is not None:
            return None
        slowest, fastest = (self.step.flops * setup.accumulation / (card.rate * share) for share in REACHED)
        return fastest, slowest


def predict(setup: Setup) -> Prediction:
    """
    Predict what a setup takes; nothing is loaded but configs and tokenizers.

    Args:
        setup ([`Setup`]): The run.

    Returns:
        [`Prediction`]

    Raises:
        ValueError: see [`build`]; also for an optimizer whose memory is not known.
    """
    return predict_family(build(setup), setup)


def predict_family(family: ModelFamily, setup: Setup) -> Prediction:
    """Predict what a setup takes with a family that [`build`] made; its networks are changed."""
    denoiser = family.denoiser
    at_denoiser, encoders = _weights(family, setup)
    _check_optimizer(setup.optimizer)
    size = setup.resolution or family.native_size
    if setup.resolution is not None:
        check_sides(family.resolution_multiple, family.max_side, resolution="x".join(map(str, size)))
    with without_memory(family.shares):
        for network in networks(family).values():
            forget_weights(network)
        if family.blocks is not None:
            family.blocks.replace_kept(lambda kept: torch.empty_like(kept, device="cpu"), torch.device("cpu"))
        encoding = trace_encoding(family, size)
        step = trace_step(family, setup, size, encoding)
        sampling = trace_sampling(family, setup, size, encoding) if setup.sampling_batch else (0, 0)
    with_optimizer = {**at_denoiser, "optimizer": step.states}
    # What cannot leave the device while a cache is filled: a quantised or stored denoiser, and a frozen copy.
    stays = setup.quantization or family.blocks is not None
    staying = at_denoiser if stays else {"reference": at_denoiser["reference"]} if not setup.lora else {}
    training = Phase(with_optimizer, step.peak)
    if not setup.cache:
        training = Phase({**with_optimizer, **encoders}, max(step.peak, step.prompts, step.images))
    return Prediction(
        setup=setup,
        pipeline=type(family.pipeline).__name__,
        size=size,
        multiple=family.resolution_multiple,
        num_frames=family.num_frames,
        num_trained=sum(each.numel() for each in denoiser.parameters() if each.requires_grad),
        encoding=_largest(staying, encoders, encoding.prompts, encoding.images) if setup.cache else None,
        training=training,
        sampling=_sampling(family, setup, (staying, with_optimizer), encoders, sampling),
        step=step,
        bytes_per_prompt=encoding.bytes_per_prompt,
        bytes_per_image=encoding.bytes_per_image,
    )


def _largest(beside: dict[str, int], encoders: dict[str, int], prompts: int, images: int) -> Phase:
    """Encode prompts, then images: first the text encoders are on the device, then the autoencoder."""
    phases = [
        Phase({**beside, name: encoders[name]}, working)
        for name, working in (("text encoders", prompts), ("autoencoder", images))
    ]
    return max(phases, key=_total)


def _sampling(
    family: ModelFamily,
    setup: Setup,
    resident: tuple[dict[str, int], dict[str, int]],
    encoders: dict[str, int],
    working: tuple[int, int],
) -> Phase | None:
    """Encode the prompts that are sampled, once; then draw, the optimizer beside it, without the text encoders."""
    if not setup.sampling_batch:
        return None
    (staying, training), (prompts, drawing) = resident, working
    if not (setup.cache and keeps_prompts(family)):
        return Phase({**training, **encoders}, max(working))
    encoding = Phase({**staying, "text encoders": encoders["text encoders"]}, prompts)
    return max(encoding, Phase({**training, "autoencoder": encoders["autoencoder"]}, drawing), key=_total)


def _total(phase: Phase) -> int:
    return phase.total


def weights_alone(setup: Setup) -> int:
    """Return bytes that training surely takes: the weights that are on the device all the time."""
    at_denoiser, _ = _weights(build(setup), setup)
    return sum(at_denoiser.values())


def _weights(family: ModelFamily, setup: Setup) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of weights that training needs in any case, and of the encoders."""
    sizes = {name: weight_bytes(network) for name, network in networks(family).items()}
    if family.blocks is not None:
        sizes[family.denoiser_name] -= family.blocks.bytes_saved
    denoiser = sizes[family.denoiser_name]
    if setup.lora is None:
        at_denoiser = {"denoiser": denoiser, "reference": denoiser}
    else:
        adapter = sum(_bytes(each) for each in family.denoiser.parameters() if each.requires_grad)
        at_denoiser = {"denoiser": denoiser - adapter, "adapter": adapter}
        at_denoiser |= {"reference": adapter} if setup.reference_adapter else {}
    texts = sum(size for name, size in sizes.items() if name.startswith("text_encoder"))
    autoencoder = sum(sizes.values()) - denoiser - texts
    return at_denoiser, {"text encoders": texts, "autoencoder": autoencoder}


def optimizer_bytes(denoiser: torch.nn.Module, name: str) -> int:
    """
    Return the bytes of an optimizer's states, which it makes for weights with a gradient.

    Args:
        denoiser (`torch.nn.Module`): The network after a backward pass.
        name (`str`): `TrainingArguments.optim`. Paged states count as if they stayed on the device.

    Raises:
        ValueError: for an optimizer whose memory is not known.
    """
    _check_optimizer(name)
    trained = [each for each in denoiser.parameters() if each.grad is not None]
    if name in _TWO_STATES:
        return sum(2 * each.numel() * each.element_size() for each in trained)
    if name == "sgd":
        return 0
    if name in _STATES_FLOAT32:
        return sum(4 * _STATES_FLOAT32[name] * each.numel() for each in trained)
    total = 0
    for each in trained:
        scales = 4 * math.ceil(each.numel() / _BLOCK_8BIT)
        per_state = each.numel() + scales if each.numel() >= _SMALLEST_8BIT else 4 * each.numel()
        total += _STATES_8BIT[name] * per_state
    return total


def _check_optimizer(name: str) -> None:
    if name not in KNOWN_OPTIMIZERS:
        raise ValueError(f"`optim` is {name!r}, whose memory is not known here. Known: {', '.join(KNOWN_OPTIMIZERS)}.")


# ---- Traces, inside `without_memory` ----


def trace_encoding(family: ModelFamily, size: tuple[int, int]) -> Encoding:
    """Encode one prompt and one image."""
    geometry = torch.empty(1, 4, dtype=torch.int64)
    with LiveBytes() as live:
        family.encode_prompts(_prompts(1, short=True))
        encoded = family.encode_prompts(_prompts(1))
        prompts = live.peak
        live.restart()
        kept = live.now
        image = family.encode(_pixels(family, 1, size))
        images = live.peak - kept
    return Encoding(
        prompts=prompts,
        images=images,
        bytes_per_prompt=sum(_bytes(value[0]) for value in encoded.values()),
        bytes_per_image=sum(map(_bytes, image.values())),
        conditioning=family.condition(_prompts(1), geometry, size, lambda texts: encoded),
        latents=family.latents(image, RowGenerators(0, 0, [0]), sample=True),
    )


def trace_step(family: ModelFamily, setup: Setup, size: tuple[int, int], encoding: Encoding) -> Step:
    """
    Run the policy forward and backward over a batch.

    The reference's pass holds what the policy's forward pass holds, less what that keeps, so it is not run: its
    prediction is put there, and its operations are those of the policy's.
    """
    batch = setup.batch_size
    rows, geometry = RowGenerators(0, 0, range(batch)), torch.empty(batch, 4, dtype=torch.int64)
    trained = [each for each in family.denoiser.parameters() if each.requires_grad]
    kept, encoding_peaks = 0, [0, 0]

    def forward(live: LiveBytes, pixels: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        if setup.cache:
            conditioning = _conditioning_of_batch(encoding.conditioning, batch)
            latents = _of_batch(encoding.latents, batch)
        else:
            family.condition(_prompts(batch, short=True), geometry, size)
            live.flops = 0
            conditioning = family.condition(_prompts(batch), geometry, size)
            encoding_peaks[0] = live.peak
            live.restart()
            latents = family.encode_images(pixels, rows, sample=True)
            encoding_peaks[1] = live.peak
            live.restart()
        encoded = live.flops
        draw = family.likelihood.draw(latents, rows)
        before = live.now
        prediction = family.predict(family.denoiser, draw, conditioning)
        reference = torch.empty_like(prediction)
        error = family.likelihood.error(prediction, draw) - family.likelihood.error(reference, draw)
        kept = live.now - before - 2 * _bytes(prediction)
        live.flops += (live.flops - encoded) * setup.reference_pass
        return error.mean()

    with LiveBytes() as live:
        if setup.accumulation > 1:  # those of the passes before
            for each in trained:
                each.grad = torch.empty_like(each)
        pixels = _pixels(family, 0 if setup.cache else batch, size)
        with _autocast(setup):
            loss = forward(live, pixels)
        loss.backward()
    gradients = sum(_bytes(each.grad) for each in trained if each.grad is not None)
    states = optimizer_bytes(family.denoiser, setup.optimizer)
    for each in trained:
        each.grad = None
    ahead = family.blocks.bytes_ahead if family.blocks is not None else 0  # from the second step on
    prompts, images = encoding_peaks
    return Step(live.peak + ahead, kept, gradients, live.flops, prompts, images, states)


def trace_sampling(family: ModelFamily, setup: Setup, size: tuple[int, int], encoding: Encoding) -> tuple[int, int]:
    """Return the most bytes while the prompts of images are encoded, and while the images are drawn."""
    batch = setup.sampling_batch
    rows = family.rows_per_image * batch
    geometry = torch.empty(batch, 4, dtype=torch.int64)
    with LiveBytes() as live, torch.no_grad():
        # All at once, as pipelines do.
        family.condition(_prompts(batch, short=True), geometry, size, family.encode_unique_prompts)
        conditioning = family.condition(_prompts(batch), geometry, size, family.encode_unique_prompts)
        conditioning = _conditioning_of_batch(conditioning, rows)
        prompts = live.peak
        live.restart()
        latents = _of_batch(encoding.latents, rows)
        draw = family.likelihood.draw(latents, RowGenerators(0, 0, range(rows)))
        with _autocast(setup):
            family.predict(family.denoiser, draw, conditioning)
        family.decode_images(latents[:batch])
    return prompts, live.peak


@contextlib.contextmanager
def _autocast(setup: Setup) -> Iterator[None]:
    with torch.autocast("cpu", setup.autocast, enabled=setup.autocast is not None):
        yield


def _prompts(batch: int, short: bool = False) -> list[str]:
    """
    Return different prompts, longer than any limit, or all but the last one, in quotes.

    HunyuanVideo 1.5 has a text encoder that sees only what is quoted. Where a short prompt is padded, many text
    encoders make a mask of tokens by tokens, which may be most of what they hold. Where it is not, it takes less than
    a long one.
    """
    prompts = [f'"prompt {index}{" and so on" * (WORDS // 3)}"' for index in range(batch)]
    return [*prompts[:-1], '"short"'] if short else prompts


def _pixels(family: ModelFamily, batch: int, size: tuple[int, int]) -> torch.Tensor:
    frames = () if family.num_frames is None else (family.num_frames,)
    return torch.empty(batch, 3, *frames, *size)


def _of_batch(value: torch.Tensor, batch: int) -> torch.Tensor:
    """Return a batch of such rows; a mask of prompts hides nothing."""
    make = torch.empty if value.is_floating_point() else torch.ones
    return make(batch, *value.shape[1:], dtype=value.dtype)


def _conditioning_of_batch(conditioning: Conditioning, batch: int) -> Conditioning:
    return {
        name: [value[0]] * batch if isinstance(value, list) else _of_batch(value, batch)
        for name, value in conditioning.items()
    }


def _bytes(value: torch.Tensor) -> int:
    return value.numel() * value.element_size()
