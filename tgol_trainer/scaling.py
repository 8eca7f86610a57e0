"""Scale a trained adapter to a drift: how far the model has moved is chosen after training, by a number."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from . import adapters

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from .data import Collator, ScoredDataset

logger = logging.getLogger(__name__)

_MAX_ROUNDS, _TOLERANCE = 16, 0.01
_NUM_ROWS = 64
_WIDELY = 4.0


class Scaling(NamedTuple):
    """
    What an adapter was multiplied by, and its drift before and after.

    Args:
        scale (`float`): Factor of the trained update.
        before (`float`): Drift of the trained adapter.
        after (`float`): Drift of the scaled one.
    """

    scale: float
    before: float
    after: float


def scale_to_drift(model: ModelMixin, target: float, measure: Callable[[], float]) -> Scaling:
    """
    Multiply the policy's adapter by the number at which its drift is within 1 % of a target.

    The drift grows with about the square of the scale while the adapter is small. Each guess takes the power of the
    last two measurements; one outside the interval that is known to hold the target is replaced by a point inside.

    Args:
        model (`ModelMixin`): The denoiser with the policy's adapter, which is changed in place.
        target (`float`): The drift, larger than 0.
        measure (`Callable[[], float]`): Returns the drift of the model as it stands.

    Returns:
        [`Scaling`]

    Raises:
        ValueError: if the adapter changes nothing, or if no scale reaches the target.
    """
    scale, power, low, high = 1.0, 2.0, 0.0, math.inf
    before = found = measure()
    if not 0 < before < math.inf:
        raise ValueError(f"The drift of the trained adapter is {before}: there is nothing to scale to `target_drift`.")
    for _ in range(_MAX_ROUNDS):
        if abs(found / target - 1) < _TOLERANCE:
            if scale > _WIDELY:
                logger.warning(
                    "The adapter was multiplied by %.3g to reach `target_drift`, far beyond what was trained. Train "
                    "longer or at a higher learning rate.",
                    scale,
                )
            return Scaling(scale, before, found)
        low, high = (scale, high) if found < target else (low, scale)
        new = scale * (target / max(found, 1e-30)) ** (1 / power)
        if not low < new < high:
            new = math.sqrt(low * high) if low and high < math.inf else scale * (2 if found < target else 0.5)
        adapters.scale_policy(model, new / scale)
        again = measure()
        if again > 0 and found > 0:
            power = min(max(math.log(again / found) / math.log(new / scale), 0.5), 6.0)
        scale, found = new, again
    adapters.scale_policy(model, 1 / scale)
    raise ValueError(
        f"No scale of the adapter gives a drift of {target:g}; it is {before:.3g} as trained. The adapter is left as "
        "it was trained. Set `target_drift` nearer to that."
    )


def drift_of_rows(
    rows: ScoredDataset, collator: Collator, batch_size: int, changes: Callable[[dict[str, Any]], torch.Tensor]
) -> float:
    """
    Return the mean drift on rows that are spread evenly over a dataset, 64 at most.

    Args:
        rows (`ScoredDataset`): Training rows.
        collator (`Collator`): Makes batches of them.
        batch_size (`int`): Rows of a batch.
        changes (`Callable`): Returns the (B,) change of the prediction on a batch, on fixed draws of noise and time.
    """
    chosen = [int(place) for place in torch.linspace(0, len(rows) - 1, min(_NUM_ROWS, len(rows))).round()]
    found = [changes(collator([rows[row] for row in part])) for part in _parts(chosen, batch_size)]
    return float(torch.cat(found).double().mean())


def _parts(values: Sequence[int], size: int) -> list[Sequence[int]]:
    return [values[start : start + size] for start in range(0, len(values), size)]
