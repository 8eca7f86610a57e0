"""Flow-matching models: the network predicts the velocity `noise - latents`."""

from __future__ import annotations

import torch

from .base import Draw, RowGenerators, mean_over_features

DENSITIES = ("uniform", "logit_normal")


class FlowLikelihood:
    """
    The velocity surrogate `log π(y|x) ≈ -MSE(noise - latents, prediction)/T` (paper, Sec. 3.5).

    The error is always that of the velocity. Some training scripts compare clean latents instead, which weights the
    same difference by σ² (diffusers' example for SD3, `precondition_outputs=1`); a likelihood must not depend on that.

    Args:
        sigmas (`torch.Tensor`):
            (N,) noise levels in [0, 1] of a schedule made for this purpose, never a pipeline's live one: generation
            overwrites that one's.
        timesteps (`torch.Tensor`):
            (N,) the same times as the network takes them.
        density (`str`, *optional*, defaults to `"uniform"`):
            How a place u in [0, 1) of the schedule is drawn: `"uniform"`, or `"logit_normal"`, the sigmoid of a
            standard normal number (arXiv 2403.03206, Sec. 3.1).

    Raises:
        ValueError: for an unknown density.
    """

    temperature_applies = True

    def __init__(self, sigmas: torch.Tensor, timesteps: torch.Tensor, density: str = "uniform") -> None:
        if density not in DENSITIES:
            raise ValueError(f"`timestep_sampling` is {density!r}. Supported: {', '.join(DENSITIES)}")
        self.sigmas, self.timesteps, self.density = sigmas.float(), timesteps.float(), density

    def draw(self, latents: torch.Tensor, rows: RowGenerators) -> Draw:
        """
        Draw a time and Gaussian noise for each row.

        Args:
            latents (`torch.Tensor`):
                (B, ...) scaled latents.
            rows ([`RowGenerators`]):
                Source of every random number.

        Returns:
            [`Draw`]: `inputs` is `(1-σ)·x0 + σ·ε`; `target` is `ε - x0`.
        """
        index = self._places(rows).mul(len(self.sigmas)).long().clamp_(max=len(self.sigmas) - 1)
        noise = rows.normal("noise", latents)
        clean = latents.float()
        sigma = self.sigmas[index].to(latents.device).view(-1, *[1] * (latents.dim() - 1))
        noised = (1 - sigma) * clean + sigma * noise
        return Draw(noised.to(latents.dtype), self.timesteps[index].to(latents.device), noise - clean)

    def _places(self, rows: RowGenerators) -> torch.Tensor:
        if self.density == "uniform":
            return rows.uniform("timestep")
        return torch.sigmoid(rows.normal("timestep", torch.empty(len(rows.row_ids))))

    def error(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Mean squared error over all non-batch dimensions: (B,) float32, computed in float32."""
        return mean_over_features((prediction.float() - draw.target) ** 2)
