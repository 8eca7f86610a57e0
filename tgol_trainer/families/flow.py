"""What the flow-matching families share: noise levels, likelihood, and the call of a transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tgol_trainer.likelihoods import Draw, FlowLikelihood

from .base import ModelFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class FlowFamily(ModelFamily):
    """A pipeline whose transformer predicts the velocity."""

    denoiser_name = "transformer"

    default_density = "uniform"
    """Density of times where the run sets none, as in [`FlowLikelihood`]."""

    time_divisor = 1
    """What the scheduler's times, up to 1000, are divided by for the transformer."""

    def make_likelihood(self) -> FlowLikelihood:
        """Return the likelihood on the pipeline's own noise levels."""
        sigmas, timesteps = flow_schedule(self.pipeline)
        density = self.settings.timestep_sampling or self.default_density
        return FlowLikelihood(sigmas, timesteps / self.time_divisor, density)

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: dict[str, torch.Tensor]) -> torch.Tensor:
        """Velocity in the shape of the latents."""
        return model(hidden_states=draw.inputs, timestep=draw.timesteps, return_dict=False, **conditioning)[0]


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
