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
        timesteps, noise = rows.integers("timestep", len(self.alphas_cumprod)), rows.normal("noise", latents)
        signal, sigma = self._levels(timesteps, latents)
        noised = (signal * latents.float() + sigma * noise).to(latents.dtype)
        target = self._target(self.prediction_type, latents, noise, signal, sigma)
        level = to_device(timesteps / len(self.alphas_cumprod), latents.device)
        return Draw(noised, to_device(timesteps, latents.device), target, noise_level=level)

    def targets(self, latents: torch.Tensor, rows: RowGenerators) -> dict[str, torch.Tensor]:
        """Return ε, v, x0 and their opposites, by the names of `prediction_type`."""
        timesteps, noise = rows.integers("timestep", len(self.alphas_cumprod)), rows.normal("noise", latents)
        levels = self._levels(timesteps, latents)
        kinds = sorted(PREDICTION_TYPES, key=lambda kind: kind != self.prediction_type)
        found = {kind: self._target(kind, latents, noise, *levels) for kind in kinds}
        return found | {f"minus {kind}": -target for kind, target in found.items()}

    def denoised(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """`(x_t - √(1-ā)·ε)/√ā`, `√ā·x_t - √(1-ā)·v` or x0; 0 for a model of ε where nothing is left, at ā = 0."""
        prediction, noised = prediction.float(), draw.inputs.float()
        if self.prediction_type == "sample":
            return prediction
        alpha = per_row(to_device(self.alphas_cumprod, noised.device)[draw.timesteps], noised)
        signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
        if self.prediction_type == "v_prediction":
            return signal * noised - sigma * prediction
        return torch.where(signal > 0, (noised - sigma * prediction) / signal.clamp(min=1e-12), 0.0)

    def _levels(self, timesteps: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = per_row(self.alphas_cumprod[timesteps], latents)
        return alpha.sqrt(), (1 - alpha).sqrt()

    @staticmethod
    def _target(
        kind: str, latents: torch.Tensor, noise: torch.Tensor, signal: torch.Tensor, sigma: torch.Tensor
    ) -> torch.Tensor:
        if kind == "epsilon":
            return noise
        return signal * noise - sigma * latents.float() if kind == "v_prediction" else latents.float()
