"""HiDream-I1."""

from __future__ import annotations

from typing import Any

import torch

from tgol_trainer.likelihoods import Draw

from .conditioning import Conditioning, Rows, tensor_of
from .flow import PipelineSizedFamily

_TOKENS = 128
"""Default of the pipeline's `max_sequence_length`."""


class HiDreamFamily(PipelineSizedFamily):
    """
    `HiDreamImagePipeline`: two CLIP text encoders, T5 and Llama 3, a transformer with a mixture of experts.

    Every block sees the output of another layer of Llama; padding is seen, as in the pipeline. The transformer
    predicts latents − noise, and the pipeline negates it. In training its experts run one after the other on their own
    tokens, which reads from the device how many these are; otherwise diffusers computes them without gradient.
    """

    # As diffusers' example (train_dreambooth_lora_hidream.py), which also draws times uniformly.
    default_target_modules = ("to_k", "to_q", "to_v", "to_out")
    required_components = (
        *("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        *("text_encoder_3", "tokenizer_3", "text_encoder_4", "tokenizer_4"),
    )
    token_limits = {"tokenizer_3": _TOKENS, "tokenizer_4": _TOKENS}  # CLIP only adds one pooled vector
    velocity_sign = -1

    def prepare_pipeline(self) -> None:
        """Freeze every component, and have the transformer return images in training too."""
        super().prepare_pipeline()
        self.denoiser.register_to_config(force_inference_output=True)

    @property
    def shares(self) -> int:
        """Experts of a block."""
        return self.denoiser.config.num_routed_experts

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor times the transformer's patch."""
        return self.pipeline.vae_scale_factor * self.denoiser.config.patch_size

    def resolution_shift(self, num_tokens: int) -> float:
        """Return the pipeline's shift, which is that of the largest image at every size."""
        from diffusers.pipelines.hidream_image.pipeline_hidream_image import calculate_shift

        return calculate_shift(self.denoiser.max_seq)

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states_t5` (N, 128, D), `_llama3` (N, layers, 128, D) and `pooled_embeds` (N, P)."""
        t5, _, llama, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=_TOKENS
        )
        return {
            "encoder_hidden_states_t5": t5,
            "encoder_hidden_states_llama3": llama.transpose(0, 1),
            "pooled_embeds": pooled,
        }

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Velocity (B, C, h, w)."""
        layers: dict[str, Any] = {
            "encoder_hidden_states_llama3": tensor_of(conditioning, "encoder_hidden_states_llama3").transpose(0, 1)
        }
        output = model(
            hidden_states=draw.inputs, timesteps=draw.timesteps, return_dict=False, **{**conditioning, **layers}
        )
        return self.velocity_sign * output[0]
