"""ERNIE-Image."""

from __future__ import annotations

import torch

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows, tensor_of
from .flow import FlowFamily
from .flux2 import NormedLatents


class ErnieImageFamily(NormedLatents, FlowFamily):
    """
    `ErnieImagePipeline`: Mistral as text encoder, the autoencoder of FLUX.2, a transformer over latents of 2×2.

    The pipeline's prompt enhancer takes no part in training: prompts are encoded as they stand, as with
    `use_pe=False`. Neither its authors nor diffusers say how to train it, so uniform times are an untested default.
    """

    # No example: the projections that diffusers' examples for similar transformers train.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("transformer", "vae", "text_encoder", "tokenizer")
    mask_argument = "text_mask"

    @property
    def norm_epsilon(self) -> float:
        """As the pipeline, whatever the autoencoder's config says."""
        return 1e-5

    @property
    def native_size(self) -> tuple[int, int]:
        """1024×1024, the pipeline's default."""
        return 1024, 1024

    @property
    def text_encoder_names(self) -> list[str]:
        """The text encoder, without the prompt enhancer."""
        return ["text_encoder"]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`text_bth`: for each prompt (tokens, D), the language model's last layer but one."""
        return {"text_bth": self.pipeline.encode_prompt(prompts, self.device)}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, h, w); the transformer takes lengths of prompts instead of a mask."""
        text = tensor_of(conditioning, "text_bth")
        lengths = torch.full((len(text),), text.shape[1], device=text.device)
        if self.mask_argument in conditioning:
            lengths = tensor_of(conditioning, self.mask_argument).sum(1)
        return super().predict(model, draw, {"text_bth": text, "text_lens": lengths})
