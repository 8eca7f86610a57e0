"""`TGOLTrainer`: threshold-guided optimization on `transformers.Trainer`. Orchestration only."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.utils import DynamoBackend, gather_object
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback

from . import adapters, thresholds
from .caching import Workers
from .config import TGOLConfig, size_of
from .config.checks import check_processes, check_sharding
from .data import (
    LABELS,
    Collator,
    Columns,
    DataReport,
    GroupSampler,
    ScoredDataset,
    ScoredStream,
    SizeSampler,
    StreamPasses,
    check_columns,
    innermost_sampler,
    prepare_dataset,
    stream_passes,
)
from .data.prompts import warn_of_prompts
from .draws import EVALUATION_STEP, BatchDraws
from .families import Conditioning, KeptPrompts
from .families.compiling import compile_blocks
from .labels import Labeler
from .labels.advice import advise_training
from .labels.training import (
    STREAMED_COLUMNS,
    AnyDataset,
    ProxyDataset,
    check_comparisons,
    check_sources,
    fit_rows,
)
from .likelihoods import Draw, log_likelihood, to_device
from .loading import load_model
from .metrics import MetricSums, stack_record, summarize_records
from .objective import ScoredBatch, TemperatureWatch, training_loss
from .run import Run, RunCallback
from .saving.facts import dataset_facts
from .saving.files import STATE_NAME, ReportedConfig
from .saving.resuming import open_output
from .saving.trainer import SavingTrainer
from .starts import Starts, check_base
from .value_baseline import ValueBaseline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin
    from peft import PeftConfig

logger = logging.getLogger(__name__)


class TGOLTrainer(SavingTrainer):
    """
    Align a diffusers pipeline from unpaired prompt / image / score rows (paper: arXiv 2605.04653).

    Args:
        model (`str`, `Path` or `diffusers.DiffusionPipeline`):
            Hub id, local folder or loaded pipeline of a supported class; `"shapes"` and `"shapes-masked"` are the
            models embedded in this package. A loaded pipeline is used in place.
        args ([`TGOLConfig`], *optional*): By default the paper's settings, with output to `tgol_output`.
        train_dataset (`datasets.Dataset` or `datasets.IterableDataset`, *optional*):
            Prompt (str), image (or video) and score (real number, higher is better), in the columns that `args` names.
            Needed for `train()`.
        eval_dataset (the same, or `dict[str, Dataset]`, *optional*):
            Labelled with the training threshold, so a `train_dataset` is needed too.
        proxy_dataset (`datasets.Dataset`, or a callable `(pipeline) -> Dataset`, *optional*):
            Scores from which the threshold is estimated instead of the training scores (paper, Sec. 3.3). A callable
            gets the pipeline while the policy is the reference, and is called again after each sync where
            `threshold_update="epoch"`.
        peft_config (`peft.LoraConfig`, *optional*): By default r = alpha = 16 on the model family's usual targets.
        quantization_config (`diffusers.BitsAndBytesConfig`, *optional*):
            Loads the denoiser quantised (QLoRA), where `model` is an id or a folder; bitsandbytes needs a GPU.
        callbacks (`list[transformers.TrainerCallback]`, *optional*):
            Added to Trainer's own; a [`sampling.SampleCallback`] samples and scores images during training.
        optimizers (`tuple`, *optional*): Optimizer and scheduler, as in Trainer.

    Raises:
        ValueError: for arguments that would train something else than asked.
        DataError: for data that cannot be trained on, naming column and rows.
        ThresholdError: for scores that cannot be divided in two.
    """

    # Each micro-batch's loss is its own mean; Trainer divides by the number of accumulation steps.
    loss_is_scaled_for_ga = False
    _passes: StreamPasses | None = None

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        args: TGOLConfig | None = None,
        train_dataset: AnyDataset | None = None,
        eval_dataset: AnyDataset | dict[str, AnyDataset] | None = None,
        proxy_dataset: ProxyDataset | None = None,
        peft_config: PeftConfig | None = None,
        quantization_config: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LRScheduler | None] = (None, None),
    ) -> None:
        args = args if args is not None else TGOLConfig(output_dir="tgol_output")
        check_processes(args)
        if args.should_save:
            open_output(args.output_dir)
        self.args = args
        score = args.score_column
        if args.score_columns:
            score = thresholds.combined_name(args.score_columns, args.score_combination)
        self.columns = Columns(args.prompt_column, args.image_column, score, prompt_syntax=args.prompt_syntax)
        check_sources(args, train_dataset, proxy_dataset)

        self.family = load_model(model, args, quantization_config)
        if self.family.num_frames is not None:
            frames = self.family.num_frames
            self.columns = dataclasses.replace(self.columns, video=args.video_column, num_frames=frames)
        if args.uses_groups:
            self.columns = dataclasses.replace(self.columns, group=args.group_column or args.prompt_column)
        self.reference_model: ModelMixin | None = None
        self._prepare_policy(peft_config)

        self.proxy_dataset = proxy_dataset
        self.data_reports: dict[str, DataReport] = {}
        self.dataset_facts, self.example_prompt = [], None
        self.labeler: Labeler | None = None
        size = size_of(args.resolution) or self.family.native_size
        self.collator = Collator(size, num_frames=self.family.num_frames)
        self.draws = BatchDraws(self.family, args, self.collator)
        self._value = ValueBaseline(self.draws, self._reference_prediction) if args.value_baseline else None
        train_rows = self._prepare_dataset(train_dataset, "train_dataset") if train_dataset is not None else None
        if train_rows is not None:
            self._record_facts(train_dataset, train_rows)
            train_rows = self._label(train_rows)
        eval_rows = self._prepare_eval_dataset(eval_dataset)
        self._train_metrics = MetricSums()
        self._train_sampler: Any = None
        self._reference_epoch = self._pass = 0
        self.card_extras = {}
        run_callbacks = [callback for callback in callbacks or () if isinstance(callback, RunCallback)]
        metric = (args.metric_for_best_model or "").removeprefix("eval_")
        if metric.startswith("samples/") and not run_callbacks:
            raise ValueError(
                f"`metric_for_best_model` is {metric!r}, which will not be logged. Hand in a `SampleCallback` with "
                "`reward_funcs` in `callbacks`."
            )
        for number, callback in enumerate(run_callbacks):
            self._prepare_callback(callback, run_callbacks[:number])

        super().__init__(
            model=self.family.denoiser,
            args=args,
            data_collator=self.collator,
            train_dataset=train_rows,
            eval_dataset=eval_rows,
            compute_metrics=self._evaluation_metrics,
            callbacks=[
                Starts(self._check_base, self._on_epoch_begin),
                TemperatureWatch(self.family.likelihood),
                *(callbacks or []),
            ],
            optimizers=optimizers,
        )
        check_sharding(args, fsdp=self.is_fsdp_enabled, deepspeed=self.is_deepspeed_enabled)
        if args.torch_compile:
            self._compile()
        for callback in run_callbacks:
            callback.start(self._run())
        # Evaluation returns a record matrix and row ids, which Trainer calls predictions and labels.
        self.label_names = ["row_id"]

    # ---- Set-up ----

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback, as Trainer does; one that uses the run is set up."""
        added = callback() if isinstance(callback, type) else callback
        if isinstance(added, RunCallback):
            self._prepare_callback(added, self._run_callbacks)
        super().add_callback(added)
        if isinstance(added, RunCallback):
            added.start(self._run())

    def _prepare_callback(self, callback: RunCallback, others: Sequence[Any]) -> None:
        if any(type(callback) is type(other) for other in others):
            name = type(callback).__name__
            raise ValueError(f"`callbacks` holds two of {name}, which would write the same files: hand in one.")
        callback.prepare(self.args, self.family.num_frames)

    @property
    def _run_callbacks(self) -> list[RunCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, RunCallback)]

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
        if family.blocks is not None:
            family.blocks.leave_to_this_process()
        if args.gradient_checkpointing or getattr(args, "activation_checkpointing", False):
            family.enable_gradient_checkpointing()
            # Trainer calls the switch of transformers' models, which diffusers' models lack.
            for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable"):
                setattr(family.denoiser, name, _switched_on_already)

    def _lora_config(self, peft_config: PeftConfig | None) -> PeftConfig:
        from peft import LoraConfig

        config = copy.deepcopy(peft_config) or LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian")
        adapters.check_peft_config(config)
        if config.use_dora and self.family.blocks is not None:
            raise ValueError("`use_dora` reads the weights that `group_offload` and `storage_dtype` keep elsewhere.")
        if config.target_modules is None:
            config.target_modules = set(self.family.default_target_modules)
        return config

    def _run(self) -> Run:
        """What a callback may use of this run."""
        return Run(
            args=self.args,
            pipeline=KeptPrompts(self.family, alone=self.args.world_size == 1).pipeline,
            size=self.collator.resolution,
            num_frames=self.family.num_frames,
            call_arguments=self.family.origin.call_arguments,
            base_model=self._base_model,
            gather=gather_object,
            log=self.log,
            add_card_image=self._add_card_image,
            add_limit=self.limits.append,
            keep_policy=self._keep_policy,
            callbacks=lambda: self.callback_handler.callbacks,
            sharded=self.is_fsdp_enabled,
        )

    # ---- Data and labels ----

    def _prepare_rows(self, rows: ScoredDataset | ScoredStream, batch_size: int, *, training: bool = False) -> None:
        """Choose sizes, and compute what steps then read. The rows of a stream are encoded at each step."""
        if isinstance(rows, ScoredStream) or not self.args.cache:
            self.family.to(self.args.device)  # its encoders stay there: no step moves them
        if isinstance(rows, ScoredDataset):
            workers = Workers.of_run(self.args, self.accelerator.wait_for_everyone)
            reference = self.reference_model or self.family.denoiser
            self.draws.prepare(rows, batch_size, workers, reference, self._reference_error, training=training)

    def _reference_error(self, inputs: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        draw, conditioning = self.draws(inputs, step)
        # The denoiser is not wrapped yet, and only its wrapper brings the autocast of `bf16` and `fp16`.
        with torch.no_grad(), self.accelerator.autocast():
            return self._reference_pass(draw, conditioning)[1]

    def _compile(self) -> None:
        networks = [network for network in (self.family.denoiser, self.reference_model) if network is not None]
        options = (self.args.torch_compile_backend, self.args.torch_compile_mode)
        if all(compile_blocks(network, *options) for network in networks):
            self.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # it would compile all in one

    def _reference_prediction(self, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            return self._reference_pass(draw, conditioning)[0]

    def _check_base(self) -> None:
        if not self.args.allow_bad_base:
            latents = partial(self.draws.latents, step=EVALUATION_STEP)
            rows = (self.train_dataset, self.collator, self.args.per_device_train_batch_size)
            check_base(*rows, self.family.likelihood, latents, self._reference_prediction)

    def _prepare_dataset(self, dataset: AnyDataset, name: str) -> ScoredDataset | ScoredStream:
        if self.args.score_columns and isinstance(dataset, datasets.IterableDataset):
            raise ValueError(f"{name}: {STREAMED_COLUMNS}")
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
                buckets=self.draws.buckets,
            )
        self.data_reports[name] = report
        warn_of_prompts(name, dict.fromkeys(rows.written_prompts), self.args.prompt_syntax)
        suffix = max(self.args.csft_suffixes, key=len) if self.args.loss_type == "csft" else ""
        prompts = [prompt + suffix for prompt in dict.fromkeys(rows.prompts)]
        long, limit = self.family.count_long_prompts(prompts)
        if long:
            logger.warning(
                "%s: %d of %d different prompts are longer than the text encoder's %d tokens. The rest of them is "
                "cut off, in training as in generation.",
                *(name, long, report.num_unique_prompts, limit),
            )
        return rows

    def _prepare_eval_dataset(self, dataset: AnyDataset | dict[str, AnyDataset] | None) -> Any:
        if dataset is None:
            return None
        if self.labeler is None:
            raise ValueError(
                "`eval_dataset` needs a `train_dataset`: its rows are labelled and weighted by what is estimated from "
                "the training scores. Give the scored data that the adapter was, or would be, trained on."
            )
        if isinstance(dataset, dict) and not isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
            return {name: self._prepare_eval_rows(part, f"eval_dataset[{name!r}]") for name, part in dataset.items()}
        return self._prepare_eval_rows(dataset, "eval_dataset")

    def _prepare_eval_rows(self, dataset: AnyDataset, name: str) -> ScoredDataset | ScoredStream:
        rows = self._prepare_dataset(dataset, name)
        self._label_evaluation(rows)
        return rows

    def _record_facts(self, dataset: AnyDataset, rows: ScoredDataset | ScoredStream) -> None:
        facts = dataset_facts(dataset, [*self.columns.names[:2], *(self.args.score_columns or self.columns.names[2:])])
        if isinstance(rows, ScoredDataset):
            report = self.data_reports["train_dataset"]
            facts.num_rows, facts.num_dropped = report.num_kept, report.num_rows - report.num_kept
            self.example_prompt = rows[0]["prompt"]
        self.dataset_facts = [facts]

    def _label(self, rows: ScoredDataset | ScoredStream) -> ScoredDataset | ScoredStream:
        """Fit the labeler, label all rows, and return the rows that are trained on."""
        proxy = self.proxy_dataset
        if callable(proxy):
            with self.family.whole() as pipeline:
                proxy = proxy(pipeline)
        before = self.labeler
        combination = before.combination if before else None
        self.labeler, labels, kept = fit_rows(rows, self.args, self.columns, proxy=proxy, combination=combination)
        if isinstance(rows, ScoredStream):
            rows.follower = self.labeler.follower
        elif labels is not None:
            rows = rows if kept is None else rows.kept(kept)
            rows.labels = labels
            check_comparisons(rows, labels.score, self.args)
            prompts = self.args.prompt_column
            advice = advise_training(self.labeler, rows.scores, rows.prompts, prompts) if not before else []
            for item in advice:
                logger.warning("%s To change that: %s.", item.text, item.flag)
        for evaluated in self._evaluation_rows():
            self._label_evaluation(evaluated)
        return rows

    def _label_evaluation(self, rows: ScoredDataset | ScoredStream) -> None:
        labeler = self.labeler
        if labeler is None:
            return
        if isinstance(rows, ScoredDataset):
            tau = labeler.row_thresholds(rows.groups) if labeler.by_group is not None else None
            rows.labels = labeler(rows.scores, tau)
        else:  # every evaluation meets the same threshold
            rows.follower = dataclasses.replace(labeler, window=None).follower

    def _evaluation_rows(self) -> list[ScoredDataset | ScoredStream]:
        found = getattr(self, "eval_dataset", None)  # none yet while the trainer is set up
        return [rows for rows in (found.values() if isinstance(found, dict) else [found]) if rows is not None]

    @property
    def threshold(self) -> thresholds.Threshold | None:
        """τ and its counts; `None` for a trainer without training data."""
        return self.labeler.threshold if self.labeler else None

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
        self._prepare_rows(self.train_dataset, self._train_batch_size, training=True)
        for rows in self._evaluation_rows():
            self._prepare_rows(rows, self.args.per_device_eval_batch_size)
        if not isinstance(self.train_dataset, ScoredStream):
            loader = super().get_train_dataloader()
            if not len(loader):
                raise ValueError(
                    f"The {len(self.train_dataset)} rows give no batch of one size to each of {self.args.world_size} "
                    "processes: use a smaller `per_device_train_batch_size`, or `aspect_buckets=False`."
                )
            self._train_sampler = innermost_sampler(loader)
            loader.device = None  # batches stay on the CPU, see `_prepare_inputs`
            return loader
        self._passes = stream_passes(self.train_dataset, self.args, self.data_collator)
        return DataLoader(self._passes, batch_size=None, generator=self._passes.loader.generator)

    def _init_training_state(self, max_steps: int, steps: int, epochs: int, checkpoint: str | None, trial: Any) -> Any:
        # Trainer takes all steps for those of one pass where the dataset has no length.
        trained = super()._init_training_state(max_steps, steps, epochs, checkpoint, trial)
        if self._passes is None or checkpoint is None:
            return trained
        self._passes.number, updates = json.loads(Path(checkpoint, STATE_NAME).read_text())["stream"] or (0, 0)
        return self._passes.number, updates * self.args.gradient_accumulation_steps

    def _get_train_sampler(self, train_dataset: Any = None) -> torch.utils.data.Sampler | None:
        args, rows = self.args, train_dataset if train_dataset is not None else self.train_dataset
        grouped = args.group_size is not None and isinstance(rows, ScoredDataset)
        numbers = thresholds.group_ids(rows.groups)[0] if grouped else None
        if isinstance(rows, ScoredDataset) and rows.resolutions is not None:
            size, last = self._train_batch_size, args.dataloader_drop_last
            return SizeSampler(rows.resolutions, size, last, args.data_seed, numbers, args.group_size)
        if numbers is None or args.group_size is None:
            return super()._get_train_sampler(train_dataset)
        return GroupSampler(numbers, args.group_size, args.data_seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> torch.utils.data.Sampler | None:
        if getattr(eval_dataset, "resolutions", None) is None:
            return super()._get_eval_sampler(eval_dataset)
        sampler = SizeSampler(eval_dataset.resolutions, self.args.per_device_eval_batch_size, drop_last=False)
        eval_dataset.total_dataset_length = len(sampler)  # accelerate would cut the rows beyond the dataset's length
        return sampler

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        """The evaluation loader; keeps the last incomplete batch, whatever `dataloader_drop_last` says of training."""
        if isinstance(eval_dataset, datasets.Dataset | datasets.IterableDataset):  # given to `evaluate`
            eval_dataset = self._prepare_eval_dataset(eval_dataset)
        if eval_dataset is self.train_dataset:
            eval_dataset = copy.copy(eval_dataset)  # training keeps its own sizes
        for rows in (
            self._evaluation_rows() if eval_dataset is None or isinstance(eval_dataset, str) else [eval_dataset]
        ):
            self._prepare_rows(rows, self.args.per_device_eval_batch_size)
        with _changed(self.args, dataloader_drop_last=False):
            loader = super().get_eval_dataloader(eval_dataset)
        loader.device = None
        return loader

    def _on_epoch_begin(self, epoch: float, first: bool) -> None:
        # At the beginning of an epoch rather than at the end of the one before, so that a checkpoint written on the
        # last step resumes into the same state. A resume in mid-epoch finds `_reference_epoch` already there.
        self._pass = current = math.floor(epoch + 1e-6)
        if hasattr(self._train_sampler, "set_epoch"):
            self._train_sampler.set_epoch(current)
        again = self.args.threshold_update == "epoch"
        if isinstance(self.train_dataset, ScoredStream):
            if again and not first:
                self._label(self.train_dataset)
        elif self.args.reference_update == "epoch" and current > self._reference_epoch:
            self.update_reference()
            self._reference_epoch = current
            if again:
                self._label(self.train_dataset)
            first = True
        if self._value and first:  # of this reference, after a resume too
            self._value.fit(self.train_dataset, self.labeler.score_std if self.labeler else 1.0)

    # ---- Loss ----

    def update_reference(self) -> None:
        """Make the policy of this moment the reference (paper, Algorithm 1, line 15)."""
        if self.draws.references is not None:
            raise ValueError("The reference's errors were computed (`precompute_ref_log_probs`): it cannot move.")
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

    @contextlib.contextmanager
    def _base_model(self, moved: bool) -> Iterator[bool]:
        """
        Put the base model into the pipeline; yield whether it is still to be had.

        Args:
            moved (`bool`): Whether the policy may differ from the model that the run began with.
        """
        if self.reference_model is not None and self._reference_epoch:
            yield False
        elif self.reference_model is None and self.args.reference == "base":
            with adapters.base_policy(self.family.denoiser):
                yield True
        elif not moved:  # the policy is its reference, and runs in the precision of every later step
            yield True
        else:
            with self.reference_policy() as reference, self._in_pipeline(reference):
                yield True

    @contextlib.contextmanager
    def _in_pipeline(self, network: torch.nn.Module) -> Iterator[None]:
        pipeline, name, policy = self.family.pipeline, self.family.denoiser_name, self.family.denoiser
        setattr(pipeline, name, network)
        try:
            yield
        finally:
            setattr(pipeline, name, policy)

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Leave a batch on the CPU: rows, prompts and keys are read there, and a step must not wait for the device."""
        return inputs

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
            model (`torch.nn.Module`): The denoiser as Trainer wrapped it.
            inputs (`dict[str, torch.Tensor]`): A batch of [`data.Collator`], on the CPU.
            return_outputs (`bool`, *optional*, defaults to `False`): Also return the (B, len(metrics.RECORD)) record.
            num_items_in_batch (`int`, *optional*): Unused: the loss is a mean over the micro-batch.

        Returns:
            `torch.Tensor`: scalar float32, and the record if asked for.
        """
        args, likelihood, training = self.args, self.family.likelihood, model.training
        step = EVALUATION_STEP
        if training:
            step = self.draws.training_step(self.state.global_step, self._pass, inputs)
        draw, conditioning = self.draws(inputs, step)
        reference_prediction: Any = None
        # The reference goes first: nothing is switched between the policy's forward pass and its backward pass.
        reference_error = self.draws.reference_error(inputs, step)
        if reference_error is None and args.needs_reference:
            reference_prediction, reference_error = self._reference_pass(draw, conditioning, model)
        prediction = self.family.predict(model, draw, conditioning)
        error = likelihood.error(prediction, draw)
        change = unknown = torch.full_like(error, math.nan, requires_grad=False)
        if reference_prediction is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and args.loss_type == "tgol_anchored"):
                change = likelihood.change(prediction, reference_prediction, draw)
        value = self._value(reference_prediction, draw, inputs) if self._value and training else None
        if reference_error is None:
            reference_error = unknown
        log_ratio = log_likelihood(likelihood, error, args.temperature) - log_likelihood(
            likelihood, reference_error, args.temperature
        )

        def mixed_error(share: float) -> torch.Tensor:
            return likelihood.error(torch.lerp(reference_prediction.float(), prediction.float(), share), draw)

        batch = {name: to_device(inputs[name], error.device) for name in (*LABELS, "group") if name in inputs}
        errors = {"error": error, "reference_error": reference_error, "change": change}
        scored = ScoredBatch(log_ratio=log_ratio, **errors, value=value, batch=batch, mixed_error=mixed_error)
        labeler = self.labeler
        weighting = labeler.weighting if labeler else args.weighting
        result = training_loss(scored, args, weighting, labeler.score_std if labeler else 1.0)
        level = unknown if draw.noise_level is None else draw.noise_level
        record = stack_record(**result._asdict(), **errors, score=batch["score"], noise_level=level)
        if training:
            self._record = record
            self._train_metrics.add(record)
        return (result.loss.mean(), record) if return_outputs else result.loss.mean()

    def _reference_pass(
        self, draw: Draw, conditioning: Conditioning, model: torch.nn.Module | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reference's prediction and its (B,) float32 error."""
        with self.reference_policy(model) as reference:
            prediction = self.family.predict(reference, draw, conditioning)
            return prediction, self.family.likelihood.error(prediction, draw)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Return loss, record matrix and row ids; the draws are the same at every evaluation."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, record = self.compute_loss(model, inputs, return_outputs=True)
        return (loss, None, None) if prediction_loss_only else (loss, record, to_device(inputs["row_id"], loss.device))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the averages since the last log line, over all processes; stop on a loss that is not finite."""
        if "loss" in logs:
            logs.update(self._train_metrics.pop(self.accelerator.gather))
        super().log(logs, start_time)

    def _evaluation_metrics(self, records: EvalPrediction) -> dict[str, float]:
        metrics = summarize_records(records.predictions, records.label_ids)
        for callback in self._run_callbacks:
            metrics |= callback.evaluate(self.state, self.control, self.is_in_train)
        return metrics

    # ---- Resuming ----

    def state_facts(self) -> dict[str, Any]:
        """Return what a checkpoint must remember beside weights: labels, size, epoch of the reference."""
        return {
            **(self.labeler.to_dict() if self.labeler else {"threshold": None}),
            "resolution": list(self.collator.resolution),
            "reference_epoch": self._reference_epoch,
            "stream": None if self._passes is None else [self._passes.number, self._passes.updates],
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self._load_policy(folder)
        state = json.loads((folder / STATE_NAME).read_text())
        self._reference_epoch = state["reference_epoch"]
        self._load_reference(folder, self._reference_epoch)
        if self._reference_epoch and self.args.threshold_update == "epoch" and callable(self.proxy_dataset):
            # The proxy set of the last update again, from the reference that the checkpoint holds.
            with self.reference_policy() as reference, self._in_pipeline(reference):
                self._label(self.train_dataset)
        if state["threshold"] is None or self.labeler is None:
            return
        self.labeler = self.labeler.restored(state)
        if isinstance(self.train_dataset, ScoredDataset):
            self.train_dataset.labels = self.labeler(self.train_dataset.scores, self.labeler.rows)
        elif self.train_dataset is not None:
            self.train_dataset.follower = self.labeler.follower
        for rows in self._evaluation_rows():
            self._label_evaluation(rows)


def _switched_on_already(**kwargs: Any) -> None:
    """Stand in for the switch of activation checkpointing that Trainer calls."""


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
