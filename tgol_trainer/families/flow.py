"""What the flow-matching families share: noise levels, likelihood, and the call of a transformer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from tgol_trainer.likelihoods import Draw, FlowLikelihood, Levels

from .base import ModelFamily
from .conditioning import Conditioning

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class FlowFamily(ModelFamily):
    """A pipeline whose transformer predicts the velocity, or its opposite."""

    denoiser_name = "transformer"

    default_density = "uniform"
    """Density of times where the run sets none, as in [`FlowLikelihood`]."""

    time_divisor = 1
    """What the scheduler's times, up to 1000, are divided by for the transformer."""

    velocity_sign = 1
    """-1 where the transformer predicts `latents - noise`, and the pipeline negates it."""

    default_guidance = 3.5  # FLUX.1 and FLUX.2 dev, as diffusers' examples train them
    """Guidance that a transformer distilled with guidance is given where the run sets none."""

    def make_likelihood(self) -> FlowLikelihood:
        """Return the likelihood on the pipeline's own noise levels."""
        sigmas, timesteps = self.schedule()
        density = self.settings.timestep_sampling or self.default_density
        return FlowLikelihood(sigmas, self.network_times(timesteps), density, self.sampled_levels)

    def guidance(self, latents: torch.Tensor) -> torch.Tensor | None:
        """Return the run's guidance (B,) for a transformer distilled with guidance, `None` for others."""
        if not self.denoiser.config.get("guidance_embeds"):
            return None
        value = self.default_guidance if self.settings.guidance is None else self.settings.guidance
        return torch.full((len(latents),), value, device=latents.device)

    def schedule(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise levels (N,) to train on, falling, and the scheduler's times (N,); see [`flow_schedule`]."""
        return flow_schedule(self.pipeline)

    def network_times(self, times: torch.Tensor) -> torch.Tensor:
        """Return the scheduler's times, 1000·σ, as the transformer takes them."""
        return times / self.time_divisor

    def num_tokens(self, latents: torch.Tensor) -> int:
        """Return how many tokens the transformer makes of an image's or clip's latents (B, C, ...)."""
        patch = self.denoiser.config.get("patch_size") or 1
        sides = latents.shape[2:]
        patches = patch if isinstance(patch, (list, tuple)) else [1] * (len(sides) - 2) + [patch, patch]
        return math.prod(side // part for side, part in zip(sides, patches, strict=True))

    def resolution_shift(self, num_tokens: int) -> float:
        """Return the pipeline's shift μ for an image of so many tokens."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipeline.scheduler.config
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        return calculate_shift(num_tokens, *(config[name] for name in names))

    def sampled_levels(self, latents: torch.Tensor) -> Levels:
        """Return the noise levels on which the pipeline samples an image of the size of latents, and their times."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        sigmas, times = self.schedule()
        config = self.pipeline.scheduler.config
        if config.get("use_dynamic_shifting"):
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
            shift = self.resolution_shift(self.num_tokens(latents))
            sigmas = scheduler.time_shift(shift, 1.0, sigmas)
            sigmas = scheduler.stretch_shift_to_terminal(sigmas) if config.get("shift_terminal") else sigmas
            times = sigmas * config["num_train_timesteps"]
        return sigmas, self.network_times(times)

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity in the shape of the latents."""
        output = model(hidden_states=draw.inputs, timestep=draw.timesteps, return_dict=False, **conditioning)[0]
        return self.velocity_sign * output


class RowByRowFamily(FlowFamily):
    """A pipeline whose transformer does not hide padding: rows go one by one, each with a prompt of its own length."""

    list_arguments = ("encoder_hidden_states",)

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity in the shape of the latents."""
        rows = []
        for number in range(len(draw.inputs)):
            row = Draw(*(value[number][None] for value in (draw.inputs, draw.timesteps, draw.target)))
            own: Conditioning = {name: value[number][None] for name, value in conditioning.items()}
            rows.append(self.predict_row(model, row, own))
        return torch.cat(rows)

    def predict_row(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity of one row, in the shape of its latents."""
        return super().predict(model, draw, conditioning)


class PipelineSizedFamily(FlowFamily):
    """A pipeline that has the model's size, while the transformer has none or a smaller one."""

    @property
    def native_size(self) -> tuple[int, int]:
        """The pipeline's default."""
        side = self.pipeline.default_sample_size * self.pipeline.vae_scale_factor
        return side, side


class PackedFlowFamily(PipelineSizedFamily):
    """
    A pipeline whose transformer takes latents as a row of tokens, one for each square of `patch`×`patch` latents.

    Latents, noise and velocity are images (B, C, h, w) outside the transformer; cutting them into patches only moves
    numbers, so the error is the same. Videos (B, C, f, h, w) have one token for each latent.
    """

    patch = 2
    """Side in latents of what the transformer takes as one token."""

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the side of two latents, which the autoencoder or a patch joins."""
        return self.pipeline.vae_scale_factor * 2

    def num_tokens(self, latents: torch.Tensor) -> int:
        """Return how many tokens the transformer gets of an image's latents (B, C, h, w)."""
        return math.prod(side // self.patch for side in latents.shape[2:])

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return further arguments of the transformer for latents (B, C, h, w): positions of tokens, guidance."""
        return {}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity in the shape of the latents."""
        inputs, patch = draw.inputs, self.patch
        grid = (*inputs.shape[2:-2], inputs.shape[-2] // patch, inputs.shape[-1] // patch)
        tokens = model(
            hidden_states=pixel_unshuffle(inputs, patch).flatten(2).transpose(1, 2),
            timestep=draw.timesteps,
            return_dict=False,
            **self.token_arguments(inputs, conditioning),
            **conditioning,
        )[0][:, -math.prod(grid) :]  # after the text, where that comes out too
        return self.velocity_sign * pixel_shuffle(tokens.transpose(1, 2).contiguous().unflatten(2, grid), patch)


def grid_positions(height: int, width: int) -> torch.Tensor:
    """Zero, row and column (height·width, 3) of each token of an image, for rotary embeddings; float32."""
    rows, columns = torch.meshgrid(torch.arange(float(height)), torch.arange(float(width)), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)


def flow_schedule(pipeline: DiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Return the noise levels that a flow-matching pipeline was made for.

    They come from the config of the pipeline's scheduler, not from its state, which generation overwrites. Where the
    shift depends on the resolution (`use_dynamic_shifting`, FLUX) the levels are the unshifted ones, as diffusers'
    training examples use them.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: sigmas (N,) in (0, 1], falling, and the times N·σ; float32.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    config = pipeline.scheduler.config
    # Solvers such as UniPC call it `flow_shift`. A scheduler made from another one's config holds both names: the one
    # the model came with, and its own at the default 1, which is no shift.
    shifts = [config[name] for name in ("shift", "flow_shift") if name in config]
    if not shifts:
        raise ValueError(
            f"{type(pipeline.scheduler).__name__} is not a scheduler for flow matching, so the noise levels of "
            f"{type(pipeline).__name__} are not known. Set `pipe.scheduler` back to the one the model came with."
        )
    shift = next((value for value in shifts if value != 1), 1.0)
    # Not `from_config`, which complains of every setting of another class.
    schedule = FlowMatchEulerDiscreteScheduler(
        config["num_train_timesteps"], shift, use_dynamic_shifting=config.get("use_dynamic_shifting", False)
    )
    return schedule.sigmas, schedule.timesteps
