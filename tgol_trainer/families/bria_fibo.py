"""Bria FIBO."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import Draw, to_device

from .conditioning import Conditioning, Rows, tensor_of
from .flow import PackedFlowFamily, grid_positions

_TOKENS = 3000
"""Default of the pipeline's `max_sequence_length`."""


class BriaFiboFamily(PackedFlowFamily):
    """
    `BriaFiboPipeline`: SmolLM3 as text encoder, the autoencoder of Wan 2.2 5B with one frame, a transformer.

    Prompts are captions in JSON, each at its own length; every block sees the output of another layer of the language
    model. Neither its authors nor diffusers say how to train it, so uniform times are an untested default.
    """

    # No example: the projections that diffusers' examples for similar transformers train.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out.0")
    required_components = ("transformer", "vae", "text_encoder", "tokenizer")
    token_limits = {"tokenizer": _TOKENS}
    mask_argument = "attention_mask"
    one_frame = True
    patch = 1

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """For each prompt `encoder_hidden_states` (tokens, D), and `text_encoder_layers` (tokens, layers, E)."""
        embeddings, layers = [], []
        for prompt in prompts:
            encoded = self.pipeline.encode_prompt(
                prompt, device=self.device, guidance_scale=1.0, max_sequence_length=_TOKENS
            )
            embeddings.append(encoded[0][0])
            layers.append(torch.stack([layer[0] for layer in encoded[5]], 1))
        return {"encoder_hidden_states": embeddings, "text_encoder_layers": layers}

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return positions of image and text."""
        text = torch.zeros(len(conditioning["encoder_hidden_states"][0]), 3)
        positions = {"img_ids": grid_positions(*latents.shape[-2:]), "txt_ids": text}
        return {name: to_device(ids, latents.device) for name, ids in positions.items()}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, h, w); a block has the layer of its own number from the last, or the last."""
        arguments: dict[str, Any] = {"encoder_hidden_states": conditioning["encoder_hidden_states"]}
        layers = list(tensor_of(conditioning, "text_encoder_layers").unbind(2))
        network = self.denoiser.config
        blocks = network.num_layers + network.num_single_layers
        arguments["text_encoder_layers"] = [*layers[-blocks:], *[layers[-1]] * (blocks - len(layers))]
        if self.mask_argument in conditioning:
            mask = tensor_of(conditioning, self.mask_argument)
            image = mask.new_ones(len(mask), self.num_tokens(draw.inputs))
            arguments["joint_attention_kwargs"] = {"attention_mask": torch.cat([mask, image], 1)[:, None, None]}
        return super().predict(model, draw, arguments)
