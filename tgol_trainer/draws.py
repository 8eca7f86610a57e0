"""Make what policy and reference are asked about a batch: latents, noise and time (or mask), and conditioning."""

from __future__ import annotations

import dataclasses

import torch

from . import adapters
from .caching import EncodingCache, component_fingerprint, encode_batch
from .config import TGOLConfig
from .data import decode_prompts
from .families import ModelFamily
from .likelihoods import Draw, RowGenerators

EVALUATION_STEP = -1
"""Step that keys the random draws of evaluation. Every evaluation uses the same draws."""


def fixed_step(number: int) -> int:
    """Return the step that keys one of the fixed draws of `precompute_ref_log_probs`, counted from 0."""
    return EVALUATION_STEP - 1 - number


@dataclasses.dataclass(frozen=True)
class BatchDraws:
    """
    Makes the draws of batches. The same step and row give the same draw, whatever else is in the batch.

    Args:
        family ([`ModelFamily`]): The model.
        args ([`TGOLConfig`]): Seed, flips, caption dropout, latent sampling, noise of groups.
        resolution (`tuple[int, int]`): (height, width) of the pixels.
    """

    family: ModelFamily
    args: TGOLConfig
    resolution: tuple[int, int]

    def __call__(
        self, inputs: dict[str, torch.Tensor], step: int, cache: EncodingCache | None = None
    ) -> tuple[Draw, dict[str, torch.Tensor]]:
        """
        Return one draw of a batch, and the conditioning as keyword arguments of the denoiser.

        Args:
            inputs (`dict[str, torch.Tensor]`): A batch of [`data.Collator`].
            step (`int`): Keys the random numbers; images are mirrored and captions dropped unless it is that of
                evaluation.
            cache ([`EncodingCache`], *optional*): Holds the images and prompts of rows that were encoded before.
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
        conditioning, encoded = encode_batch(self.family, cache, inputs, prompts, mirrored, self.resolution)
        latents = self.family.latents(encoded, rows, sample=args.latent_sampling == "sample")
        if args.share_group_noise:
            rows = RowGenerators(args.seed, step, inputs["group"].tolist())
        return self.family.likelihood.draw(latents, rows), conditioning

    def reference_key(self, cache: EncodingCache, network: torch.nn.Module) -> list[str]:
        """
        Return what the reference's errors depend on, beside rows and steps.

        Args:
            cache ([`EncodingCache`]): Its files are named after what encodes, and after the size.
            network (`torch.nn.Module`): The denoiser with the reference in it, or the reference itself.
        """
        args, scheduler = self.args, self.family.pipeline.scheduler.config
        names = ("seed", "latent_sampling", "random_flip", "caption_dropout", "share_group_noise", "bf16", "fp16")
        settings = [f"{name}={getattr(args, name)}" for name in names]
        schedule = sorted((name, value) for name, value in scheduler.items() if not name.startswith("_"))
        adapter = getattr(network, "peft_config", {}).get(adapters.REFERENCE)
        return [
            component_fingerprint(network, adapters.reference_name),
            *(store.folder.name for store in (cache.images, cache.prompts)),
            *(str(part) for part in (self.family.settings, schedule, adapter)),
            *settings,
        ]
