"""How far a trained network of the alignment benchmark is from its base model, and an adapter scaled to a drift."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from alignment_methods import CSFT_SUFFIXES

METER_ROWS = 96


class Meter:
    """Measure how far a trained network is from the base model, on fixed noised latents with evenly spaced times."""

    def __init__(self, training: Any) -> None:
        from tgol_trainer.likelihoods import Draw, RowGenerators

        self.training = training
        family, rows = training.family, training.rows
        chosen = np.random.default_rng(0).choice(len(rows.prompts), METER_ROWS, replace=False)
        alphas = family.likelihood.alphas_cumprod
        places = (torch.arange(METER_ROWS) + 0.5) / METER_ROWS * len(alphas)
        times = places.long()
        latents = rows.latents[chosen]
        noise = RowGenerators(0, 0, chosen.tolist()).normal("meter", latents)
        kept = alphas[times].view(-1, 1, 1, 1)
        self.draw = Draw(kept.sqrt() * latents + (1 - kept).sqrt() * noise, times, noise)
        suffix = CSFT_SUFFIXES[0] if training.method.suffixed else ""
        self.conditioning = training.conditioning([rows.prompts[row] + suffix for row in chosen])
        # Between two DDPM chains that differ in the predicted noise by D, a step adds β²|D|²/(2·β·α·(1 - ᾱ)) nats.
        betas = 1 - alphas / torch.cat([torch.ones(1), alphas[:-1]])
        per_step = betas / (2 * (1 - betas) * (1 - alphas))
        self.nats = per_step[times] * len(alphas) * latents[0].numel()
        scale_adapter(family.denoiser, 0.0)
        self.before = self._predict()
        scale_adapter(family.denoiser, 1.0)

    def _predict(self) -> torch.Tensor:
        with torch.no_grad():
            return self.training.family.predict(self.training.family.denoiser, self.draw, self.conditioning)

    def __call__(self) -> tuple[float, float]:
        """Return the drift, and the divergence of sampling paths in nats."""
        squares = (self._predict() - self.before).double().square().flatten(1).mean(1)
        return 1000 * squares.mean().item(), (squares * self.nats).mean().item()

    def scale_to(self, drift: float) -> tuple[float, float, float]:
        """Scale the adapter until the drift is within 1 % of a value; return the scale, the drift and the nats."""
        denoiser, scale = self.training.family.denoiser, 1.0
        low, high = 0.0, math.inf
        for _ in range(12):
            scale_adapter(denoiser, scale)
            found, nats = self()
            if abs(found / drift - 1) < 0.01:
                break
            low, high = (scale, high) if found < drift else (low, scale)
            guess = scale * math.sqrt(drift / max(found, 1e-12))  # drift grows with the square of the scale
            inside = low < guess < high
            scale = guess if inside else (low + high) / 2
        return scale, found, nats


def scale_adapter(denoiser: Any, scale: float) -> None:
    """Multiply the adapter's update by a number, counted from its trained size."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in denoiser.modules():
        if isinstance(module, BaseTunerLayer):
            module.set_scale("default", scale)
