"""Log-ratios in units of the reference's own error, so that one temperature suits models of any size."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class ErrorProfile:
    """
    The reference's mean error by time.

    Args:
        means (`torch.Tensor`): (N,) float32 mean error in N equal bins of the times from 0 to `highest`.
        highest (`float`): The largest time, in the unit of `Draw.timesteps`.
    """

    means: torch.Tensor
    highest: float

    @classmethod
    def measure(
        cls, timesteps: torch.Tensor, errors: torch.Tensor, highest: float, num_bins: int = 20
    ) -> ErrorProfile:
        """
        Average errors in bins of time.

        Args:
            timesteps (`torch.Tensor`): (M,) times of draws.
            errors (`torch.Tensor`): (M,) the reference's errors on them.
            highest (`float`): The largest time there is.
            num_bins (`int`, *optional*, defaults to 20): Number of bins. A bin without a draw takes the mean of all.

        Returns:
            [`ErrorProfile`]
        """
        place = _bins(timesteps, highest, num_bins)
        count = torch.bincount(place, minlength=num_bins)
        total = torch.bincount(place, errors.double().cpu(), minlength=num_bins)
        means = torch.where(count > 0, total / count.clamp(min=1), errors.double().mean().cpu())
        return cls(means.float(), highest)

    def scale(self, timesteps: torch.Tensor, power: float = 1.0) -> torch.Tensor:
        """
        Return what to divide the errors of draws by: `ē(t)^p·ē^(1 - p)`, with ē the mean over bins.

        Args:
            timesteps (`torch.Tensor`): (B,) times.
            power (`float`, *optional*, defaults to 1.0): p. 0 is one number for all times, 1 evens the times out.

        Returns:
            `torch.Tensor`: (B,) float32 on the device of `timesteps`.
        """
        place = _bins(timesteps, self.highest, len(self.means))
        scale = self.means[place] ** power * self.means.mean() ** (1 - power)
        return scale.to(timesteps.device)


def calibrated_log_ratio(
    error: torch.Tensor, reference_error: torch.Tensor, scale: torch.Tensor, temperature: float
) -> torch.Tensor:
    """
    Log-ratio in units of the reference's usual error: `(m_ref - m_θ)/(T·scale)`.

    Dividing by the error of the same kind of draw makes T a pure number: it means the same for a latent of 256 values
    and one of 16,384, for noise and for velocities.

    Args:
        error (`torch.Tensor`): (B,) the policy's error.
        reference_error (`torch.Tensor`): (B,) the reference's, on the same draw.
        scale (`torch.Tensor`): (B,) from [`ErrorProfile.scale`].
        temperature (`float`): T > 0, without unit.

    Returns:
        `torch.Tensor`: (B,) float32.
    """
    return (reference_error.float() - error.float()) / (temperature * scale)


def relative_log_ratio(error: torch.Tensor, reference_error: torch.Tensor, temperature: float) -> torch.Tensor:
    """
    Log-ratio of a Gaussian whose variance is known to neither model and fitted to each: `(log m_ref - log m_θ)/T`.

    A Gaussian likelihood at its best variance is `-(n/2)·log m` up to a constant, n the number of elements, so that
    `T = 2/n` is the likelihood itself.

    Args:
        error (`torch.Tensor`): (B,) the policy's error, larger than 0.
        reference_error (`torch.Tensor`): (B,) the reference's, on the same draw.
        temperature (`float`): T > 0, without unit.

    Returns:
        `torch.Tensor`: (B,) float32.
    """
    return (reference_error.float().log() - error.float().log()) / temperature


def _bins(timesteps: torch.Tensor, highest: float, num_bins: int) -> torch.Tensor:
    return (timesteps.double().cpu() / highest * num_bins).long().clamp_(0, num_bins - 1)
