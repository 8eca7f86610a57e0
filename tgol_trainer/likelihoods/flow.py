"""The likelihood of flow-matching models, which predict the velocity `noise - latents`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch

from .base import Draw, RowGenerators, SquaredError, per_row, to_device

DENSITIES = ("uniform", "logit_normal", "shifted")

Levels: TypeAlias = tuple[torch.Tensor, torch.Tensor]
"""Noise levels σ (N,) in [0, 1], falling, and the same times as the network takes them."""


class FlowLikelihood(SquaredError):
    """
    The velocity surrogate `log π(y|x) ≈ -MSE(noise - latents, prediction)/T` (paper, Sec. 3.5).

    The error is always that of the velocity. Some training scripts compare clean latents instead, which weights the
    same difference by σ² (diffusers' example for SD3, `precondition_outputs=1`); a likelihood must not depend on that.

    Args:
        sigmas (`torch.Tensor`):
            (N,) noise levels in [0, 1] of a schedule made for this purpose, never a pipeline's live one: generation
            overwrites that one's.
        timesteps (`torch.Tensor`): (N,) the same times as the network takes them.
        density (`str`, *optional*, defaults to `"uniform"`):
            How a place u in [0, 1) of the schedule is drawn: `"uniform"`, or `"logit_normal"`, the sigmoid of a
            standard normal number (arXiv 2403.03206, Sec. 3.1). `"shifted"` draws it uniformly on the levels that the
            sampler takes at the size of the latents.
        sampled_levels (`Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]`, *optional*):
            Returns those levels and times for latents (B, ...); by default `sigmas` and `timesteps` at every size.

    Raises:
        ValueError: for an unknown density.
    """

    def __init__(
        self,
        sigmas: torch.Tensor,
        timesteps: torch.Tensor,
        density: str = "uniform",
        sampled_levels: Callable[[torch.Tensor], Levels] | None = None,
    ) -> None:
        if density not in DENSITIES:
            raise ValueError(f"`timestep_sampling` is {density!r}. Supported: {', '.join(DENSITIES)}")
        self.sigmas, self.timesteps, self.density = sigmas.float(), timesteps.float(), density
        self.sampled_levels = sampled_levels if density == "shifted" else None

    def draw(self, latents: torch.Tensor, rows: RowGenerators) -> Draw:
        """
        Draw a time and Gaussian noise for each row of scaled latents (B, ...).

        The `inputs` are `(1-σ)·x0 + σ·ε`, the `target` is `ε - x0`.
        """
        sigmas, timesteps = self.sampled_levels(latents) if self.sampled_levels else (self.sigmas, self.timesteps)
        if self.density == "logit_normal":
            places = torch.sigmoid(rows.normal("timestep", torch.empty(len(rows.row_ids))))
        else:
            places = rows.uniform("timestep")
        index = places.mul(len(sigmas)).long().clamp_(max=len(sigmas) - 1)
        noise = rows.normal("noise", latents)
        clean = latents.float()
        sigma = per_row(sigmas[index], latents)
        noised = (1 - sigma) * clean + sigma * noise
        times, level = (to_device(values[index], latents.device) for values in (timesteps, sigmas))
        return Draw(noised.to(latents.dtype), times, noise - clean, noise_level=level)

    def denoised(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """`x_σ - σ·v`."""
        if draw.noise_level is None:
            raise ValueError("The draw has no `noise_level`: make it with `FlowLikelihood.draw`.")
        noised = draw.inputs.float()
        return noised - per_row(draw.noise_level, noised) * prediction.float()

    def targets(self, latents: torch.Tensor, rows: RowGenerators) -> dict[str, torch.Tensor]:
        """Return `ε - x0`, its opposite, ε and x0."""
        noise, clean = rows.normal("noise", latents), latents.float()
        return {
            "noise - latents": noise - clean,
            "latents - noise": clean - noise,
            "the noise": noise,
            "the clean latents": clean,
        }
