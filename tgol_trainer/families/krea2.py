"""Krea 2."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import to_device

from .conditioning import Conditioning, Rows, real_tokens
from .flow import PackedFlowFamily

_TOKENS = 512
"""Default of the pipeline's `max_sequence_length`, what follows the prompt in the template included."""


class Krea2Family(PackedFlowFamily):
    """
    `Krea2Pipeline`: several layers of Qwen3-VL as prompt, an autoencoder of videos with one frame, a transformer.

    Padding stands between a prompt and the end of its template, and is hidden from the transformer, to which all
    tokens of a prompt have the same position.
    """

    # As diffusers' example (train_dreambooth_lora_krea2.py), which also draws times uniformly.
    default_target_modules = (
        *("img_in", "final_layer.linear", "to_q", "to_k", "to_v", "to_out.0", "to_gate", "ff.up", "ff.down"),
        *("text_fusion.projector", "txt_in.linear_1", "txt_in.linear_2"),
        *("time_embed.linear_1", "time_embed.linear_2", "time_mod_proj"),
    )
    required_components = ("transformer", "vae", "text_encoder", "tokenizer")
    one_frame = True
    mask_argument = "encoder_attention_mask"
    time_divisor = 1000
    rows_per_image = 1  # the pass with the empty prompt comes after the other

    @property
    def native_size(self) -> tuple[int, int]:
        """1024×1024, the pipeline's default."""
        return 1024, 1024

    def prompt_limits(self) -> list[tuple[Any, int]]:
        """512 tokens, less those of the template's end, and what its beginning has more than is cut off again."""
        pipeline = self.pipeline
        before = len(pipeline.tokenizer(pipeline.prompt_template_encode_prefix).input_ids)
        cut, after = pipeline.prompt_template_encode_start_idx, pipeline.prompt_template_encode_num_suffix_tokens
        return [(pipeline.tokenizer, _TOKENS + cut - after - before)]

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states`: for each prompt (tokens, layers, D)."""
        embeddings, mask = self.pipeline.encode_prompt(prompts, device=self.device, max_sequence_length=_TOKENS)
        return {"encoder_hidden_states": real_tokens(embeddings, mask)}

    def token_arguments(self, latents: torch.Tensor, conditioning: Conditioning) -> dict[str, Any]:
        """Return positions of text and image."""
        height, width = (side // self.patch for side in latents.shape[-2:])
        tokens = len(conditioning["encoder_hidden_states"][0])
        positions = self.pipeline.prepare_position_ids(tokens, height, width, torch.device("cpu"))
        return {"position_ids": to_device(positions, latents.device)}
