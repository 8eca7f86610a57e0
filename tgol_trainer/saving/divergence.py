"""Notice losses and weights that are not finite, without waiting for the device at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class TrainingDivergedError(FloatingPointError):
    """A loss or a weight became NaN or infinite; the message names the usual causes and the last good checkpoint."""


class FiniteWatch:
    """
    The first loss of a run that was not finite, with its step.

    It is kept on the device, so that adding a loss waits for nothing.

    Args:
        device (`torch.device`): Device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.zeros(2, device=device)

    def add(self, loss: torch.Tensor, step: int) -> None:
        """Look at the loss of a step; steps count from 1."""
        loss = loss.detach().float()
        found = torch.stack([torch.full_like(loss, step), loss])
        self._first = torch.where(torch.isfinite(loss) | (self._first[0] > 0), self._first, found)

    def first(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> tuple[int, float] | None:
        """
        Return the first step of any process whose loss was not finite, and that loss; `None` if there is none.

        Args:
            gather (`Callable`):
                Concatenates a (1, 2) tensor over processes, such as `Accelerator.gather`. Every process must call.
        """
        found = [(int(step), loss) for step, loss in gather(self._first.unsqueeze(0)).tolist() if step]
        return min(found, key=lambda pair: pair[0]) if found else None


def all_finite(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Return whether all elements are finite, as a (1,) tensor on the device; of a sharded tensor, those held here."""
    local = [value.to_local() if hasattr(value, "to_local") else value for value in parameters]
    return torch.stack([torch.isfinite(value.detach()).all() for value in local]).all().reshape(1)
