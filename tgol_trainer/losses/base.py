"""What every loss returns, and the check that its arguments share."""

from __future__ import annotations

from typing import NamedTuple

import torch


class LossRecord(NamedTuple):
    """
    What a loss function returns, one value an example.

    Args:
        loss (`torch.Tensor`): (B,) float32 loss; its mean is minimised.
        implicit_reward (`torch.Tensor`): (B,) float32 ŝ = β·log(π_θ/π_ref), with gradient.
        label (`torch.Tensor`): (B,) bool pseudo-label, true where the score reaches the threshold.
        weight (`torch.Tensor`): (B,) float32 weight of the example.
    """

    loss: torch.Tensor
    implicit_reward: torch.Tensor
    label: torch.Tensor
    weight: torch.Tensor


def check_vectors(**vectors: torch.Tensor) -> None:
    """Raise ValueError unless all tensors are (B,) of one length; the message names them."""
    shapes = {name: tuple(vector.shape) for name, vector in vectors.items()}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        names = " and ".join(f"`{name}`" for name in shapes)
        found = " and ".join(str(shape) for shape in shapes.values())
        raise ValueError(f"{names} must all be (B,), got {found}.")
