"""What every family shares: where a model came from, freezing, prompts, saving."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from tgol_trainer._hub_ids import is_hub_id
from tgol_trainer.likelihoods import Draw, Likelihood, RowGenerators

from .licenses import folder_license

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin


@dataclasses.dataclass(frozen=True)
class FamilySettings:
    """
    Choices of a run that only some families have.

    Args:
        timestep_sampling (`str`, *optional*):
            `"uniform"` or `"logit_normal"`, the density of times of flow-matching models; by default the family's own.
        guidance (`float`, *optional*, defaults to 3.5):
            Guidance value given to guidance-distilled models, the same for policy and reference.
        num_frames (`int`, *optional*):
            Frames of a training clip; by default as many as the pipeline generates. Models of videos only.
    """

    timestep_sampling: str | None = None
    guidance: float = 3.5
    num_frames: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelOrigin:
    """
    Where a base model came from, for the card.

    Args:
        hub_id (`str`, *optional*):
            `owner/name`; `None` for a local folder or an object of unknown origin.
        revision (`str`, *optional*):
            Commit hash where known, else the revision asked for.
        note (`str`, *optional*):
            A plain phrase where there is no Hub id.
        loading_code (`str`, *optional*):
            Python lines that define `pipe`, where `DiffusionPipeline.from_pretrained` is not the way.
        call_arguments (`dict[str, Any]`, *optional*, defaults to `{}`):
            Keyword arguments that suit the model where the pipeline's defaults do not, for the snippet of its card and
            for images drawn during training.
        license (`dict[str, str]`, *optional*, defaults to `{}`):
            `license`, `license_name` and `license_link` of a local folder's own card.
    """

    hub_id: str | None = None
    revision: str | None = None
    note: str | None = None
    loading_code: str | None = None
    call_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    license: dict[str, str] = dataclasses.field(default_factory=dict, kw_only=True)

    @property
    def call_text(self) -> str:
        """`call_arguments` as Python text that follows a first argument."""
        return "".join(f", {name}={value!r}" for name, value in self.call_arguments.items())

    @classmethod
    def of_source(cls, source: str, revision: str | None = None, file: str = "model_index.json") -> ModelOrigin:
        """Describe what `from_pretrained(source, revision=revision)` loads; the commit is that of `file`'s copy."""
        if Path(source).expanduser().exists() or not is_hub_id(source):
            return cls(note="a local folder whose name is not recorded", license=folder_license(source))
        from huggingface_hub import try_to_load_from_cache

        copy = try_to_load_from_cache(source, file, revision=revision)
        commit = Path(copy).parents[file.count("/")].name if isinstance(copy, str) else None
        return cls(hub_id=source, revision=commit or revision)

    @classmethod
    def of_pipeline(cls, pipeline: DiffusionPipeline) -> ModelOrigin:
        """Describe a loaded pipeline by the name its config remembers, if any."""
        name = getattr(pipeline, "name_or_path", None) or pipeline.config.get("_name_or_path")
        return cls.of_source(name) if name else cls(note="a pipeline object of unknown origin")


def count_cut_prompts(prompts: Sequence[str], limits: Sequence[tuple[Any, int]]) -> tuple[int, int]:
    """
    Count prompts that lose their end before the denoiser sees them.

    Args:
        prompts (`Sequence[str]`):
            Any number.
        limits (`Sequence[tuple[tokenizer, int]]`):
            The tokenizers and the number of tokens each of them may give, special ones included.

    Returns:
        `tuple[int, int]`: prompts that at least one of them cuts, and the smallest of the limits.
    """
    cut: set[int] = set()
    for tokenizer, limit in limits:
        encoded = tokenizer(list(prompts), truncation=False, verbose=False).input_ids
        cut |= {index for index, ids in enumerate(encoded) if len(ids) > limit}
    return len(cut), min(limit for _, limit in limits)


@contextmanager
def frozen_pass(device: torch.device) -> Iterator[None]:
    """
    Run what is not trained without gradient, and without the autocast of `bf16=True` or `fp16=True`.

    Under autocast an autoencoder kept in float32 would compute in half precision all the same, and that of SDXL
    overflows in float16.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


def flow_schedule(pipeline: DiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """
    The noise levels that a flow-matching pipeline was made for.

    Made from the config of the pipeline's scheduler, not from its state, which generation overwrites. Where the shift
    depends on the resolution (`use_dynamic_shifting`, FLUX) the levels are the unshifted ones, as diffusers' training
    examples use them.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            With any flow-matching scheduler.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: sigmas (N,) in (0, 1], falling, and the times N·σ; float32.

    Raises:
        ValueError: for a scheduler that knows nothing of flows.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = pipeline.scheduler.config
    # Solvers such as UniPC call it `flow_shift`. A scheduler made from another one's config holds both names: the one
    # the model came with, and its own at the default 1, which is no shift.
    shifts = [config[name] for name in ("shift", "flow_shift") if name in config]
    if not shifts:
        raise ValueError(
            f"{type(pipeline.scheduler).__name__} is no scheduler for flow matching, so the noise levels of "
            f"{type(pipeline).__name__} are not known. Set `pipe.scheduler` back to the one the model came with."
        )
    shift = next((value for value in shifts if value != 1), 1.0)
    # Not `from_config`, which complains of every setting of another class.
    schedule = FlowMatchEulerDiscreteScheduler(
        config["num_train_timesteps"], shift, use_dynamic_shifting=config.get("use_dynamic_shifting", False)
    )
    return schedule.sigmas, schedule.timesteps


class ModelFamily(abc.ABC):
    """
    A pipeline seen as a likelihood model: how to encode, what to call, what to save.

    Args:
        pipeline (`diffusers.DiffusionPipeline`):
            Used in place. Every component is frozen and set to eval mode; the trainer decides what trains.
        origin ([`ModelOrigin`]):
            Where it came from.
        settings ([`FamilySettings`], *optional*):
            Choices of the run.

    Raises:
        ValueError: for a pipeline that lacks a required component.
    """

    denoiser_name: str
    """Component that is trained: `"unet"` or `"transformer"`."""

    default_target_modules: tuple[str, ...]
    """LoRA targets where the user gives none."""

    required_components: tuple[str, ...] = ()
    """Components of the pipeline that may not be `None`."""

    likelihood: Likelihood

    pipeline_tag = "text-to-image"
    """The task on the Hub."""

    num_frames: int | None = None
    """Frames of a training clip; `None` for models of images."""

    def __init__(
        self, pipeline: DiffusionPipeline, origin: ModelOrigin, settings: FamilySettings | None = None
    ) -> None:
        self.pipeline = pipeline
        self.origin = origin
        self.settings = settings or FamilySettings()
        missing = [name for name in self.required_components if getattr(pipeline, name, None) is None]
        if missing:
            raise ValueError(
                f"The {type(pipeline).__name__} has no {', '.join(missing)}, which training needs. Load it without "
                f"`{missing[0]}=None`."
            )
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.requires_grad_(False)
                component.eval()

    @property
    def denoiser(self) -> ModelMixin:
        """The network that is trained."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return self.denoiser.device

    @property
    @abc.abstractmethod
    def native_resolution(self) -> int:
        """Side in pixels that the model was made for."""

    @property
    def native_size(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for."""
        return self.native_resolution, self.native_resolution

    @property
    @abc.abstractmethod
    def resolution_multiple(self) -> int:
        """Sides in pixels must be multiples of this."""

    @abc.abstractmethod
    def count_long_prompts(self, prompts: Sequence[str]) -> tuple[int, int]:
        """Return how many prompts the text encoder cuts, and the number of tokens it takes."""

    @abc.abstractmethod
    def encode_unique_prompts(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """Return the conditioning, one row a prompt, as keyword arguments of the denoiser."""

    def encode_images(self, pixels: torch.Tensor, rows: RowGenerators, *, sample: bool) -> torch.Tensor:
        """
        Encode images or clips into scaled latents; by default with a KL autoencoder, in the dtype it was loaded in.

        Args:
            pixels (`torch.Tensor`):
                (B, 3, H, W), or (B, 3, F, H, W) for models of videos, float32 in [-1, 1].
            rows ([`RowGenerators`]):
                Source of the posterior sample.
            sample (`bool`):
                Sample the posterior, or take its mode.

        Returns:
            `torch.Tensor`: (B, C, h, w) or (B, C, f, h, w) in the denoiser's dtype.
        """
        vae = self.pipeline.vae
        with frozen_pass(vae.device):
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            latents = posterior.mean
            if sample:
                latents = latents + posterior.std * rows.normal("latent", latents).to(latents.dtype)
            return self.scale_latents(latents).to(self.denoiser.dtype)

    def scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """
        Bring latents (B, C, ...) of the autoencoder to the unit of the denoiser, as the autoencoder's config says.

        By mean and deviation of each channel (Wan, some of SDXL), shift and scale, whichever the config has.
        """
        config = self.pipeline.vae.config
        mean, std = config.get("latents_mean"), config.get("latents_std")
        if mean is not None and std is not None:
            shape = (-1, *[1] * (latents.dim() - 2))
            latents = (latents - latents.new_tensor(mean).view(shape)) / latents.new_tensor(std).view(shape)
        return (latents - (config.get("shift_factor") or 0.0)) * (config.get("scaling_factor") or 1.0)

    @abc.abstractmethod
    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """Call the denoiser, or a wrapper of it, on a draw; returns (B, ...) in its dtype."""

    def condition_on_size(self, geometry: torch.Tensor, resolution: tuple[int, int]) -> dict[str, torch.Tensor]:
        """
        Conditioning on the images' own sizes and crops, for models that take it.

        Args:
            geometry (`torch.Tensor`):
                (B, 4) integers: height and width of the image, top and left of the crop in the resized image.
            resolution (`tuple[int, int]`):
                (height, width) of the training pixels.

        Returns:
            `dict[str, torch.Tensor]`: keyword arguments of the denoiser with B rows; by default none.
        """
        return {}

    def condition(
        self, prompts: Sequence[str], geometry: torch.Tensor, resolution: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """
        Everything the denoiser is conditioned on, without gradient; each distinct prompt is encoded once, by text
        encoders in the dtype they were loaded in.

        Args:
            prompts (`Sequence[str]`):
                B prompts; an empty string is the unconditional prompt.
            geometry (`torch.Tensor`):
                As in [`~ModelFamily.condition_on_size`].
            resolution (`tuple[int, int]`):
                As there.

        Returns:
            `dict[str, torch.Tensor]`: keyword arguments of the denoiser with B rows.
        """
        unique = list(dict.fromkeys(prompts))
        index = torch.tensor([unique.index(prompt) for prompt in prompts])
        with frozen_pass(self.device):
            encoded = self.encode_unique_prompts(unique)
            rows = {name: value[index.to(value.device)] for name, value in encoded.items()}
            return {**rows, **self.condition_on_size(geometry, resolution)}

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's activations in the backward pass; diffusers' own switch."""
        self.denoiser.enable_gradient_checkpointing()

    def probe_pixels(self, rows: RowGenerators) -> torch.Tensor:
        """Pixels (1, 3, H, W) of one random image in [-1, 1], for `probe`; far smaller than the model's own size."""
        side = min(self.native_resolution, 8 * self.resolution_multiple)  # UNets halve latents up to three times
        return rows.normal("probe", torch.empty(1, 3, side, side)).clamp(-1, 1)

    def probe(self) -> torch.Tensor:
        """Output of the denoiser on one small fixed input, for comparing a model with itself."""
        rows = RowGenerators(0, 0, [0])
        with torch.no_grad():
            pixels = self.probe_pixels(rows).to(self.device)
            height, width = pixels.shape[-2:]
            conditioning = self.condition(["a probe"], torch.tensor([[height, width, 0, 0]]), (height, width))
            draw = self.likelihood.draw(self.encode_images(pixels, rows, sample=False), rows)
            return self.predict(self.denoiser, draw, conditioning)

    def to(self, device: torch.device | str) -> ModelFamily:
        """Move every component."""
        self.pipeline.to(device)
        return self

    def usage(self, location: str, prompt: str) -> str:
        """
        A Python snippet that loads the base model and the adapter and makes an image.

        Args:
            location (`str`):
                What to hand to `load_lora_weights`: Hub id or folder.
            prompt (`str`):
                Any text.

        Returns:
            `str`: source code.
        """
        return "\n".join([*self._loading_lines(), f"pipe.load_lora_weights({location!r})", *self._image_lines(prompt)])

    def full_usage(self, location: str, prompt: str) -> str:
        """The same for a fully fine-tuned denoiser saved under `location`."""
        name = self.denoiser_name
        load = f'{type(self.denoiser).__name__}.from_pretrained({location!r}, subfolder="{name}")'
        lines = [f"from diffusers import {type(self.denoiser).__name__}", *self._loading_lines()]
        return "\n".join([*lines, f"pipe.{name} = {load}", *self._image_lines(prompt)])

    def peft_usage(self, location: str, prompt: str) -> str:
        """The same for an adapter in PEFT's own format saved under `location`."""
        name = self.denoiser_name
        load = f"pipe.{name} = PeftModel.from_pretrained(pipe.{name}, {location!r})"
        lines = ["from peft import PeftModel", *self._loading_lines(), load]
        return "\n".join([*lines, *self._image_lines(prompt)])

    def merged_usage(self, location: str, prompt: str) -> str:
        """The same for a complete pipeline saved under `location`, with the trained weights in it."""
        lines = [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({location!r})",
        ]
        return "\n".join([*lines, *self._image_lines(prompt)])

    def _loading_lines(self) -> list[str]:
        if self.origin.loading_code:
            return self.origin.loading_code.splitlines()
        source = self.origin.hub_id or "path/to/the/base/model"
        revision = f", revision={self.origin.revision!r}" if self.origin.hub_id and self.origin.revision else ""
        return [
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({source!r}{revision})",
        ]

    def _image_lines(self, prompt: str) -> list[str]:
        return [f"image = pipe({prompt!r}{self.origin.call_text}).images[0]", 'image.save("sample.png")']
