"""Stable Diffusion XL."""

from __future__ import annotations

import torch

from tgol_trainer.likelihoods import Draw, to_device

from .conditioning import Conditioning, Rows
from .stable_diffusion import StableDiffusionFamily


class StableDiffusionXLFamily(StableDiffusionFamily):
    """
    `StableDiffusionXLPipeline`: two CLIP text encoders and a UNet that is also told the image's size and crop.

    The autoencoder of SDXL overflows in float16. Where its config says `force_upcast` it is turned into float32 here,
    once, and its decoder then takes latents of any dtype, so that the pipeline still generates.
    """

    required_components: tuple[str, ...] = (
        *("unet", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )
    token_limits = {"tokenizer": None, "tokenizer_2": None}  # both condition each token

    def prepare_pipeline(self) -> None:
        """Freeze every component, and bring an autoencoder that overflows to float32."""
        super().prepare_pipeline()
        vae = self.pipeline.vae
        if vae.config.get("force_upcast") and vae.dtype in (torch.float16, torch.bfloat16):
            vae.to(torch.float32)
            # `StableDiffusionXLPipeline.__call__` upcasts the latents only together with a float16 autoencoder.
            first = vae.post_quant_conv if vae.post_quant_conv is not None else vae.decoder
            first.register_forward_pre_hook(_cast_input)

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """
        `encoder_hidden_states` (N, tokens, D1 + D2) and `text_embeds` (N, P), as the pipeline makes them.

        Both are zero for an empty prompt where the pipeline's config says `force_zeros_for_empty_prompt`, since the
        pipeline generates so without a prompt.
        """
        embeddings, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:
            empty = [index for index, prompt in enumerate(prompts) if not prompt]
            embeddings[empty], pooled[empty] = 0, 0
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    def condition_on_size(self, geometry: torch.Tensor, resolution: tuple[int, int]) -> dict[str, torch.Tensor]:
        """
        `time_ids` (B, 6): the image's own size, the crop's corner, the training size (arXiv 2307.01952, Sec. 2.2).

        They are float32, in which the UNet embeds them: bfloat16 would make 1333 pixels 1336.
        """
        target = geometry.new_tensor(resolution).expand(len(geometry), 2)
        return {"time_ids": to_device(torch.cat([geometry, target], 1).float(), self.device)}

    def predict(self, model: torch.nn.Module, draw: Draw, conditioning: Conditioning) -> torch.Tensor:
        """Output of the UNet (B, 4, h, w)."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        text = conditioning["encoder_hidden_states"]
        return model(
            draw.inputs, draw.timesteps, encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
        )[0]


def _cast_input(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return (inputs[0].to(next(module.parameters()).dtype), *inputs[1:])
