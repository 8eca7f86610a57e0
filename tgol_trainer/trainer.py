"""`TGOLTrainer`: threshold-guided optimization on `transformers.Trainer`. Orchestration only."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

from tgol_trainer import adapters, thresholds
from tgol_trainer._files import write_json
from tgol_trainer.config import TGOLConfig
from tgol_trainer.data import (
    Collator,
    Columns,
    DataReport,
    GroupSampler,
    ScoredDataset,
    ScoredStream,
    check_columns,
    decode_prompts,
    innermost_sampler,
    prepare_dataset,
)
from tgol_trainer.epochs import EpochStart
from tgol_trainer.families import FamilySettings, ModelFamily, load_family
from tgol_trainer.labels import Labelling, fitting
from tgol_trainer.labels.fitting import AnyDataset, ProxyDataset
from tgol_trainer.likelihoods import RowGenerators, log_likelihood
from tgol_trainer.metrics import RECORD, MetricSums, stack_record
from tgol_trainer.objective import Scored, training_loss
from tgol_trainer.sampling import RewardFuncs, SampleCallback
from tgol_trainer.saving.card import DatasetFacts, write_card
from tgol_trainer.saving.facts import dataset_facts, harvest_facts
from tgol_trainer.saving.files import (
    ARGUMENTS_NAME,
    STATE_NAME,
    ReportedConfig,
    public_arguments,
    saved_state,
)
from tgol_trainer.saving.trainer import HubTrainer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from peft import PeftConfig

logger = logging.getLogger(__name__)

EVALUATION_STEP = -1
"""Step that keys the random draws of evaluation, so that every evaluation uses the same ones."""


class TrainingDivergedError(FloatingPointError):
    """The loss became NaN or infinite; the message names the usual causes and the last good checkpoint."""


class TGOLTrainer(HubTrainer):
    """
    Align a diffusers pipeline from unpaired prompt / image / score rows (paper: arXiv 2605.04653).

    Args:
        model (`str`, `Path` or `diffusers.DiffusionPipeline`):
            Hub id, local folder or loaded pipeline of a supported class; `"shapes"` and `"shapes-masked"` are the
            models embedded in this package. A loaded pipeline is used in place.
        args ([`TGOLConfig`], *optional*):
            By default the paper's settings, with output to `tgol_output`.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            Prompt (str), image (or video) and score (real number, higher is better), in the columns that `args` names.
            Needed for `train()`.
        eval_dataset (the same, or `dict[str, Dataset]`, *optional*):
            Labelled with the training threshold, so it needs a `train_dataset`.
        proxy_dataset (`datasets.Dataset`, or a callable `(pipeline) -> Dataset`, *optional*):
            Scores from which the threshold is estimated instead of the training scores (paper, Sec. 3.3). A callable
            gets the pipeline while the policy is the reference, and is called again after each sync where
            `threshold_update="epoch"`.
        peft_config (`peft.LoraConfig`, *optional*):
            By default r = alpha = 16 on the model family's usual targets.
        quantization_config (`diffusers.BitsAndBytesConfig`, *optional*):
            Loads the denoiser quantised (QLoRA), where `model` is an id or a folder; bitsandbytes needs a GPU.
        reward_funcs (`str`, `Callable` or a list of them, *optional*):
            Names of rewards, `module:function` or functions `(images, prompts) -> scores`, which score the images of
            `args.sample_prompts`.
        callbacks (`list[transformers.TrainerCallback]`, *optional*):
            Added to Trainer's own.
        optimizers (`tuple`, *optional*):
            Optimizer and scheduler, as in Trainer.

    Raises:
        ValueError: for arguments that would train something else than asked.
        DataError: for data that cannot be trained on, naming column and rows.
        ThresholdError: for scores that cannot be divided in two.
    """

    # Each micro-batch's loss is its own mean; Trainer divides by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        args: TGOLConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        proxy_dataset: ProxyDataset | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        reward_funcs: RewardFuncs | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ) -> None:
        args = args if args is not None else TGOLConfig(output_dir="tgol_output")
        _check_processes(args)
        self.args = args
        score = args.score_column
        if args.score_columns:
            score = thresholds.combined_name(args.score_columns, args.score_combination)
        self.columns = Columns(prompt=args.prompt_column, image=args.image_column, score=score)
        fitting.check_sources(
            args,
            streamed=None if train_dataset is None else isinstance(train_dataset, datasets.IterableDataset),
            proxy=proxy_dataset is not None,
            regenerated=callable(proxy_dataset),
            proxy_streamed=isinstance(proxy_dataset, datasets.IterableDataset),
        )

        self.family = self._load_family(model, quantization_config)
        if self.family.num_frames is not None:
            frames = self.family.num_frames
            self.columns = dataclasses.replace(self.columns, video=args.video_column, num_frames=frames)
        if args.uses_groups:
            self.columns = dataclasses.replace(self.columns, group=args.group_column or args.prompt_column)
        self.reference_model: ModelMixin | None = None
        self._prepare_policy(peft_config)

        self.proxy_dataset = proxy_dataset
        self.data_reports: dict[str, DataReport] = {}
        self.dataset_facts: list[DatasetFacts] = []
        self.example_prompt: str | None = None
        self.labelling: Labelling | None = None
        size = args.training_size(self.family.native_size, self.family.resolution_multiple)
        self.collator = Collator(size, num_frames=self.family.num_frames)
        self._raw_stream = train_dataset if isinstance(train_dataset, datasets.IterableDataset) else None
        train_rows = self._prepare_dataset(train_dataset, "train_dataset") if train_dataset is not None else None
        if train_rows is not None:
            self._record_facts(train_dataset, train_rows)
            train_rows = self._fit_threshold(train_rows)
        eval_rows = self._prepare_eval_dataset(eval_dataset)
        self._train_metrics = MetricSums()
        self._train_sampler: Any = None
        self._reference_epoch = 0
        self.card_extras: dict[str, Any] = {}
        self.samples = SampleCallback(self, reward_funcs, gather_object)

        super().__init__(
            model=self.family.denoiser,
            args=args,
            data_collator=self.collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            compute_metrics=lambda records: {**_summarize_records(records), **self.samples.evaluate()},
            callbacks=[EpochStart(self._on_epoch_begin), *(callbacks or []), self.samples],
            optimizers=optimizers,
        )
        # Evaluation returns a record matrix and row ids, which Trainer calls predictions and labels.
        self.label_names = ["row_id"]

    # ---- Set-up ----

    def _load_family(self, model: str | Path | DiffusionPipeline, quantization_config: Any = None) -> ModelFamily:
        args, options = self.args, self.args.pipeline_kwargs
        if quantization_config is not None:
            if args.full_finetuning:
                raise ValueError("`quantization_config` freezes the weights that `full_finetuning=True` would train.")
            options["quantization_config"] = quantization_config
        timesteps = None if args.timestep_sampling == "family" else args.timestep_sampling
        settings = FamilySettings(timesteps, args.train_guidance, args.num_frames)
        family = load_family(model, options, settings)
        if args.n_gpu > 1:
            logger.warning("%d GPUs are visible, one process uses one; `accelerate launch` uses all.", args.n_gpu)
            args._n_gpu = 1
        return family.to(args.device)

    def _prepare_policy(self, peft_config: PeftConfig | None) -> None:
        args, family = self.args, self.family
        # What is saved of a denoiser must not name the folder that it was loaded from.
        family.denoiser._internal_dict = ReportedConfig({**family.denoiser.config, "_name_or_path": ""})
        if args.full_finetuning:
            if peft_config is not None:
                raise ValueError("`full_finetuning=True` trains no adapter: leave out `peft_config`.")
            if family.denoiser.dtype != torch.float32:
                logger.warning(
                    "Full fine-tuning of %s weights loses updates smaller than their precision. Load the model in "
                    "float32 and set `bf16=True` for speed.",
                    str(family.denoiser.dtype).removeprefix("torch."),
                )
            self.reference_model = copy.deepcopy(family.denoiser)
            family.denoiser.requires_grad_(True)
        elif args.adapter_name_or_path:
            if peft_config is not None:
                raise ValueError(
                    "`adapter_name_or_path` brings its own configuration: leave out `peft_config` or train anew."
                )
            before = family.probe()
            adapters.load_initial(
                family.pipeline,
                family.denoiser_name,
                args.adapter_name_or_path,
                keep_as_reference=args.reference == "initial",
            )
            adapters.check_reference(family.denoiser, before, family.probe)
        else:
            adapters.attach(family.denoiser, self._lora_config(peft_config), seed=args.seed, probe=family.probe)
        if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
            family.enable_gradient_checkpointing()
            # diffusers' own switch; Trainer would look for transformers' method of another name.
            args.gradient_checkpointing = args.activation_checkpointing = False

    def _lora_config(self, peft_config: PeftConfig | None) -> PeftConfig:
        from peft import LoraConfig

        config = copy.deepcopy(peft_config) or LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian")
        adapters.check_peft_config(config)
        if config.target_modules is None:
            config.target_modules = set(self.family.default_target_modules)
        return config

    # ---- Data and threshold ----

    def _prepare_dataset(self, dataset: AnyDataset, name: str) -> ScoredDataset | ScoredStream:
        fitting.check_columns_of_stream(dataset, name, self.args)
        check_columns(dataset, self.columns, name, scored=not self.args.score_columns)
        if isinstance(dataset, datasets.IterableDataset):
            return ScoredStream(dataset, self.columns, on_bad_sample=self.args.on_bad_sample, name=name)
        with self.args.main_process_first(desc=f"checking {name}"):
            rows, report = prepare_dataset(
                dataset,
                self.columns,
                self.collator.resolution,
                score_columns=self.args.score_columns,
                on_bad_sample=self.args.on_bad_sample,
                num_proc=self.args.dataset_num_proc,
                name=name,
            )
        self.data_reports[name] = report
        suffix = max(self.args.csft_suffixes, key=len) if self.args.loss_type == "csft" else ""
        prompts = [prompt + suffix for prompt in dict.fromkeys(rows.prompts)]
        long, limit = self.family.count_long_prompts(prompts)
        if long:
            logger.warning(
                "%s: %d of %d different prompts are longer than the text encoder's %d tokens; the rest of them is "
                "cut off, in training as in generation.",
                *(name, long, report.num_unique_prompts, limit),
            )
        if self.labelling is not None and self.labelling.combination is not None:  # of evaluation rows
            rows.combine(self.labelling.combination)
        if self.labelling is not None and self.labelling.by_group is not None:
            rows.thresholds = self.labelling.row_thresholds(rows.groups)
        return rows

    def _prepare_eval_dataset(self, dataset: AnyDataset | dict[str, AnyDataset] | None) -> Any:
        if dataset is not None and self.labelling is None:
            raise ValueError(
                "`eval_dataset` needs a `train_dataset`: its rows are labelled and weighted by what is estimated from "
                "the training scores. Give the scored data that the adapter was, or would be, trained on."
            )
        if isinstance(dataset, dict) and not isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
            return {name: self._prepare_dataset(part, f"eval_dataset[{name!r}]") for name, part in dataset.items()}
        return self._prepare_dataset(dataset, "eval_dataset") if dataset is not None else None

    def _record_facts(self, dataset: AnyDataset, rows: ScoredDataset | ScoredStream) -> None:
        facts = dataset_facts(dataset, [*self.columns.names[:2], *(self.args.score_columns or self.columns.names[2:])])
        if isinstance(rows, ScoredDataset):
            report = self.data_reports["train_dataset"]
            facts.num_rows, facts.num_dropped = report.num_kept, report.num_rows - report.num_kept
            self.example_prompt = rows[0]["prompt"]
        self.dataset_facts = [facts]

    def _fit_threshold(self, rows: ScoredDataset | ScoredStream) -> ScoredDataset | ScoredStream:
        """Estimate τ, hand it to the collator, and return the rows that are trained on."""
        proxy = self.proxy_dataset
        if callable(proxy):
            proxy = proxy(self.family.pipeline)
        before = self.labelling.combination if self.labelling else None
        sources = {"proxy": proxy, "stream": self._raw_stream, "combination": before}
        found = fitting.fit(rows, self.args, self.columns, **sources)
        if found.kept is not None and isinstance(rows, ScoredDataset):
            rows = rows.kept(found.kept)
        if isinstance(rows, ScoredDataset):
            fitting.check_pairs(rows, self.args)
        self.labelling = found
        fitting.set_labels(found, self.args, self.collator, rows)
        for evaluated in self._evaluation_rows():
            evaluated.thresholds = found.row_thresholds(evaluated.groups) if found.by_group is not None else None
        return rows

    def _evaluation_rows(self) -> list[ScoredDataset]:
        found = getattr(self, "eval_dataset", None)  # none yet while the trainer is set up
        return [
            rows
            for rows in (found.values() if isinstance(found, dict) else [found])
            if isinstance(rows, ScoredDataset)
        ]

    @property
    def threshold(self) -> thresholds.Threshold | None:
        """τ and its counts; None for a trainer without training data."""
        return self.labelling.threshold if self.labelling else None

    def get_train_dataloader(self) -> DataLoader:
        """The training loader; streams are split by process here, maps by accelerate."""
        if isinstance(self.train_dataset, ScoredDataset) and self.args.dataloader_drop_last:
            batch = self._train_batch_size * self.args.world_size
            if len(self.train_dataset) < batch:
                raise ValueError(
                    f"{len(self.train_dataset)} rows do not fill one batch of {batch} (per_device_train_batch_size × "
                    "processes) and `dataloader_drop_last=True` drops it: nothing would be trained. Use a smaller "
                    "`per_device_train_batch_size`."
                )
        if not isinstance(self.train_dataset, ScoredStream):
            loader = super().get_train_dataloader()
            self._train_sampler = innermost_sampler(loader)
            return loader
        from accelerate.data_loader import prepare_data_loader

        args = self.args
        loader = DataLoader(
            self.train_dataset.split(args.process_index, args.world_size),
            batch_size=self._train_batch_size,
            collate_fn=self.data_collator,
            drop_last=args.dataloader_drop_last,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        # Already this process's share: accelerate must only move batches to the device.
        return prepare_data_loader(
            loader,
            self.accelerator.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        dataset = train_dataset if train_dataset is not None else self.train_dataset
        if self.args.group_size is None or not isinstance(dataset, ScoredDataset):
            return super()._get_train_sampler(train_dataset)
        numbers, _ = thresholds.group_ids(dataset.groups)
        return GroupSampler(numbers, self.args.group_size, self.args.data_seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The evaluation loader; keeps the last incomplete batch, whatever `dataloader_drop_last` says of training."""
        if isinstance(eval_dataset, datasets.Dataset | datasets.IterableDataset):  # given to `evaluate`
            eval_dataset = self._prepare_eval_dataset(eval_dataset)
        with _changed(self.args, dataloader_drop_last=False):
            return super().get_eval_dataloader(eval_dataset)

    def _on_epoch_begin(self, epoch: float, first: bool) -> None:
        # At the beginning of an epoch rather than at the end of the one before, so that a checkpoint written on the
        # last step resumes into the same state. A resume in mid-epoch finds `_reference_epoch` already there.
        current = math.floor(epoch + 1e-6)
        if hasattr(self._train_sampler, "set_epoch"):
            self._train_sampler.set_epoch(current)
        if self._raw_stream is not None:
            if self.args.threshold_update == "epoch" and not first:
                self._fit_threshold(self.train_dataset)
            return
        if self.args.sync_ref_model == "epoch" and current > self._reference_epoch:
            self.sync_reference()
            self._reference_epoch = current
            if self.args.threshold_update == "epoch":
                self._fit_threshold(self.train_dataset)

    # ---- Loss ----

    def sync_reference(self) -> None:
        """Make the policy of this moment the reference (paper, Algorithm 1, line 15)."""
        if self.reference_model is not None:
            self.reference_model.load_state_dict(self.family.denoiser.state_dict())
        else:
            adapters.sync_reference(self.family.denoiser)

    @contextlib.contextmanager
    def reference_policy(self, model: torch.nn.Module | None = None) -> Iterator[torch.nn.Module]:
        """
        Yield the network to call for a pass of the reference; without gradient.

        Args:
            model (`torch.nn.Module`, *optional*):
                The denoiser or its distributed or compiled wrapper; by default the denoiser.
        """
        if self.reference_model is not None:
            with torch.no_grad(), self.accelerator.autocast():
                yield self.reference_model
        else:
            with adapters.reference_policy(self.family.denoiser):
                yield model if model is not None else self.family.denoiser

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """
        One draw, scored by reference and policy; then the loss of `args.loss_type`.

        Args:
            model (`torch.nn.Module`):
                The denoiser as Trainer wrapped it.
            inputs (`dict[str, torch.Tensor]`):
                A batch of [`data.Collator`].
            return_outputs (`bool`, *optional*, defaults to `False`):
                Also return the (B, len(metrics.RECORD)) record.
            num_items_in_batch (`int`, *optional*):
                Unused: the loss is a mean over the micro-batch.

        Returns:
            `torch.Tensor`: scalar float32, and the record if asked for.
        """
        args, likelihood, training = self.args, self.family.likelihood, model.training
        step = self.state.global_step if training else EVALUATION_STEP
        rows = RowGenerators(args.seed, step, inputs["row_id"].tolist())

        pixels = inputs["pixel_values"]
        if training and args.random_flip:
            mirrored = (rows.uniform("flip") < 0.5).to(pixels.device).view(-1, *[1] * (pixels.dim() - 1))
            pixels = torch.where(mirrored, pixels.flip(-1), pixels)
        prompts = decode_prompts(inputs["prompt_bytes"], inputs["prompt_length"])
        if args.loss_type == "csft":
            positive = (inputs["margin"] >= 0).tolist()
            prompts = [prompt + args.csft_suffixes[not good] for prompt, good in zip(prompts, positive, strict=True)]
        if training and args.caption_dropout:
            dropped = (rows.uniform("caption") < args.caption_dropout).tolist()
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
        conditioning = self.family.condition(prompts, inputs["geometry"], self.collator.resolution)
        latents = self.family.encode_images(pixels, rows, sample=args.latent_sampling == "sample")
        if args.share_group_noise:
            rows = RowGenerators(args.seed, step, inputs["group"].tolist())
        draw = likelihood.draw(latents, rows)

        # The reference goes first: nothing is switched between the policy's forward pass and its backward pass.
        with self.reference_policy(model) as reference:
            reference_prediction = self.family.predict(reference, draw, conditioning)
            reference_error = likelihood.error(reference_prediction, draw)
        prediction = self.family.predict(model, draw, conditioning)
        error = likelihood.error(prediction, draw)
        log_ratio = log_likelihood(likelihood, error, args.temperature) - log_likelihood(
            likelihood, reference_error, args.temperature
        )

        def mixed_error(share: float) -> torch.Tensor:
            return likelihood.error(torch.lerp(reference_prediction.float(), prediction.float(), share), draw)

        # The collator subtracted τ in float64, so labels are those of the float64 comparison.
        result = training_loss(Scored(log_ratio, error, inputs, mixed_error), args, self.labelling)
        record = stack_record(**result._asdict(), score=inputs["score"], error=error, reference_error=reference_error)
        if training:
            self._train_metrics.add(record)
        loss = result.loss.mean()
        return (loss, record) if return_outputs else loss

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return loss, record matrix and row ids; the draws are the same at every evaluation."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, record = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, record, inputs["row_id"])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log line, over all processes; stop on a loss that is not finite."""
        if "loss" in logs:
            logs.update(self._train_metrics.pop(self.accelerator.gather))
            if not math.isfinite(logs["loss"]):
                raise TrainingDivergedError(self._divergence_message(logs["loss"]))
        super().log(logs, start_time)

    def _divergence_message(self, loss: float) -> str:
        folder = Path(self.args.output_dir)
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None
        causes = "a learning rate or temperature that is too large, or a batch with broken images"
        if self.family.denoiser.dtype == torch.float16 or self.args.fp16:
            causes = "float16 overflow (use bfloat16 or float32), or " + causes
        kept = f"The last checkpoint is {checkpoint}." if checkpoint else "No checkpoint had been written."
        return f"The loss is {loss} at step {self.state.global_step}. Usual causes: {causes}. {kept}"

    # ---- Saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        family = self.family
        checkpoint = folder.name.startswith(PREFIX_CHECKPOINT_DIR)
        if self.reference_model is not None:
            family.denoiser.save_pretrained(folder / family.denoiser_name)
            if checkpoint and self._reference_epoch:
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
        write_json(folder / STATE_NAME, self._state())
        write_json(folder / ARGUMENTS_NAME, public_arguments(self.args))
        self._write_card(folder)

    def _state(self) -> dict[str, Any]:
        return {
            **(self.labelling.to_dict() if self.labelling else {"threshold": None}),
            "resolution": list(self.collator.resolution),
            "reference_epoch": self._reference_epoch,
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_policy(folder)
        state = json.loads((folder / STATE_NAME).read_text())
        self._reference_epoch = state["reference_epoch"]
        name = self.family.denoiser_name
        if self.reference_model is not None:
            if self._reference_epoch:
                self.reference_model.load_state_dict(saved_state(self.reference_model, folder, f"reference_{name}"))
        elif (folder / adapters.REFERENCE_WEIGHTS_NAME).exists():
            adapters.sync_reference(self.family.denoiser)
            adapters.load_adapter(
                self.family.denoiser, name, folder / adapters.REFERENCE_WEIGHTS_NAME, adapter=adapters.REFERENCE
            )
        if self._reference_epoch and self.args.threshold_update == "epoch" and callable(self.proxy_dataset):
            self._fit_to_reference()
        if state["threshold"] is not None and self.labelling is not None:
            self.labelling = self.labelling.restored(state)
            if self.labelling.combination is not None:
                self._combine(self.labelling.combination)
            fitting.set_labels(self.labelling, self.args, self.collator, self.train_dataset)

    def _fit_to_reference(self) -> None:
        """Make the proxy set of the last sync again, from the reference that the checkpoint holds."""
        pipeline, name, policy = self.family.pipeline, self.family.denoiser_name, self.family.denoiser
        with self.reference_policy() as reference:
            setattr(pipeline, name, reference)
            try:
                self._fit_threshold(self.train_dataset)
            finally:
                setattr(pipeline, name, policy)

    def _combine(self, combination: thresholds.ScoreCombination) -> None:
        for rows in (self.train_dataset, *self._evaluation_rows()):
            if isinstance(rows, ScoredDataset):
                rows.combine(combination)

    def _load_policy(self, folder: Path) -> None:
        if self.reference_model is not None:
            denoiser = self.family.denoiser
            denoiser.load_state_dict(saved_state(denoiser, folder, self.family.denoiser_name))
            return
        file = folder / adapters.WEIGHTS_NAME
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no {adapters.WEIGHTS_NAME}: it is no checkpoint of TGOLTrainer.")
        adapters.load_adapter(self.family.denoiser, self.family.denoiser_name, file)

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
            model_name (`str`, *optional*):
                Title; by default the name of the Hub repository or output folder.
            extras:
                Further fields of [`card.CardFacts`] (`evaluations`, `pictures`, `license`, ...), kept for later saves.
        """
        if not self.args.should_save:
            return
        extras["model_name"] = model_name
        self.card_extras.update({name: value for name, value in extras.items() if value is not None})
        self._write_card(Path(self.args.output_dir))


def _check_processes(args: TGOLConfig) -> None:
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size > 1 and args.world_size == 1:
        raise ValueError(
            f"The launcher started {world_size} processes (WORLD_SIZE), but this one runs alone and all would write "
            f"to {args.output_dir}. On machines without a GPU add `--use_cpu true` (TGOLConfig(use_cpu=True))."
        )


def _summarize_records(prediction: EvalPrediction) -> dict[str, float]:
    """Averages over an evaluation set, each row counted once however many processes there were."""
    record = torch.as_tensor(np.asarray(prediction.predictions))
    sums = MetricSums()
    sums.add(record)
    return {"loss": record[:, RECORD.index("loss")].double().mean().item(), **sums.pop()}


@contextlib.contextmanager
def _changed(args: TGOLConfig, **values: Any) -> Iterator[None]:
    before = {name: getattr(args, name) for name in values}
    try:
        for name, value in values.items():
            setattr(args, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(args, name, value)
