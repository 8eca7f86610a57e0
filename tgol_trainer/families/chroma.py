"""Chroma."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows, tensor_of
from .flux import FluxFamily

_TOKENS = 512
"""Default of the pipeline's `max_sequence_length`."""


class ChromaFamily(FluxFamily):
    """
    `ChromaPipeline`: made from FLUX.1-schnell, with T5 alone and without guidance input.

    The pipeline's mask is 1 for a prompt and one token of padding, 0 for the rest. It has the transformer's dtype, so
    attention adds it to its scores: padding counts less, and is not hidden. The same mask is given here.
    """

    required_components = ("transformer", "vae", "text_encoder", "tokenizer")
    token_limits = {"tokenizer": _TOKENS}

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, 512, D) and `attention_mask` (N, 512), of the prompt alone."""
        embeddings, _, mask, *_ = self.pipeline.encode_prompt(
            prompts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=_TOKENS
        )
        return {"encoder_hidden_states": embeddings, "attention_mask": mask}

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return positions of image and text."""
        arguments = super().token_arguments(latents, conditioning)
        return {name: arguments[name] for name in ("img_ids", "txt_ids")}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, h, w)."""
        rows, _, height, width = draw.inputs.shape
        mask = tensor_of(conditioning, "attention_mask")
        image = mask.new_ones(rows, height * width // self.patch**2)
        self._mask = torch.cat([mask, image], 1)
        return super().predict(model, draw, {**conditioning, "attention_mask": self._mask})

    def enable_gradient_checkpointing(self) -> None:
        """
        Recompute activations, with the mask in every block.

        diffusers 0.42 leaves it out of the single-stream blocks when it recomputes them. The policy, which has a
        gradient, would then be another network than the reference, which has none.
        """

        def recomputed(block: torch.nn.Module, *arguments: Any) -> Any:
            if type(block).__name__ == "ChromaSingleTransformerBlock" and len(arguments) == 3:
                arguments = (*arguments, self._mask)
            return checkpoint(block, *arguments, use_reentrant=False)

        self.denoiser.enable_gradient_checkpointing(recomputed)
