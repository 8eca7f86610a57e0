"""The base class of the model families, and a run's choices for them."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from tgol_trainer import adapters
from tgol_trainer.likelihoods import Draw, Likelihood, RowGenerators, to_device

from .blocks import StoredBlocks
from .compiling import uncompiled
from .conditioning import Conditioning, Rows, join
from .origin import ModelOrigin
from .prompts import count_cut_prompts, counted_cuts, seen_part

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


@dataclasses.dataclass(frozen=True)
class FamilySettings:
    """
    Choices of a run that only some families have.

    Args:
        timestep_sampling (`str`, *optional*):
            `"uniform"`, `"logit_normal"` or `"shifted"`, the density of times of flow-matching models; by default the
            family's own.
        guidance (`float`, *optional*):
            Guidance value given to guidance-distilled models, the same for policy and reference; by default the
            family's own.
        num_frames (`int`, *optional*):
            Frames of a training clip; by default as many as the pipeline generates. Models of videos only.
        expert (`str`, *optional*):
            `"high_noise"` (by default) or `"low_noise"`: which of two transformers is trained. Wan 2.2 A14B only.
        vae_tiling (`bool`, *optional*, defaults to `False`): Encode and decode images in tiles.
        text_encoders_in_4bit (`bool`, *optional*, defaults to `False`):
            Load text encoders other than CLIP in 4 bits. Only for a pipeline that is loaded here.
        size (`tuple[int, int]`, *optional*): (height, width) that the run was told to train at, for its card.
    """

    timestep_sampling: str | None = None
    guidance: float | None = None
    num_frames: int | None = None
    expert: str | None = None
    vae_tiling: bool = False
    text_encoders_in_4bit: bool = False
    size: tuple[int, int] | None = dataclasses.field(default=None, repr=False)  # caches are keyed by the others


@contextmanager
def frozen_pass(device: torch.device) -> Iterator[None]:
    """
    Run what is not trained without gradient, and without the autocast of `bf16=True` or `fp16=True`.

    Under autocast an autoencoder kept in float32 would compute in half precision all the same, and that of SDXL
    overflows in float16.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def move(component: Any, device: torch.device) -> None:
    """Move a network, unless it is there already; quantised networks refuse `.to` even then."""
    if component is not None and component.device != device:
        component.to(device)


class ModelFamily(abc.ABC):
    """
    A kind of diffusers pipeline: how it encodes, how its denoiser is called, how its results are loaded.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            Used in place. Every component is frozen and set to eval mode; the trainer decides what trains.
        origin ([`ModelOrigin`]): Where it came from.
        settings ([`FamilySettings`], *optional*): Choices of the run.

    Raises:
        ValueError: for a pipeline that lacks a required component, or that the family refuses.
    """

    denoiser_name: str
    """Component that is trained: `"unet"` or `"transformer"`."""

    autoencoder_name = "vae"
    """Component that encodes images."""

    one_frame = False
    """Whether the autoencoder is one of videos, to which an image is a clip of one frame (Qwen-Image)."""

    default_target_modules: tuple[str, ...]
    """LoRA targets where the user gives none."""

    required_components: tuple[str, ...] = ()
    """Components of the pipeline that may not be `None`."""

    token_limits: dict[str, int | None] = {"tokenizer": None}
    """
    Tokenizers that decide what the denoiser sees of a prompt, and how many tokens each may give, special ones
    included; `None` for the tokenizer's own limit.
    """

    mask_argument: str | None = None
    """
    Keyword of the denoiser that says which tokens of a prompt are real, where prompts are stored at their own length:
    (B, L) bool, given where a prompt of the batch is shorter than another. `None` where prompts have one length, or
    where `encode_unique_prompts` returns a mask of its own.
    """

    list_arguments: tuple[str, ...] = ()
    """Keywords of the denoiser that are lists of tensors, one for each row, of different lengths."""

    pipeline_tag = "text-to-image"
    """The task on the Hub."""

    output_name = "images"
    """Attribute of the pipeline's output that holds what it makes."""

    num_frames: int | None = None
    """Frames of a training clip; `None` for models of images."""

    rows_per_image = 2
    """Rows of one pass of the denoiser for each image that the pipeline generates: guidance adds the empty prompt."""

    blocks: StoredBlocks | None = None
    """The blocks of the denoiser, where their weights are swapped in and out."""

    _home: torch.device | None = None
    """Where the denoiser computes, while its weights, or a part of them, are elsewhere."""

    def __init__(
        self, pipeline: DiffusionPipeline, origin: ModelOrigin, settings: FamilySettings | None = None
    ) -> None:
        self.pipeline, self.origin, self.settings = pipeline, origin, settings or FamilySettings()
        self.check_pipeline()
        self.prepare_pipeline()
        # What the denoiser computes in, before it has an adapter: diffusers takes the first weight that is no integer,
        # which on a quantised FLUX.2 is then the adapter's. It also looks through all modules each time.
        self.dtype: torch.dtype = self.denoiser.dtype
        self.likelihood = self.make_likelihood()

    # ---- What a family says of itself ----

    def check_pipeline(self) -> None:
        """Refuse a pipeline that cannot be trained; by default one that lacks a required component."""
        missing = [name for name in self.required_components if getattr(self.pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"The {type(self.pipeline).__name__} has no {', '.join(missing)}, which training needs. Load it "
                f"without `{missing[0]}=None`."
            )

    def prepare_pipeline(self) -> None:
        """Freeze every component and set it to eval mode; families add what else their pipeline needs."""
        for component in self.pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False)
                component.eval()

    @abc.abstractmethod
    def make_likelihood(self) -> Likelihood:
        """Return how a prediction of this pipeline becomes an error."""

    @property
    def shares(self) -> int:
        """Experts among which the denoiser shares out its tokens by what they are: `tgol plan` does so evenly."""
        return 1

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for; by default the denoiser's sample size in pixels."""
        side = self.denoiser.config["sample_size"] * self.pipeline.vae_scale_factor
        return side, side

    @property
    def resolution_multiple(self) -> int:
        """Sides in pixels must be multiples of this; by default the autoencoder's factor."""
        return self.pipeline.vae_scale_factor

    @property
    def max_side(self) -> int | None:
        """The longest side in pixels that the denoiser has positions for; `None` for any."""
        return None

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """Return the tokenizers of `token_limits` with their limits."""
        tokenizers = {name: getattr(self.pipeline, name) for name in self.token_limits}
        return [(each, self.token_limits[name] or each.model_max_length) for name, each in tokenizers.items()]

    @abc.abstractmethod
    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """
        Return the conditioning, one row per prompt, as keyword arguments of the denoiser; of any dtype.

        A keyword has a tensor (N, ...), or N tensors (L, ...) of different lengths, see `mask_argument` and
        `list_arguments`. A row must not depend on the other prompts.
        """

    @abc.abstractmethod
    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Call the denoiser, or a wrapper of it, on a draw; returns (B, ...) in its dtype."""

    def condition_on_size(self, geometry: torch.Tensor, resolution: tuple[int, int]) -> dict[str, torch.Tensor]:
        """
        Conditioning on the images' own sizes and crops, for models that take it.

        Args:
            geometry (`torch.Tensor`):
                (B, 4) integers: height and width of the image, top and left of the crop in the resized image.
            resolution (`tuple[int, int]`): (height, width) of the training pixels.

        Returns:
            `dict[str, torch.Tensor]`: keyword arguments of the denoiser with B rows; by default none.
        """
        return {}

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Bring latents (B, C, ...) of the autoencoder to the unit of the denoiser, as the autoencoder says.

        By mean and deviation of each channel (Wan, LTX, some of SDXL), shift and scale, whichever it has.
        """
        config, (mean, std) = self.pipeline.vae.config, self._latent_statistics(latents)
        return ((latents - mean) / std - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)

    def unscale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """Undo [`~ModelFamily.scale_latents`]."""
        config, (mean, std) = self.pipeline.vae.config, self._latent_statistics(latents)
        latents = latents / (config.get("scaling_factor") or 1.0) + (config.get("shift_factor") or 0.0)
        return latents * std + mean

    def _latent_statistics(self, latents: torch.Tensor) -> tuple[torch.Tensor | float, torch.Tensor | float]:
        """Mean and deviation of each channel, from the config or the buffers of the autoencoder; else 0 and 1."""
        vae, shape = self.pipeline.vae, (-1, *[1] * (latents.dim() - 2))
        known = {**vae.config, **dict(vae.named_buffers(recurse=False))}
        mean, std = known.get("latents_mean"), known.get("latents_std")
        if mean is None or std is None:
            return 0.0, 1.0
        mean, std = (to_device(torch.as_tensor(each), latents.device).to(latents.dtype) for each in (mean, std))
        return mean.view(shape), std.view(shape)

    def encode_one(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Return what is kept of one image or clip (1, 3, ...): by default mean and deviation of a KL autoencoder.

        The autoencoder runs in the dtype it was loaded in, without gradient.
        """
        pixels = pixels.unsqueeze(2) if self.one_frame else pixels
        posterior = self.pipeline.vae.encode(pixels.to(self.pipeline.vae.dtype)).latent_dist
        mean, std = posterior.mean, posterior.std
        return {"mean": mean.squeeze(2), "std": std.squeeze(2)} if self.one_frame else {"mean": mean, "std": std}

    def latents(self, encoded: dict[str, torch.Tensor], rows: RowGenerators, *, sample: bool) -> torch.Tensor:
        """
        Return latents from what was kept of images.

        Args:
            encoded (`dict[str, torch.Tensor]`): B rows, see [`~ModelFamily.encode`].
            rows ([`RowGenerators`]): Source of the posterior sample.
            sample (`bool`): Sample the posterior, or take its mode.

        Returns:
            `torch.Tensor`: (B, C, h, w) or (B, C, f, h, w) in the denoiser's dtype and on its device.
        """
        latents = to_device(encoded["mean"], self.device)
        if sample and "std" in encoded:
            latents = latents + to_device(encoded["std"], self.device) * rows.normal("latent", latents).to(
                latents.dtype
            )
        return self.scale_latents(latents).to(self.dtype)

    def decode_images(self, latents: torch.Tensor) -> torch.Tensor:
        """Return the pixels of scaled latents, in the autoencoder's dtype and range."""
        vae = self.pipeline.vae
        with frozen_pass(vae.device):
            latents = self.unscale_latents(latents.to(vae.dtype))
            pixels = self.decode_batch(latents.unsqueeze(2) if self.one_frame else latents)
            return pixels.squeeze(2) if self.one_frame else pixels

    def decode_batch(self, latents: torch.Tensor) -> torch.Tensor:
        """Call the autoencoder's decoder on latents in its own unit."""
        return self.pipeline.vae.decode(latents, return_dict=False)[0]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's activations in the backward pass; diffusers' own switch."""
        self.denoiser.enable_gradient_checkpointing()

    def probe_pixels(self, rows: RowGenerators) -> torch.Tensor:
        """Pixels (1, 3, H, W) of one random image in [-1, 1], for `probe`; far smaller than the model's own size."""
        side = min(*self.native_size, 8 * self.resolution_multiple)  # UNets halve latents up to three times
        return rows.normal("probe", torch.empty(1, 3, side, side)).clamp(-1, 1)

    # ---- What follows from it ----

    def encode(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """
        Encode images or clips one by one, so that the result does not depend on the batch.

        Args:
            pixels (`torch.Tensor`): (B, 3, H, W), or (B, 3, F, H, W) for video models, float32 in [-1, 1].

        Returns:
            `dict[str, torch.Tensor]`: B rows of what [`~ModelFamily.latents`] takes, in the autoencoder's dtype.
        """
        with self.present(self.autoencoder_name) as autoencoder, frozen_pass(autoencoder.device):
            rows = [self.encode_one(to_device(image[None], autoencoder.device)) for image in pixels]
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    def encode_images(self, pixels: torch.Tensor, rows: RowGenerators, *, sample: bool) -> torch.Tensor:
        """Return the latents of pixels: [`~ModelFamily.encode`], then [`~ModelFamily.latents`]."""
        return self.latents(self.encode(pixels), rows, sample=sample)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, list[torch.Tensor]]:
        """
        Encode prompts one by one, so that the result does not depend on the batch.

        Args:
            prompts (`Sequence[str]`): N prompts; an empty one is the unconditional prompt.

        Returns:
            `dict[str, list[torch.Tensor]]`: for each keyword of the denoiser N tensors, each without a dimension for
            the batch and at its prompt's own length where the family has such, in the text encoders' dtype.
        """
        with self.present(*self.text_encoder_names), frozen_pass(self.device), counted_cuts(self.pipeline):
            limits = self.prompt_limits()
            rows = [self.encode_unique_prompts([seen_part(prompt, limits)]) for prompt in prompts]
        return {name: [row[name][0] for row in rows] for name in rows[0]}

    @property
    def text_encoder_names(self) -> list[str]:
        """Components of the pipeline that encode prompts."""
        components = self.pipeline.components
        return [name for name in components if name.startswith("text_encoder") and components[name] is not None]

    @contextmanager
    def present(self, *names: str, alone: bool = False) -> Iterator[Any]:
        """
        Bring components to the denoiser's device for a block, and back to where they were; yield the first.

        Args:
            names (`str`): Names of components of the pipeline.
            alone (`bool`, *optional*, defaults to `False`):
                Move the denoiser off a GPU for the block, so that encoders and denoiser need not fit together. A
                quantised denoiser stays: not every kind of quantisation can be moved. So does one with `blocks`.
        """
        device, components = self.device, [getattr(self.pipeline, name) for name in names]
        places = [component.device for component in components]
        stays = self.blocks is not None or getattr(self.denoiser, "hf_quantizer", None) is not None
        away = alone and device.type != "cpu" and not stays
        try:
            if away:
                self._home = device
                move(self.denoiser, torch.device("cpu"))
            for component in components:
                move(component, device)
            yield components[0] if components else None
        finally:
            for component, place in zip(components, places, strict=True):
                move(component, place)
            if away:
                move(self.denoiser, device)
                self._home = None

    @contextmanager
    def whole(self, without: Sequence[str] = ()) -> Iterator[DiffusionPipeline]:
        """Yield the pipeline for a block that generates, all but the components `without` on the denoiser's device."""
        components = self.pipeline.components.items()
        names = [name for name, component in components if isinstance(component, torch.nn.Module)]
        with self.present(*(name for name in names if name not in without)), uncompiled(self.denoiser):
            yield self.pipeline

    def place_denoiser(self, device: torch.device) -> None:
        """Move the denoiser. What encodes or generates brings the other components to it for the moment."""
        move(self.denoiser, device)

    @property
    def denoiser(self) -> ModelMixin:
        """The network that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the denoiser computes."""
        return self._home or next(self.denoiser.parameters()).device  # diffusers' property looks through all modules

    def to(self, device: torch.device | str) -> ModelFamily:
        """Move every component."""
        self.pipeline.to(device)
        return self

    def count_long_prompts(self, prompts: Sequence[str]) -> tuple[int, int]:
        """Return how many prompts are cut before the denoiser sees their end, and the smallest limit in tokens."""
        return count_cut_prompts(prompts, self.prompt_limits())

    def condition(
        self,
        prompts: Sequence[str],
        geometry: torch.Tensor,
        resolution: tuple[int, int],
        encode_prompts: Callable[[list[str]], Rows] | None = None,
    ) -> Conditioning:
        """
        Everything the denoiser is conditioned on, as keyword arguments with B rows, without gradient.

        Each distinct one of the B prompts is encoded once and brought to the denoiser's dtype, masks excepted. Those
        of different lengths become lists, or are padded with zeros to the longest of the batch, as the family says.
        An empty string is the unconditional prompt. `geometry` and `resolution` are as in
        [`~ModelFamily.condition_on_size`]; `encode_prompts` stands in for [`~ModelFamily.encode_prompts`], such as a
        cache.
        """
        unique = list(dict.fromkeys(prompts))
        index = [unique.index(prompt) for prompt in prompts]
        encoded = (encode_prompts or self.encode_prompts)(unique)
        with frozen_pass(self.device):
            rows = join(encoded, index, self.device, self.dtype, self.list_arguments, self.mask_argument)
            return {**rows, **self.condition_on_size(geometry, resolution)}

    def probe(self) -> torch.Tensor:
        """Output of the denoiser on one small fixed input, for comparing a model with itself."""
        rows = RowGenerators(0, 0, [0])
        with torch.no_grad():
            pixels = self.probe_pixels(rows).to(self.device)
            height, width = pixels.shape[-2:]
            with self.present(*self.text_encoder_names, alone=True):  # they need not fit beside the denoiser
                conditioning = self.condition(["a probe"], torch.tensor([[height, width, 0, 0]]), (height, width))
            draw = self.likelihood.draw(self.encode_images(pixels, rows, sample=False), rows)
            return self.predict(self.denoiser, draw, conditioning)

    # ---- Snippets for the card ----

    def usage(self, location: str, prompt: str) -> str:
        """
        A Python snippet that loads the base model and the adapter and makes an image.

        Args:
            location (`str`): What to hand to `load_lora_weights`: Hub id or folder.
            prompt (`str`): Any text.

        Returns:
            `str`: source code.
        """
        options = "".join(
            f", {name}={value!r}" for name, value in adapters.loading_options(self.denoiser_name).items()
        )
        return self._snippet(prompt, *self._loading_lines(), f"pipe.load_lora_weights({location!r}{options})")

    def full_usage(self, location: str, prompt: str) -> str:
        """The same for a fully fine-tuned denoiser saved under `location`."""
        name, kind = self.denoiser_name, type(self.denoiser).__name__
        load = f'pipe.{name} = {kind}.from_pretrained({location!r}, subfolder="{name}")'
        return self._snippet(prompt, f"from diffusers import {kind}", *self._loading_lines(), load)

    def peft_usage(self, location: str, prompt: str) -> str:
        """The same for an adapter in PEFT's own format saved under `location`."""
        load = f"pipe.{self.denoiser_name} = PeftModel.from_pretrained(pipe.{self.denoiser_name}, {location!r})"
        return self._snippet(prompt, "from peft import PeftModel", *self._loading_lines(), load)

    def merged_usage(self, location: str, prompt: str) -> str:
        """The same for a complete pipeline saved under `location`, with the trained weights in it."""
        return self._snippet(prompt, *self._from_pretrained_lines(location))

    def _snippet(self, prompt: str, *lines: str) -> str:
        return "\n".join([*lines, *self._image_lines(prompt)])

    def _loading_lines(self) -> list[str]:
        origin = self.origin
        if origin.loading_code:
            return origin.loading_code.splitlines()
        if origin.hub_id:
            return self._from_pretrained_lines(origin.hub_id, origin.revision)
        return self._from_pretrained_lines("path/to/the/base/model")

    def _from_pretrained_lines(self, source: str, revision: str | None = None) -> list[str]:
        options = f", revision={revision!r}" if revision else ""
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({source!r}{options})",
        ]

    def _image_lines(self, prompt: str) -> list[str]:
        return [f"image = pipe(prompt={prompt!r}{self.call_text}).images[0]", 'image.save("sample.png")']

    @property
    def call_text(self) -> str:
        """What suits the model, and what the run was told to train at, as Python text that follows a prompt."""
        arguments = {**self.origin.call_arguments, **self._drawn()}
        return "".join(f", {name}={value!r}" for name, value in arguments.items())

    def _drawn(self) -> dict[str, int]:
        return dict(zip(("height", "width"), self.settings.size or (), strict=False))
