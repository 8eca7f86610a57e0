"""The likelihood of flow-matching models, which predict the velocity `noise - latents`."""

from __future__ import annotations

import torch

from .base import Draw, RowGenerators, SquaredError, per_row, to_device

DENSITIES = ("uniform", "logit_normal")


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
            standard normal number (arXiv 2403.03206, Sec. 3.1).

    Raises:
        ValueError: for an unknown density.
    """

    def __init__(self, sigmas: torch.Tensor, timesteps: torch.Tensor, density: str = "uniform") -> None:
        if density not in DENSITIES:
            raise ValueError(f"`timestep_sampling` is {density!r}. Supported: {', '.join(DENSITIES)}")
        self.sigmas, self.timesteps, self.density = sigmas.float(), timesteps.float(), density

    def draw(self, latents: torch.Tensor, rows: RowGenerators) -> Draw:
        """
        Draw a time and Gaussian noise for each row of scaled latents (B, ...).

        The `inputs` are `(1-σ)·x0 + σ·ε`, the `target` is `ε - x0`.
        """
        if self.density == "uniform":
            places = rows.uniform("timestep")
        else:
            places = torch.sigmoid(rows.normal("timestep", torch.empty(len(rows.row_ids))))
        index = places.mul(len(self.sigmas)).long().clamp_(max=len(self.sigmas) - 1)
        noise = rows.normal("noise", latents)
        clean = latents.float()
        sigma = per_row(self.sigmas[index], latents)
        noised = (1 - sigma) * clean + sigma * noise
        return Draw(noised.to(latents.dtype), to_device(self.timesteps[index], latents.device), noise - clean)
