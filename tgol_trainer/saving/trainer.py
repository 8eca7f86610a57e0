"""`transformers.Trainer` with pushes that are verified, resumable and never silent."""

from __future__ import annotations

import abc
import dataclasses
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import SaveStrategy, TrainOutput

from .hub.background import RunPushes
from .hub.push import Repository, open_repository, resume_command


class HubTrainer(Trainer):
    """The part of a trainer that speaks to the Hub."""

    pushes: RunPushes | None = None

    @abc.abstractmethod
    def _write_card(self, folder: Path) -> None:
        """Write the card of the run into a folder."""

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
        """As `transformers.Trainer.train`; failed pushes in the background are reported however it ends."""
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
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Return when the push has ended.
            token (`str`, *optional*):
                By default `args.hub_token`, and without one that of the environment or of `hf auth login`.
            revision (`str`, *optional*):
                Branch, made where missing; by default `args.hub_revision`.
            private (`bool`, *optional*):
                Of a repository that does not exist yet; by default `args.hub_private_repo`.
            kwargs (`Any`):
                Of [`create_model_card`].

        Returns:
            `huggingface_hub.CommitInfo`, or a future of it; None on other processes than the main one.

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
