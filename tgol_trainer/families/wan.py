"""Wan 2.1, text to video."""

from __future__ import annotations

import logging

import torch

from .conditioning import Rows
from .video import VideoFlowFamily

logger = logging.getLogger(__name__)

_TOKENS = 512
"""Tokens of a prompt: `WanPipeline.__call__` asks for 512, while `encode_prompt` alone would take 226."""


class WanFamily(VideoFlowFamily):
    """
    `WanPipeline` of Wan 2.1: UMT5 text encoder, causal video autoencoder, transformer that predicts the velocity.

    Times are uniform by default: neither the paper nor diffusers says how to train this model, so that is an untested
    default. The noise levels are those of `FlowMatchEulerDiscreteScheduler` with the shift of the pipeline's scheduler
    (`flow_shift`: 3 for 480p, 5 for 720p).

    The autoencoder is kept in float32, in which the model's authors run it. Some modules of the transformer must stay
    float32 as well: `from_pretrained(dtype=torch.bfloat16)` keeps them, `.to(torch.bfloat16)` does not.

    Raises:
        ValueError: for Wan 2.2, and for a number of frames that the autoencoder would cut.
    """

    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("tokenizer", "text_encoder", "vae", "transformer")
    token_limits = {"tokenizer": _TOKENS}
    default_size, default_frames = (480, 832), 81  # of `WanPipeline.__call__`; what the 1.3B model was trained for
    frames_per_second = 16
    rows_per_image = 1  # the pass with the empty prompt comes after the other

    def check_pipeline(self) -> None:
        """Refuse Wan 2.2, a missing component, and a number of frames that the autoencoder would cut."""
        if getattr(self.pipeline, "transformer_2", None) is not None or self.pipeline.config.get("expand_timesteps"):
            raise ValueError(
                "This is Wan 2.2, which is not supported: it has a second transformer (`transformer_2`) for low "
                "noise, or a time for each token. Use Wan 2.1, such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers."
            )
        super().check_pipeline()

    def prepare_pipeline(self) -> None:
        """Freeze every component, bring the autoencoder to float32, and warn of weights that have lost it."""
        super().prepare_pipeline()
        vae, transformer = self.pipeline.vae, self.pipeline.transformer
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
        """16 pixels: the autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor_spatial * max(self.denoiser.config.patch_size[1:])

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 512, D), with zeros past the prompt's end, as the pipeline makes them."""
        embeddings, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=_TOKENS, device=self.device
        )
        return {"encoder_hidden_states": embeddings}
