"""DDPM-type models: the network predicts the noise, the velocity v or the clean latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Draw, RowGenerators, mean_over_features

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DiffusionLikelihood:
    """
    The denoising surrogate `log π(y|x) ≈ -MSE(target, prediction)/T` (paper, Sec. 3.5).

    Args:
        scheduler (`diffusers.DDPMScheduler`):
            A training scheduler made for this purpose, never a pipeline's live one: generation overwrites that one's
            timesteps. `prediction_type` is read from its config.
    """

    temperature_applies = True

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.prediction_type: str = scheduler.config["prediction_type"]
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"The scheduler predicts {self.prediction_type!r}. Supported: {', '.join(PREDICTION_TYPES)}"
            )
        self.alphas_cumprod = scheduler.alphas_cumprod.float()

    def draw(self, latents: torch.Tensor, rows: RowGenerators) -> Draw:
        """
        Draw a uniform timestep and Gaussian noise for each row.

        Args:
            latents (`torch.Tensor`):
                (B, C, H, W) scaled latents.
            rows ([`RowGenerators`]):
                Source of every random number.

        Returns:
            [`Draw`]: `inputs` is `√ā·x0 + √(1-ā)·ε`; `target` is ε, `√ā·ε - √(1-ā)·x0` or x0.
        """
        timesteps = rows.integers("timestep", len(self.alphas_cumprod))
        noise = rows.normal("noise", latents)
        clean = latents.float()
        alpha = self.alphas_cumprod[timesteps].to(latents.device).view(-1, *[1] * (latents.dim() - 1))
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = signal * noise - sigma * clean
        else:
            target = clean
        return Draw((signal * clean + sigma * noise).to(latents.dtype), timesteps.to(latents.device), target)

    def error(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Mean squared error over all non-batch dimensions: (B,) float32, computed in float32."""
        return mean_over_features((prediction.float() - draw.target) ** 2)
