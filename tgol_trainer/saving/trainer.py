"""`SavingTrainer`: a `transformers.Trainer` that saves adapters with a card and pushes them, never in silence."""

from __future__ import annotations

import abc
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from tgol_trainer import adapters
from tgol_trainer._files import write_json

from .card import CardImage, DatasetFacts, write_card
from .facts import harvest_facts
from .files import ARGUMENTS_NAME, STATE_NAME, public_arguments, saved_state
from .hub import Repository, RunPushes, open_repository, resume_command

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin

    from tgol_trainer.config import TGOLConfig
    from tgol_trainer.families import ModelFamily
    from tgol_trainer.labels import Labeler

logger = logging.getLogger(__name__)


class SavingTrainer(Trainer):
    """
    The part of the trainer that saves, loads, writes cards and pushes.

    Attributes:
        family ([`families.ModelFamily`]): The model, with the policy as its denoiser.
        reference_model (`diffusers.ModelMixin`, *optional*):
            Frozen copy of the denoiser, where all weights are trained.
        labeler ([`labels.Labeler`], *optional*): Fitted to the training data.
        dataset_facts (`list[card.DatasetFacts]`): What the card says of the training data.
        example_prompt (`str`, *optional*): Prompt of the card's snippet.
        card_extras (`dict[str, Any]`): Fields of [`card.CardFacts`] that were given by hand.
    """

    args: TGOLConfig
    family: ModelFamily
    reference_model: ModelMixin | None
    labeler: Labeler | None
    dataset_facts: list[DatasetFacts]
    example_prompt: str | None
    card_extras: dict[str, Any]
    pushes: RunPushes | None = None

    @abc.abstractmethod
    def state_facts(self) -> dict[str, Any]:
        """Return what a checkpoint must remember beside weights, JSON-serialisable."""

    # ---- Disk ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        family, state = self.family, self.state_facts()
        checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self.reference_model is not None:
            family.denoiser.save_pretrained(folder / family.denoiser_name)
            if checkpoint and state["reference_epoch"]:
                self.reference_model.save_pretrained(folder / f"reference_{family.denoiser_name}")
        else:
            save = (type(family.pipeline), family.denoiser_name, family.denoiser, folder)
            adapters.save_adapter(*save, state_dict=state_dict)
            if checkpoint and adapters.REFERENCE in family.denoiser.peft_config:
                adapters.save_adapter(
                    *save,
                    adapter=adapters.REFERENCE,
                    weight_name=adapters.REFERENCE_WEIGHTS_NAME,
                    state_dict=state_dict,
                )
        write_json(folder / STATE_NAME, state)
        write_json(folder / ARGUMENTS_NAME, public_arguments(self.args))
        self._write_card(folder)

    def _load_policy(self, folder: Path) -> None:
        denoiser, name = self.family.denoiser, self.family.denoiser_name
        if self.reference_model is not None:
            denoiser.load_state_dict(saved_state(denoiser, folder, name))
            return
        file = folder / adapters.WEIGHTS_NAME
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} holds no {adapters.WEIGHTS_NAME}: it is not a checkpoint of TGOLTrainer."
            )
        adapters.load_adapter(denoiser, name, file)

    def _load_reference(self, folder: Path, epoch: int) -> None:
        """Load the reference that a checkpoint holds, `epoch` being the epoch that it was made at."""
        denoiser, name = self.family.denoiser, self.family.denoiser_name
        if self.reference_model is not None:
            if epoch:
                self.reference_model.load_state_dict(saved_state(self.reference_model, folder, f"reference_{name}"))
        elif (folder / adapters.REFERENCE_WEIGHTS_NAME).exists():
            adapters.sync_reference(denoiser)
            adapters.load_adapter(denoiser, name, folder / adapters.REFERENCE_WEIGHTS_NAME, adapter=adapters.REFERENCE)

    def _load_best_model(self) -> None:
        logger.info("Loading the best model from %s.", self.state.best_model_checkpoint)
        self._load_policy(Path(self.state.best_model_checkpoint))

    # ---- Card ----

    def _write_card(self, folder: Path) -> None:
        write_card(harvest_facts(self), folder)

    def create_model_card(self, model_name: str | None = None, **extras: Any) -> None:
        """
        Write `README.md` in `args.output_dir`, keeping what a person edited.

        Args:
            model_name (`str`, *optional*): Title; by default the name of the Hub repository or output folder.
            extras:
                Further fields of [`card.CardFacts`] (`evaluations`, `pictures`, `license`, ...), kept for later saves.
        """
        if not self.args.should_save:
            return
        extras["model_name"] = model_name
        self.card_extras.update({name: value for name, value in extras.items() if value is not None})
        self._write_card(Path(self.args.output_dir))

    def _add_card_image(self, image: CardImage) -> None:
        """Show an image on the card, unless images were given by hand."""
        self.card_extras.setdefault("pictures", [image])

    # ---- Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or check that this token may write to the one that exists; on the main process."""
        if not self.is_world_process_zero():
            return
        args, folder = self.args, Path(self.args.output_dir)
        name = args.hub_model_id or folder.absolute().name
        target = open_repository(
            Repository(name, revision=args.hub_revision, token=token or args.hub_token),
            private=args.hub_private_repo if private is None else private,
            gated=args.hub_gated,
        )
        self.hub_model_id = target.id
        strategy = args.hub_strategy.value
        resume = resume_command(folder, target.id, revision=target.revision, strategy=strategy)
        self.pushes = RunPushes(dataclasses.replace(target, resume=resume), folder, strategy, args.hub_always_push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own looks for transformers' file names, and pickles the arguments with the token in them.
        if self.pushes is None:
            return
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self._write_card(Path(args.output_dir))
        epochs = args.save_strategy == SaveStrategy.EPOCH
        position = f"epoch {int(self.state.epoch)}" if epochs else f"step {self.state.global_step}"
        self.pushes.checkpoint(Path(checkpoint_folder), f"Training in progress, {position}")

    def _finish_current_push(self) -> None:
        if self.pushes is not None:
            self.pushes.finish()

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `transformers.Trainer.train`. Pushes that failed in the background are reported however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._finish_current_push()

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """
        Save, write the card, upload, and compare what the Hub holds with the local files.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`): Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`): Return when the push has ended.
            token (`str`, *optional*):
                By default `args.hub_token`; without one, the token of the environment or of `hf auth login`.
            revision (`str`, *optional*): Branch, made where missing; by default `args.hub_revision`.
            private (`bool`, *optional*): Make a new repository private; by default `args.hub_private_repo`.
            kwargs (`Any`): Arguments of [`create_model_card`].

        Returns:
            `huggingface_hub.CommitInfo`, or a future of it; `None` on other processes than the main one.

        Raises:
            PushError: with cause, remedy, and the command that continues without training again.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        self.create_model_card(**kwargs)
        self._finish_current_push()
        if self.pushes is None:
            return None
        return self.pushes.final(
            commit_message or "End of training", blocking=blocking, token=token, revision=revision
        )
