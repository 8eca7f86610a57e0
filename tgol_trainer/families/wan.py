"""Wan 2.1 and 2.2, text to video."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import TYPE_CHECKING

import torch

from tgol_trainer import adapters
from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows
from .video import VideoFlowFamily

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

logger = logging.getLogger(__name__)

_TOKENS = 512
"""Tokens of a prompt: `WanPipeline.__call__` asks for 512, while `encode_prompt` alone would take 226."""


class WanFamily(VideoFlowFamily):
    """
    `WanPipeline`: UMT5 text encoder, causal video autoencoder, transformer that predicts the velocity.

    Wan 2.2 A14B has two transformers, one for times from `boundary_ratio`·1000 on and one for those below. A run
    trains `settings.expert` on its own times. Wan 2.2 5B (`expand_timesteps`) takes a time for each token.

    Times are uniform by default: neither the paper nor diffusers says how to train these models, so that is an
    untested default. The noise levels are those of `FlowMatchEulerDiscreteScheduler` with the shift of the pipeline's
    scheduler (`flow_shift`: 3 for 480p, 5 for 720p).

    The autoencoder is kept in float32, in which the model's authors run it. Some modules of the transformer must stay
    float32 as well: `from_pretrained(dtype=torch.bfloat16)` keeps them, `.to(torch.bfloat16)` does not.

    Raises:
        ValueError: for an expert of a model without experts, and for a number of frames that the autoencoder would
            cut.
    """

    denoiser_name = "transformer"
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components: tuple[str, ...] = ("tokenizer", "text_encoder", "vae")
    token_limits = {"tokenizer": _TOKENS}
    default_size, default_frames = (480, 832), 81  # of `WanPipeline.__call__`; what the 1.3B model was trained for
    frames_per_second = 16
    rows_per_image = 1  # the pass with the empty prompt comes after the other

    def check_pipeline(self) -> None:
        """Choose the expert, and what suits Wan 2.2 5B; refuse what cannot be trained."""
        expert, experts = self.settings.expert, self.pipeline.config.get("boundary_ratio") is not None
        if expert is not None and not experts:
            raise ValueError(
                f"`expert` is {expert!r}, but this {type(self.pipeline).__name__} has no `boundary_ratio`, and so one "
                "transformer for all times: leave it out."
            )
        self.denoiser_name = "transformer_2" if expert == "low_noise" else "transformer"
        self.required_components = (*type(self).required_components, self.denoiser_name)
        if self.pipeline.config.get("expand_timesteps"):
            # As its authors generate (README of Wan-Video/Wan2.2), and not as `WanPipeline.__call__` does by default.
            self.default_size, self.default_frames = (704, 1280), 121
            suited = {"height": 704, "width": 1280, "num_frames": 121, **self.origin.call_arguments}
            self.origin = dataclasses.replace(self.origin, call_arguments=suited)
        super().check_pipeline()

    @classmethod
    def frame_rate(cls, pipeline: DiffusionPipeline) -> int:
        """Return 24 for Wan 2.2 5B."""
        return 24 if pipeline.config.get("expand_timesteps") else cls.frames_per_second

    def usage(self, location: str, prompt: str) -> str:
        """The snippet of a card, with a line for the other expert's adapter where there are two."""
        usage = super().usage(location, prompt)
        if self.pipeline.config.get("boundary_ratio") is None:
            return usage
        other = "transformer" if self.denoiser_name == "transformer_2" else "transformer_2"
        options = "".join(f", {name}={value}" for name, value in adapters.loading_options(other).items())
        line = next(line for line in usage.splitlines() if line.startswith("pipe.load_lora_weights"))
        more = f"# The other expert's adapter, where there is one: pipe.load_lora_weights(...{options})"
        return usage.replace(line, f"{line}\n{more}")

    def schedule(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise levels and times of the transformer that is trained."""
        sigmas, times = super().schedule()
        ratio = self.pipeline.config.get("boundary_ratio")
        if ratio is None:
            return sigmas, times
        boundary = ratio * self.pipeline.scheduler.config.num_train_timesteps
        own = (times >= boundary) == (self.denoiser_name == "transformer")
        return sigmas[: len(times)][own], times[own]

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, f, h, w)."""
        if self.pipeline.config.get("expand_timesteps"):
            tokens = draw.inputs[0, 0].numel() // math.prod(self.denoiser.config.patch_size)
            draw = dataclasses.replace(draw, timesteps=draw.timesteps[:, None].expand(-1, tokens))
        return super().predict(model, draw, conditioning)

    def prepare_pipeline(self) -> None:
        """Freeze every component, bring the autoencoder to float32, and warn of weights that have lost it."""
        super().prepare_pipeline()
        vae, transformer = self.pipeline.vae, self.denoiser
        if vae.dtype != torch.float32:
            logger.warning(
                "The autoencoder was loaded in %s and is used in float32, with weights that are rounded already. Load "
                'it in float32: model_init_kwargs={"dtype": {"default": "bfloat16", "vae": "float32"}}.',
                str(vae.dtype).removeprefix("torch."),
            )
            vae.to(torch.float32)
        kept = set(transformer._keep_in_fp32_modules or ())
        lost = [
            name
            for name, parameter in transformer.named_parameters()
            if parameter.dtype in (torch.bfloat16, torch.float16) and kept & set(name.split("."))
        ]
        if lost:
            logger.warning(
                "%d weights of the transformer that should stay in float32 are not (%s, ...), as after `.to(dtype)`. "
                "Load it with `from_pretrained(..., dtype=...)`, which keeps them.",
                len(lost),
                lost[0],
            )

    @property
    def resolution_multiple(self) -> int:
        """16 pixels, 32 for Wan 2.2 5B: the autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor_spatial * max(self.denoiser.config.patch_size[1:])

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 512, D), with zeros past the prompt's end, as the pipeline makes them."""
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=_TOKENS, device=self.device
        )
        return {"encoder_hidden_states": embeddings}
