"""What aMUSEd and Meissonic share: VQ codes as latents, CLIP conditioning, adapters that the denoiser loads itself."""

from __future__ import annotations

import torch

from tgol_trainer.likelihoods import MaskedTokenLikelihood, RowGenerators, to_device

from .base import ModelFamily, frozen_pass
from .conditioning import Rows

AESTHETIC_SCORE = 6.0
"""The fifth micro-condition: what both pipelines pass unless told otherwise."""


class MaskedTokenFamily(ModelFamily):
    """
    A pipeline of a VQ autoencoder, a CLIP text encoder with projection, and a transformer over masked image tokens.

    Raises:
        ValueError: if the mask's id, the vocabulary and the autoencoder's codebook do not fit together.
    """

    denoiser_name = "transformer"
    autoencoder_name = "vqvae"
    # The targets of both families' own training scripts.
    default_target_modules = ("to_q", "to_k", "to_v")
    required_components = ("transformer", "vqvae", "text_encoder", "tokenizer", "scheduler")
    pooled_argument: str
    """The transformer's name for the pooled text embedding."""

    def check_pipeline(self) -> None:
        """Refuse a pipeline that lacks a component or whose mask, vocabulary and codebook do not fit together."""
        super().check_pipeline()
        config, codes = self.denoiser.config, self.pipeline.vqvae.config["num_vq_embeddings"]
        mask_token_id = self.pipeline.scheduler.config["mask_token_id"]
        vocab_size, codebook_size = config["vocab_size"], config["codebook_size"]
        if mask_token_id != vocab_size - 1:
            raise ValueError(
                f"The scheduler's mask_token_id is {mask_token_id}, the transformer's vocab_size {vocab_size}: in the "
                f"training of this family the mask is the last id, {vocab_size - 1}. Give the pipeline a scheduler "
                f"made with mask_token_id={vocab_size - 1}."
            )
        if not codes <= codebook_size < vocab_size:
            raise ValueError(
                f"The autoencoder has {codes} codes, the transformer predicts codebook_size={codebook_size} and "
                f"embeds vocab_size={vocab_size}: the codes must fit into the codebook, and the mask's id must lie "
                "outside it."
            )

    def prepare_pipeline(self) -> None:
        """Freeze every component, and bring an autoencoder that overflows to float32."""
        super().prepare_pipeline()
        vqvae = self.pipeline.vqvae
        if vqvae.dtype == torch.float16 and vqvae.config.get("force_upcast"):
            vqvae.float()  # as the pipelines do before they decode

    def make_likelihood(self) -> MaskedTokenLikelihood:
        """Return the likelihood with the mask's id of the pipeline's scheduler."""
        return MaskedTokenLikelihood(self.pipeline.scheduler.config["mask_token_id"])

    @property
    def resolution_multiple(self) -> int:
        """The autoencoder's factor, twice that where the transformer halves the grid of tokens."""
        return self.pipeline.vae_scale_factor * (2 if self.denoiser.config["downsample"] else 1)

    def encode_unique_prompts(self, prompts: list[str]) -> Rows:
        """`encoder_hidden_states` (N, tokens, D), the encoder's last layer but one, and the pooled output (N, P)."""
        [(tokenizer, limit)] = self.prompt_limits()
        tokens = tokenizer(prompts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt")
        encoder = self.pipeline.text_encoder
        output = encoder(tokens.input_ids.to(encoder.device), return_dict=True, output_hidden_states=True)
        return {"encoder_hidden_states": output.hidden_states[-2], self.pooled_argument: output.text_embeds}

    def condition_on_size(self, geometry: torch.Tensor, resolution: tuple[int, int]) -> dict[str, torch.Tensor]:
        """
        `micro_conds` (B, 5) float32: width and height of the image, top and left of the crop, aesthetic score 6.

        The order is that of both pipelines and of aMUSEd's training script: the size is flipped, the crop is not.
        """
        height, width, top, left = to_device(geometry.float(), self.device).unbind(1)
        return {"micro_conds": torch.stack([width, height, top, left, torch.full_like(width, AESTHETIC_SCORE)], dim=1)}

    def encode_one(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Codes (1, h, w) int64 of the VQ autoencoder, which sees pixels in [0, 1]."""
        vqvae = self.pipeline.vqvae
        latents = vqvae.encode(((pixels + 1) / 2).to(vqvae.dtype)).latents
        return {"codes": vqvae.quantize(latents)[2][2].reshape(len(latents), *latents.shape[-2:])}

    def latents(self, encoded: dict[str, torch.Tensor], rows: RowGenerators, *, sample: bool) -> torch.Tensor:
        """Codes (B, h, w) int64; an image has one code, so `sample` has no effect."""
        return to_device(encoded["codes"], self.device)

    def decode_images(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels (B, 3, H, W) of codes (B, h, w)."""
        vqvae = self.pipeline.vqvae
        shape = (*latents.shape, vqvae.config["latent_channels"])
        with frozen_pass(vqvae.device):
            return vqvae.decode(latents, force_not_quantize=True, shape=shape, return_dict=False)[0]

    def usage(self, location: str, prompt: str) -> str:
        """The snippet of the base class; the transformer itself loads the adapter, as the pipeline has no method."""
        load = (
            f'pipe.transformer.load_lora_adapter(\n    {location!r}, prefix="transformer", '
            'weight_name="pytorch_lora_weights.safetensors"\n)'
        )
        return self._snippet(prompt, *self._loading_lines(), load)
