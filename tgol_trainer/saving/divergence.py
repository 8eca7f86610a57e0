"""Notice losses, gradients and weights that are not finite, without waiting for the device, and name the cause."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from tgol_trainer.metrics import RECORD

if TYPE_CHECKING:
    from tgol_trainer.config import TGOLConfig

_ERROR, _REFERENCE_ERROR, _WEIGHT = (RECORD.index(name) for name in ("error", "reference_error", "weight"))
_LARGE_WEIGHT = 1e30
"""Times a log-ratio, a larger one leaves the range of float32."""
_ROWS_NAMED = 8


class TrainingDivergedError(FloatingPointError):
    """A loss or a weight became NaN or infinite; the message names the cause and the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """
    The first micro-batch whose loss was not finite, or the first update whose gradient was not, if that came before.

    Args:
        step (`int`): Its update, counted from 1.
        loss (`float`, *optional*): Its loss; `None` for a gradient.
        reference_broken (`bool`): Whether an error of the reference was not finite; `False` for a loss without one.
        policy_broken (`bool`): Whether an error of the policy was not finite.
        weight (`float`): Largest confidence weight.
        rows (`list[int]`): Ids of its rows; empty on the other processes.
    """

    step: int
    loss: float | None
    reference_broken: bool = False
    policy_broken: bool = False
    weight: float = 0.0
    rows: list[int] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        what = "The norm of the gradient is not finite" if self.loss is None else f"The loss is {self.loss}"
        return f"{what} at step {self.step}."

    def cause(self, args: TGOLConfig, half: bool) -> str:
        """
        Return what broke the loss, as far as its parts tell.

        Args:
            args ([`TGOLConfig`]): Settings of the run.
            half (`bool`): Whether the model computes in float16.
        """
        if self.loss is None:
            return (
                f"The loss was finite: `temperature` {args.temperature:g}, `beta` {args.beta:g} or the confidence "
                "weights stretch its gradient beyond float32, or the weights have grown too large, which a lower "
                "`learning_rate` prevents."
            )
        named = ", ".join(map(str, self.rows[:_ROWS_NAMED])) + (", ..." if len(self.rows) > _ROWS_NAMED else "")
        rows = f" (rows of the batch: {named})" if self.rows else ""
        if self.reference_broken:
            remedy = "float16 overflows: use bfloat16 or float32." if half else "Load the model in another dtype."
            return (
                f"The reference's error is not finite either{rows}, so the learning rate is not the cause: the base "
                f"model, its autoencoder or a text encoder returns NaN for a row of this batch. {remedy}"
            )
        if not self.weight < _LARGE_WEIGHT:
            return (
                f"The largest confidence weight is {self.weight:g}{rows}: a score lies that far from the threshold. "
                "Mend the scores, or use `normalize_scores` or another `confidence_scale`."
            )
        if self.policy_broken:
            also = " float16 may also have overflowed: use bfloat16 or float32." if half else ""
            return (
                f"The reference's error is finite and the policy's is not, so training broke the weights: lower "
                f"`learning_rate` (it is {args.learning_rate:g}), or raise `warmup_steps`.{also}"
            )
        return (
            f"The errors of policy and reference are finite{rows}, and the loss made of them is not: `temperature` "
            f"{args.temperature:g} or `beta` {args.beta:g} stretches them too far, or the policy has moved very far, "
            "which a lower `learning_rate` prevents."
        )


class FiniteWatch:
    """
    The first loss or gradient of a run that was not finite, with its step and what broke it.

    It is kept on the device, so that looking waits for nothing.

    Args:
        device (`torch.device`): Device of the losses.
    """

    def __init__(self, device: torch.device) -> None:
        self._first = torch.zeros(5, device=device)
        self._gradient = torch.zeros(1, device=device)
        self._rows: list[tuple[int, torch.Tensor]] = []

    def add(self, loss: torch.Tensor, step: int, record: torch.Tensor, row_ids: torch.Tensor) -> None:
        """
        Look at the loss of a micro-batch.

        Args:
            loss (`torch.Tensor`): Scalar.
            step (`int`): Its update, counted from 1.
            record (`torch.Tensor`): (B, len(metrics.RECORD)) of its rows.
            row_ids (`torch.Tensor`): (B,) ids of its rows, on the CPU.
        """
        loss = loss.detach().float()
        broken = ~torch.isfinite(record[:, [_REFERENCE_ERROR, _ERROR]]).all(dim=0)
        found = torch.stack([torch.full_like(loss, step), loss, *broken.float(), record[:, _WEIGHT].max()])
        self._first = torch.where(torch.isfinite(loss) | (self._first[0] > 0), self._first, found)
        self._rows.append((step, row_ids))

    def add_gradient(self, broken: torch.Tensor, step: int) -> None:
        """Take in whether the gradient of an update is broken, as [`norm_overflows`] says."""
        self._gradient = torch.where(self._gradient > 0, self._gradient, broken * step)

    def first(self, gather: Callable[[torch.Tensor], torch.Tensor], *, reference: bool) -> Fault | None:
        """
        Return the first fault of any process; `None` if there is none.

        Args:
            gather (`Callable`):
                Concatenates a (1, 6) tensor over processes, such as `Accelerator.gather`. Every process must call.
            reference (`bool`): Whether the loss has a reference; without one its errors are NaN.
        """
        mine = torch.cat([self._first, self._gradient]).unsqueeze(0)
        rows, self._rows = self._rows, []
        every = gather(mine).tolist()
        found = [values[:5] for values in every if values[0]]
        gradients = [int(values[5]) for values in every if values[5]]
        if gradients and (not found or min(gradients) < min(found)[0]):
            return Fault(min(gradients), None)
        if not found:
            return None
        step, loss, reference_broken, policy_broken, weight = min(found)
        own = [ids for number, ids in rows if number == step] if mine[0, 0].item() == step else []
        return Fault(
            int(step),
            loss,
            reference and bool(reference_broken),
            bool(policy_broken),
            weight,
            [row for ids in own for row in ids.tolist()],
        )


class UpdateFilter:
    """
    Leave out updates whose loss or gradient is not finite on any process, and count them.

    A fused optimizer takes the decision on the device, and no step waits for it. With another optimizer the decision
    is read before each update, which waits. Under `fp16` the gradient scaler leaves updates out by itself, also sound
    ones while it looks for its scale, so that losses alone are counted.

    Args:
        device (`torch.device`): Device of the losses.
        count (`int`, *optional*, defaults to 0): Updates that an earlier part of the run left out.
    """

    def __init__(self, device: torch.device, count: int = 0) -> None:
        self._count = torch.full((), float(count), device=device)
        self._bad = torch.zeros((), device=device)
        self._last = torch.zeros((), device=device)
        self.known = count

    def add(self, loss: torch.Tensor) -> torch.Tensor:
        """Look at a micro-batch; return its loss for the log, where the last finite one stands for one that is not."""
        finite = torch.isfinite(loss)
        self._bad = torch.maximum(self._bad, (~finite).float())
        self._last = torch.where(finite, loss, self._last)
        return self._last.clone()

    def before_update(self, optimizer: torch.optim.Optimizer, broken: torch.Tensor | None) -> None:
        """
        Make the optimizer leave the update out if it must.

        Args:
            optimizer (`torch.optim.Optimizer`): The optimizer, whose gradients are complete.
            broken (`torch.Tensor`, *optional*): What [`norm_overflows`] says; `None` if a gradient scaler looks at it.
        """
        bad, self._bad = self._bad, torch.zeros_like(self._bad)
        if broken is not None:
            bad = torch.maximum(bad, broken)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
        self._count += bad
        if broken is None:
            return
        if optimizer.defaults.get("fused"):
            optimizer.found_inf = bad  # type: ignore[attr-defined]  # as a gradient scaler tells it
        elif bad.item():
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None

    def count(self) -> int:
        """Return how many updates were left out; it waits for the device."""
        self.known = int(self._count.item())
        return self.known


def norm_overflows(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """
    Return 1 if the norm of the gradients is not finite, else 0, as a float32 scalar on the device.

    Clipping by such a norm makes the gradients NaN or 0. Of a sharded gradient the part that is held here is looked
    at.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    local = [value.to_local() if hasattr(value, "to_local") else value for value in gradients]
    return (~torch.isfinite(torch.nn.utils.get_total_norm(local))).float()


def all_finite(values: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return whether all elements are finite, as a (1,) tensor on the device; of a sharded tensor, those held here."""
    local = [value.to_local() if hasattr(value, "to_local") else value for value in values]
    return torch.stack([torch.isfinite(value.detach()).all() for value in local]).all().reshape(1)
