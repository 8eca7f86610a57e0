"""Make what policy and reference are asked about a batch: latents, noise and time (or mask), and conditioning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import torch

from . import adapters
from .caching import EncodingCache, ReferenceErrors, Workers, encode_batch, encode_images
from .config import TGOLConfig
from .data import Buckets, Collator, ScoredDataset, decode_prompts
from .families import Conditioning, ModelFamily
from .fingerprint import component_fingerprint
from .likelihoods import Draw, RowGenerators, to_device

EVALUATION_STEP = -1
"""Step that keys the random draws of evaluation. Every evaluation uses the same draws."""


class BatchDraws:
    """
    Makes the draws of batches, from caches where they can be had.

    The same step and row give the same draw, whatever else is in the batch.

    Args:
        family ([`ModelFamily`]): The model.
        args ([`TGOLConfig`]): The configuration.
        collator ([`Collator`]): Makes batches of rows.
    """

    def __init__(self, family: ModelFamily, args: TGOLConfig, collator: Collator) -> None:
        self.family, self.args, self.collator = family, args, collator
        self.buckets: Buckets | None = None
        if args.aspect_buckets:
            self.buckets = Buckets(collator.resolution, family.resolution_multiple, family.max_side)
        self.cache: EncodingCache | None = None
        self.references: ReferenceErrors | None = None

    def prepare(
        self,
        rows: ScoredDataset,
        batch_size: int,
        workers: Workers,
        reference: torch.nn.Module,
        error: Callable[[dict[str, torch.Tensor], int], torch.Tensor],
        *,
        training: bool,
    ) -> None:
        """
        Choose the sizes of images, and compute before the first step what steps then read.

        Args:
            rows ([`ScoredDataset`]): The rows; they are told their sizes, and that they are encoded.
            batch_size (`int`): Rows of a batch.
            workers ([`Workers`]): Processes that share the work; every process must call this.
            reference (`torch.nn.Module`): The denoiser with the reference in it, or the reference itself.
            error (`Callable[[dict, int], torch.Tensor]`): The reference's errors of a batch on the draw of a step.
            training (`bool`): Whether the rows are trained on, and not only evaluated.

        Raises:
            OSError: if the cache cannot be written.
            DataError: for an image that can no longer be opened.
        """
        args = self.args
        if self.buckets is not None:
            rows.resolutions = self.buckets.resolutions(rows.sizes, batch_size if training else 1)
        if not args.cache:
            return
        if self.cache is None:
            self.cache = EncodingCache(self.family, args.cache_folder, self.collator, workers)
        prompts = rows.prompts
        if args.loss_type == "csft":
            prompts = [prompt + suffix for prompt in dict.fromkeys(prompts) for suffix in args.csft_suffixes]
        if training and args.caption_dropout:
            prompts.append("")
        self.cache.add(rows, prompts, mirrored=training and args.random_flip)
        rows.encoded = True
        if not args.precompute_ref_log_probs:
            return
        if self.references is None:
            key = self._reference_key(self.cache, reference)
            self.references = ReferenceErrors(args.cache_folder, key, self.collator, workers)
        steps = [EVALUATION_STEP]
        if training:  # draws that no pass will come to are not computed
            steps = [_fixed_step(number) for number in range(min(args.num_ref_draws, self._num_passes(rows)))]
        self.references.add(rows, steps, error, batch_size)

    def _num_passes(self, rows: ScoredDataset) -> int:
        """Return the number of passes over the rows that training makes, the last one possibly in part."""
        args = self.args
        if args.max_steps <= 0:
            return math.ceil(args.num_train_epochs)
        batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if rows.resolutions is not None:  # what does not fill a batch of its size is left out of a pass
            return args.max_steps
        return math.ceil(args.max_steps / max(len(rows) // batch, 1))

    def training_step(self, global_step: int, epoch: int, inputs: dict[str, torch.Tensor]) -> int:
        """Return the step that keys the draw of a batch: the optimizer's, or that of one of its fixed draws."""
        if self.references is None or "image_key" not in inputs:
            return global_step
        return _fixed_step(epoch % self.args.num_ref_draws)

    def reference_error(self, inputs: dict[str, torch.Tensor], step: int) -> torch.Tensor | None:
        """Return the reference's (B,) float32 errors where they were computed before."""
        if self.references is None or "image_key" not in inputs:
            return None
        return to_device(self.references.read(inputs, step), self.family.device)

    def __call__(self, inputs: dict[str, torch.Tensor], step: int) -> tuple[Draw, Conditioning]:
        """Return one draw of a batch, and the conditioning; arguments as those of [`latents`]."""
        latents, rows, conditioning = self.latents(inputs, step)
        return self.family.likelihood.draw(latents, rows), conditioning

    def latents(self, inputs: dict[str, torch.Tensor], step: int) -> tuple[torch.Tensor, RowGenerators, Conditioning]:
        """
        Return the latents of a batch, the keys of its noise, and the conditioning: keyword arguments of the denoiser.

        Args:
            inputs (`dict[str, torch.Tensor]`): A batch of [`data.Collator`], on the CPU.
            step (`int`): Keys the random numbers. At `EVALUATION_STEP` no image is mirrored and no caption dropped.
        """
        args, training = self.args, step != EVALUATION_STEP
        rows = RowGenerators(args.seed, step, inputs["row_id"].tolist())
        mirrored = [False] * len(rows.row_ids)
        if training and args.random_flip:
            mirrored = (rows.uniform("flip") < 0.5).tolist()
        prompts = decode_prompts(inputs["prompt_bytes"], inputs["prompt_length"])
        if args.loss_type == "csft":
            positive = (inputs["margin"] >= 0).tolist()
            prompts = [prompt + args.csft_suffixes[not good] for prompt, good in zip(prompts, positive, strict=True)]
        if training and args.caption_dropout:
            dropped = (rows.uniform("caption") < args.caption_dropout).tolist()
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, dropped, strict=True)]
        conditioning, encoded = encode_batch(self.family, self.cache, inputs, prompts, mirrored)
        latents = self.family.latents(encoded, rows, sample=args.latent_sampling == "sample")
        if args.share_group_noise:
            rows = RowGenerators(args.seed, step, inputs["group"].tolist())
        return latents, rows, conditioning

    def clean_latents(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the latents of a batch (B, C, ...): the modes of their posteriors, no image mirrored."""
        rows = RowGenerators(self.args.seed, EVALUATION_STEP, inputs["row_id"].tolist())
        encoded = encode_images(self.family, self.cache, inputs, [False] * len(rows.row_ids))
        return self.family.latents(encoded, rows, sample=False)

    def _reference_key(self, cache: EncodingCache, network: torch.nn.Module) -> list[str]:
        """Return what the reference's errors depend on, beside rows and steps."""
        args, scheduler = self.args, self.family.pipeline.scheduler.config
        names = ("seed", "latent_sampling", "random_flip", "caption_dropout", "share_group_noise", "bf16", "fp16")
        settings = [f"{name}={getattr(args, name)}" for name in names]
        schedule = sorted((name, value) for name, value in scheduler.items() if not name.startswith("_"))
        adapter = getattr(network, "peft_config", {}).get(adapters.REFERENCE)
        acting = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora")
        scale = adapter and json.dumps({name: getattr(adapter, name) for name in acting}, sort_keys=True)
        return [
            component_fingerprint(network, adapters.reference_name),
            *(cache.image_key, cache.prompts.folder.name),
            *(str(part) for part in (self.family.settings, schedule, scale)),
            *settings,
        ]


def _fixed_step(number: int) -> int:
    """Return the step that keys one of the fixed draws of `precompute_ref_log_probs`, counted from 0."""
    return EVALUATION_STEP - 1 - number
