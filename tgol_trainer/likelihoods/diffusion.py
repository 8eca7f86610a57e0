"""The likelihood of models of the DDPM type, which predict the noise, the velocity v or the clean latents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .base import Draw, RowGenerators, SquaredError, per_row, to_device

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


class DiffusionLikelihood(SquaredError):
    """
    The denoising surrogate `log π(y|x) ≈ -MSE(target, prediction)/T` (paper, Sec. 3.5).

    Args:
        scheduler (`diffusers.DDPMScheduler`):
            A training scheduler made for this purpose, never a pipeline's live one: generation overwrites that one's
            timesteps. `prediction_type` is read from its config.

    Raises:
        ValueError: for an unknown `prediction_type`.
    """

    def __init__(self, scheduler: DDPMScheduler) -> None:
        self.prediction_type: str = scheduler.config["prediction_type"]
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(
                f"The scheduler predicts {self.prediction_type!r}. Supported: {', '.join(PREDICTION_TYPES)}"
            )
        self.alphas_cumprod = scheduler.alphas_cumprod.float()

    def draw(self, latents: torch.Tensor, rows: RowGenerators) -> Draw:
        """
        Draw a uniform timestep and Gaussian noise for each row of scaled latents (B, ...).

        The `inputs` are `√ā·x0 + √(1-ā)·ε`, the `target` is ε, `√ā·ε - √(1-ā)·x0` or x0.
        """
        timesteps = rows.integers("timestep", len(self.alphas_cumprod))
        noise = rows.normal("noise", latents)
        clean = latents.float()
        alpha = per_row(self.alphas_cumprod[timesteps], latents)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "epsilon":
            target = noise
        elif self.prediction_type == "v_prediction":
            target = signal * noise - sigma * clean
        else:
            target = clean
        return Draw((signal * clean + sigma * noise).to(latents.dtype), to_device(timesteps, latents.device), target)
