"""`SavingTrainer`: a `transformers.Trainer` that saves adapters with a card and pushes them, never in silence."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object, save_fsdp_optimizer
from transformers import TrainerCallback, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, SaveStrategy, TrainOutput

from tgol_trainer import adapters
from tgol_trainer._files import move, settle, write_json
from tgol_trainer.adapter_files import gathered_adapters
from tgol_trainer.data import ScoredDataset
from tgol_trainer.metrics import RECORD
from tgol_trainer.scaling import Scaling, drift_of_rows, scale_to_drift

from .card import CardImage, DatasetFacts, SharedFile, write_card
from .checkpoints import DRAFTS, explained_reads, explained_writes, optimizer_state, read_back, rotate, seal
from .divergence import FiniteWatch, UpdateFilter, all_finite
from .facts import harvest_facts
from .files import ARGUMENTS_NAME, STATE_NAME, public_arguments, saved_state
from .finite import FiniteTrainer
from .heartbeat import Heartbeat
from .hub import Repository, RunPushes, open_repository, resume_command
from .progress import EveryPassTrains
from .resuming import alone_in, is_finished, open_output, starting_point
from .settings import Change, check_changes, decisive_settings, find_changes, log_harmless, set_learning_rate
from .sharing import check_share_formats, shared_files
from .stopping import StopOnSignal
from .zero import load_optimizer, save_optimizer

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from tgol_trainer.config import TGOLConfig
    from tgol_trainer.families import ModelFamily
    from tgol_trainer.labels import Labeler

logger = logging.getLogger(__name__)

_BYTES_PER_WEIGHT = 12
"""Of a checkpoint: a weight and AdamW's two moments, in float32."""


class SavingTrainer(FiniteTrainer):
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
        shared_files (`list[card.SharedFile]`): The adapter's files in `args.output_dir`, where there is a twin.
        changes (`list[settings.Change]`): Settings that changed where the run was resumed.
        scaling ([`scaling.Scaling`], *optional*): What the policy was multiplied by after training.
        limits (`list[str]`): Sentences that callbacks add to the limits on the card.
        already_saved (`bool`): Whether `train` found a finished run whose weights lie in `args.output_dir`.
    """

    args: TGOLConfig
    family: ModelFamily
    reference_model: ModelMixin | None
    labeler: Labeler | None
    dataset_facts: list[DatasetFacts]
    example_prompt: str | None
    card_extras: dict[str, Any]
    pushes: RunPushes | None = None
    already_saved = False
    scaling: Scaling | None = None
    shared_files: list[SharedFile] = []  # replaced, never changed
    _settings: dict[str, Any] | None = None
    _drafting = False

    @abc.abstractmethod
    def state_facts(self) -> dict[str, Any]:
        """Return what a checkpoint must remember beside weights, JSON-serialisable."""

    def __init__(self, *args: Any, callbacks: list[TrainerCallback] | None = None, **kwargs: Any) -> None:
        self.changes: list[Change] = []
        self.limits: list[str] = []
        super().__init__(*args, callbacks=[EveryPassTrains(), Heartbeat(), *(callbacks or [])], **kwargs)

    # ---- Start ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """
        As `transformers.Trainer.train`, with an end and a start that can be trusted (docs/reliability.md).

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint, or `True` for the newest complete one in `args.output_dir`; where there is none, `True`
                starts anew. A run that is finished is not trained on: its weights are loaded and `already_saved` says
                whether `args.output_dir` holds them.
            args, kwargs (`Any`): Further arguments of `transformers.Trainer.train`.

        Returns:
            `transformers.trainer_utils.TrainOutput`

        Raises:
            FileExistsError: for a new run in a folder that holds checkpoints, and where another run trains in it.
            FileNotFoundError: if the checkpoint that was named is not complete.
            ValueError: if the run is another one than the checkpoint's, by name of what differs.
            TrainingDivergedError: if a loss or a weight is not finite.
            TrainingStopped: after a signal, where a `StopOnSignal` is among the callbacks.
            SaveError: if a checkpoint cannot be written.
            DataError: if a pass over the training data makes no update.
        """
        with alone_in(self.args.output_dir) if self.args.should_save else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()  # nobody looks for checkpoints that another run is still writing
            return self._train(resume_from_checkpoint, *args, **kwargs)

    def _train(self, resume_from_checkpoint: str | bool | None, *args: Any, **kwargs: Any) -> TrainOutput:
        self._watch, self.already_saved = FiniteWatch(self.args.device), False
        self._filter = UpdateFilter(self.args.device) if self.args.on_nan == "skip" else None
        self._check_scaling()
        checkpoint = self._open(resume_from_checkpoint)
        self._settings = settings = self._decisive_settings()
        self.changes = []
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            self._compare_settings(checkpoint, state.global_step, settings)
            if is_finished(state, self.args, checkpoint):
                return self._end_again(checkpoint, state)
        if self.is_fsdp_enabled and self.args.reference_update == "epoch":
            adapters.add_reference(self.family.denoiser)  # no adapter can join once the weights are sharded
        try:
            output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, StopOnSignal):
                    callback.restore()
                elif isinstance(callback, Heartbeat):
                    callback.stop()
            self._finish_current_push()
        self._scale_to_drift()
        return output

    def _check_scaling(self) -> None:
        """Refuse `target_drift` before training, where it would fail after it."""
        if self.args.target_drift is None:
            return
        if not isinstance(self.train_dataset, ScoredDataset):
            raise ValueError(
                "`target_drift` is measured on rows of a dataset with a length: load it without streaming."
            )
        if self.family.denoiser.peft_config[adapters.POLICY].use_dora:
            raise ValueError(
                "`target_drift` scales the update of a LoRA; that of DoRA does not scale: set `use_dora=False`."
            )
        if self.is_fsdp_enabled:
            raise ValueError("`target_drift` needs the whole adapter on each process: leave it out with FSDP.")

    def _scale_to_drift(self) -> None:
        """Scale the policy to `target_drift`. Checkpoints hold it as it was trained, so that training can go on."""
        if self.args.target_drift is None:
            return
        index, size = RECORD.index("change"), self.args.per_device_eval_batch_size

        def changes(batch: dict[str, torch.Tensor]) -> torch.Tensor:
            with torch.no_grad(), self.compute_loss_context_manager():
                return self.compute_loss(self.model, batch, return_outputs=True)[1][:, index]

        training = self.model.training
        self.model.eval()
        try:
            self.scaling = scale_to_drift(
                self.family.denoiser,
                self.args.target_drift,
                lambda: drift_of_rows(self.train_dataset, self.data_collator, size, changes),
            )
        finally:
            self.model.train(training)
        logger.warning("The adapter was multiplied by %.4g: its drift was %.4g and is %.4g.", *self.scaling)

    def _open(self, asked: str | bool | None) -> Path | None:
        """Open the output folder; return the checkpoint to start at."""
        args = self.args
        check_share_formats(args, self.family)
        checkpoint = starting_point(args.output_dir, asked)
        found = {str(each) for each in gather_object([checkpoint])}
        if len(found) > 1:
            raise FileNotFoundError(
                f"The processes see different checkpoints in `output_dir` {args.output_dir}: {', '.join(found)}. It "
                "must be one folder, on a disk that all of them share."
            )
        if args.should_save:
            trained = sum(value.numel() for value in self._trained_weights())
            shutil.rmtree(Path(args.output_dir, DRAFTS), ignore_errors=True)
            open_output(args.output_dir, _BYTES_PER_WEIGHT * trained)
        self.accelerator.wait_for_everyone()
        return checkpoint

    def _decisive_settings(self) -> dict[str, Any]:
        return decisive_settings(self.args, self.family, self.train_dataset, self.state_facts()["resolution"])

    def _compare_settings(self, checkpoint: Path, step: int, settings: dict[str, Any]) -> None:
        saved = json.loads((checkpoint / STATE_NAME).read_text(encoding="utf-8"))
        if self._filter is not None:
            self._filter = UpdateFilter(self.args.device, saved["skipped_updates"])
        changes = find_changes(saved["settings"], settings, step)
        check_changes(changes, self.args.allow_changed, str(checkpoint))
        self.changes = [Change(**each) for each in saved["changes"]] + changes
        log_harmless(json.loads((checkpoint / ARGUMENTS_NAME).read_text(encoding="utf-8")), self.args, str(checkpoint))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> Any:
        if checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        # Trainer would have DeepSpeed read the checkpoint, without threshold and reference.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_from_checkpoint(checkpoint)
        self._load_optimizer_and_scheduler(checkpoint)
        return prepared

    @property
    def _optimizer_name(self) -> str:
        if self.is_deepspeed_enabled:
            return f"optimizer_{self.args.process_index}.pt"
        return "optimizer_0" if self.is_fsdp_enabled else OPTIMIZER_NAME

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        place = optimizer_state(checkpoint, self._optimizer_name)
        with explained_reads(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # under DeepSpeed the scheduler alone
            if self.is_deepspeed_enabled:
                load_optimizer(self.optimizer.optimizer, place)
        for change in self.changes:
            if change.name == "learning_rate":
                set_learning_rate(self.optimizer, self.lr_scheduler, change.now)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with explained_reads(checkpoint):
            super()._load_rng_state(checkpoint)

    def _end_again(self, checkpoint: Path, state: TrainerState) -> TrainOutput:
        """Load what a finished run ended with."""
        self._load_from_checkpoint(str(checkpoint))
        self.state = state
        best = state.best_model_checkpoint
        if self.args.load_best_model_at_end and best is not None and Path(best).is_dir():
            self._load_best_model()
        saved = Path(self.args.output_dir, STATE_NAME)
        self.already_saved = saved.is_file() and json.loads(saved.read_text())["step"] == state.global_step
        logger.warning("The run is finished: %s is its last step. Nothing is trained.", checkpoint)
        if self.args.should_save:  # the run may have been killed before it came to that
            rotate(checkpoint, self.args.save_total_limit, best)
        self._scale_to_drift()
        losses = [line["loss"] for line in state.log_history if "loss" in line]
        return TrainOutput(state.global_step, sum(losses) / max(len(losses), 1), {})

    # ---- Disk ----

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, DRAFTS) if self._drafting else folder

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # Trainer writes the checkpoint, in another folder, which is renamed when all of it is there.
        self._check_losses()
        self._check_weights()
        args, name = self.args, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        run = self._get_output_dir(trial)
        place, draft = Path(run, name), Path(run, DRAFTS, name)
        with explained_writes(Path(args.output_dir), self.state.global_step):
            self._drafting = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._drafting = False
            best = self.state.best_model_checkpoint
            if best is not None and Path(best) == draft:
                self.state.best_model_checkpoint = os.path.join(run, name)
                if args.should_save:
                    self.state.save_to_json(str(draft / TRAINER_STATE_NAME))
            self.accelerator.wait_for_everyone()
            if args.should_save:
                seal(draft, resumable=not args.save_only_model)
                settle(draft)
                move(draft, place)
                draft.parent.rmdir()
            self.accelerator.wait_for_everyone()
        if args.should_save:
            rotate(place, args.save_total_limit, self.state.best_model_checkpoint)
        if args.push_to_hub:
            self._push_from_checkpoint(str(place))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As `transformers.Trainer.save_model`, which saves no adapter of a sharded model. Every process must call."""
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            super().save_model(output_dir, _internal_call)
            return
        self._check_weights()
        keep = self.args.should_save
        self._save(output_dir, gathered_adapters(self.family.denoiser, keep=keep) if self.is_fsdp_enabled else None)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Trainer's own also writes the whole model, with the frozen base.
        if self.is_deepspeed_enabled:
            save_optimizer(self.optimizer.optimizer, Path(output_dir, self._optimizer_name))
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        state, draft = self.state_facts(), folder / DRAFTS / "weights"
        checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if not all_finite(self._trained_weights()):
            raise self._diverged("The trained weights are not finite and are not saved.")
        with explained_writes(Path(self.args.output_dir), self.state.global_step):
            draft.mkdir(parents=True, exist_ok=True)
            try:
                parts = self._write_weights(draft, state["reference_epoch"] if checkpoint else None, state_dict)
                settle(draft)
                (folder / STATE_NAME).unlink(missing_ok=True)  # written last: its step says that all of it is there
                for part in parts:
                    move(draft / part, folder / part)
            finally:
                shutil.rmtree(draft.parent, ignore_errors=True)
            if self._settings is None:  # saved without training
                self._settings = self._decisive_settings()
            changes = [dataclasses.asdict(change) for change in self.changes]
            if self.scaling is not None and not checkpoint:
                state["scaling"] = self.scaling._asdict()
            state |= {"step": self.state.global_step, "settings": self._settings, "changes": changes}
            state["skipped_updates"] = self._filter.known if self._filter else 0
            write_json(folder / ARGUMENTS_NAME, public_arguments(self.args))
            self.shared_files = shared_files(self, folder, sharded=state_dict is not None)
            write_card(harvest_facts(self), folder)
            write_json(folder / STATE_NAME, state)

    def _write_weights(self, folder: Path, epoch: int | None, state_dict: dict[str, torch.Tensor] | None) -> list[str]:
        """
        Write the policy, and the reference of an epoch, and read them back. Return the names of files or folders.

        `epoch` is `None` where the reference is not wanted, and 0 before it has moved.
        """
        family = self.family
        if self.reference_model is not None:
            models = {family.denoiser_name: family.denoiser}
            if epoch:
                models[f"reference_{family.denoiser_name}"] = self.reference_model
            for name, model in models.items():
                model.save_pretrained(folder / name)
                read_back(folder / name, {key: tuple(value.shape) for key, value in model.state_dict().items()})
            return list(models)
        files = {adapters.POLICY: adapters.WEIGHTS_NAME}
        if epoch is not None and adapters.REFERENCE in family.denoiser.peft_config:
            files[adapters.REFERENCE] = adapters.REFERENCE_WEIGHTS_NAME
        save = (type(family.pipeline), family.denoiser_name, family.denoiser, folder)
        for adapter, name in files.items():
            adapters.save_adapter(*save, adapter=adapter, weight_name=name, state_dict=state_dict)
        return list(files.values())

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

    def create_model_card(self, model_name: str | None = None, **extras: Any) -> None:
        """
        Write `README.md` in `args.output_dir`, keeping what a person edited.

        Args:
            model_name (`str`, *optional*): Title; by default the name of the Hub repository or output folder.
            extras (`Any`): Further fields of [`card.CardFacts`] (`evaluations`, `license`, ...), kept for later saves.
        """
        if not self.args.should_save:
            return
        extras["model_name"] = model_name
        self.card_extras.update({name: value for name, value in extras.items() if value is not None})
        write_card(harvest_facts(self), self.args.output_dir)

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
        if self.pushes is None or self._drafting:  # a draft is pushed when it is in its place
            return
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        write_card(harvest_facts(self), args.output_dir)
        epochs = args.save_strategy == SaveStrategy.EPOCH
        position = f"epoch {int(self.state.epoch)}" if epochs else f"step {self.state.global_step}"
        self.pushes.checkpoint(Path(checkpoint_folder), f"Training in progress, {position}")

    def _finish_current_push(self) -> None:
        if self.pushes is not None:
            self.pushes.finish()

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
        if not self.already_saved:
            self.save_model(_internal_call=True)
            self.create_model_card(**kwargs)
        self._finish_current_push()
        if self.pushes is None:
            return None
        return self.pushes.final(
            commit_message or "End of training", blocking=blocking, token=token, revision=revision
        )
