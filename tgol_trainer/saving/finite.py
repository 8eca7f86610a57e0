"""`FiniteTrainer`: a `transformers.Trainer` that looks at losses, gradients and weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer

from .checkpoints import last_good
from .divergence import FiniteWatch, TrainingDivergedError, UpdateFilter, all_finite, norm_overflows

if TYPE_CHECKING:
    from tgol_trainer.config import TGOLConfig
    from tgol_trainer.families import ModelFamily

logger = logging.getLogger(__name__)


class FiniteTrainer(Trainer):
    """
    The part of the trainer that stops at, or leaves out, what is not finite.

    Attributes:
        family ([`families.ModelFamily`]): The model, with the policy as its denoiser.
    """

    args: TGOLConfig
    family: ModelFamily
    _watch: FiniteWatch
    _filter: UpdateFilter | None = None
    _record: torch.Tensor

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # By name: sharding replaces the parameters, and switching adapters leaves `requires_grad` off on its shards.
        self._trained = [name for name, value in self.family.denoiser.named_parameters() if value.requires_grad]
        super().__init__(*args, **kwargs)

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """As `transformers.Trainer.training_step`; the loss is looked at, which waits for nothing."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        step = self.state.global_step + 1
        self._watch.add(loss, step, self._record, inputs["row_id"])
        if self._filter is not None:
            loss = self._filter.add(loss)
        if self.accelerator.sync_gradients and self.is_deepspeed_enabled:
            # It has made the update, or left it out without a word where the norm is not finite.
            norm = torch.as_tensor(self.model_wrapped.get_global_grad_norm(), device=self.args.device)
            self._watch.add_gradient(~torch.isfinite(norm.reshape(1)), step)
        elif self.accelerator.sync_gradients:
            # A gradient scaler meets overflows while it looks for its scale, and leaves them out.
            broken = None if self.accelerator.scaler is not None else norm_overflows(self._trained_weights())
            if broken is not None:
                self._watch.add_gradient(broken, step)
            if self._filter is not None:
                self._filter.before_update(self.optimizer.optimizer, broken)
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `transformers.Trainer.log`; stops on a loss that was not finite."""
        if "loss" in logs or "train_loss" in logs:
            self._check_losses()
            if self._filter is not None:
                logs["skipped_updates"] = self._filter.known
        super().log(logs, start_time)

    def _check_losses(self) -> None:
        fault = self._watch.first(self.accelerator.gather, reference=self.args.needs_reference)
        cause = None if fault is None else fault.cause(self.args, self._computes_in_half)
        if self._filter is None:
            if fault is not None:
                raise self._diverged(f"{fault} {cause}")
            return
        before, skipped, limit = self._filter.known, self._filter.count(), self.args.max_skipped_updates
        what = f"{skipped} updates were left out up to step {self.state.global_step}, since their loss or gradient was"
        if skipped > limit:
            raise self._diverged(f"{what} not finite, and `max_skipped_updates` is {limit}. {cause or ''}")
        if skipped > before:
            logger.warning("%s not finite (%d are allowed). %s", what, limit, cause or "")

    @property
    def _computes_in_half(self) -> bool:
        return self.family.denoiser.dtype == torch.float16 or bool(self.args.fp16)

    def _trained_weights(self) -> list[torch.nn.Parameter]:
        weights = dict(self.family.denoiser.named_parameters())
        return [weights[name] for name in self._trained]

    def _keep_policy(self) -> Callable[[], None]:
        """Copy the trained weights; return what puts them back."""
        weights = self._trained_weights()
        copies = [value.detach().to("cpu", copy=True) for value in weights]

        def put_back() -> None:
            with torch.no_grad():
                for value, kept in zip(weights, copies, strict=True):
                    value.copy_(kept)

        return put_back

    def _check_weights(self) -> None:
        """Raise on every process if the weights of one are not finite."""
        if not self.accelerator.gather(all_finite(self._trained_weights()).int()).all():
            raise self._diverged(
                f"The trained weights are not finite after step {self.state.global_step}, whose loss was finite: the "
                f"update was too large, so lower `learning_rate` (it is {self.args.learning_rate:g})."
            )

    def _diverged(self, what: str) -> TrainingDivergedError:
        return TrainingDivergedError(f"{what} {last_good(self.args.output_dir)}")
