"""aMUSEd (256 and 512 pixels)."""

from __future__ import annotations

import functools

import torch
from torch.utils.checkpoint import checkpoint

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning
from .masked import MaskedTokenFamily


class AmusedFamily(MaskedTokenFamily):
    """`AmusedPipeline`: CLIP text encoder with projection, VQ autoencoder, `UVit2DModel` over its codes."""

    pooled_argument = "pooled_text_emb"
    _layers_wrapped = False

    def enable_gradient_checkpointing(self) -> None:
        """
        Recompute the transformer layers in the backward pass.

        `UVit2DModel.enable_gradient_checkpointing()` makes the next forward pass raise TypeError
        (https://github.com/huggingface/diffusers/issues/11214: it hands keyword arguments to a function without any),
        so the layers' forward methods are wrapped here. Drop this method once that issue is closed in the oldest
        supported diffusers.
        """
        if not self._layers_wrapped:
            self._layers_wrapped = True
            for layer in self.denoiser.transformer_layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Logits (B, codebook_size, h, w) of the transformer."""
        return model(input_ids=draw.inputs, **conditioning)
