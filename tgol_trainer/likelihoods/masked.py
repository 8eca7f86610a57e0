"""The likelihood of masked-token models, which predict the image tokens at masked positions of a grid."""

from __future__ import annotations

import math

import torch

from .base import Draw, RowGenerators, to_device


class MaskedTokenLikelihood:
    """
    The surrogate `log π(y|x) = (1/|M|)·Σ_{i∈M} log p(t_i | visible tokens, x)` (paper, Sec. 3.5); T does not apply.

    Args:
        mask_token_id (`int`): Id that stands for "masked" in the network's input.
        min_masking_rate (`float`, *optional*, defaults to 0.0):
            Smallest share of masked positions, in [0, 1]. 0 is the default of the training scripts of aMUSEd and
            Meissonic.
    """

    temperature_applies = False

    def __init__(self, mask_token_id: int, min_masking_rate: float = 0.0) -> None:
        if not 0 <= min_masking_rate <= 1:
            raise ValueError(f"`min_masking_rate` is {min_masking_rate}; it is a share of positions, in [0, 1].")
        self.mask_token_id = mask_token_id
        self.min_masking_rate = min_masking_rate

    def draw(self, latents: torch.Tensor, rows: RowGenerators) -> Draw:
        """
        Mask a random share of the positions of each row: r = cos(π/2·U), U uniform, at least `min_masking_rate`.

        The latents are token ids (B, h, w) int64. The `inputs` are the ids with `round(h·w·r)` positions (one or more)
        replaced by the mask id; `timesteps` are float32, r times 1000 as Meissonic is trained with (aMUSEd takes
        none); `target` is the ids; `mask` is true where masked.
        """
        ratio = torch.cos(rows.uniform("mask_ratio") * (math.pi / 2)).clamp(min=self.min_masking_rate)
        positions = latents[0].numel()
        count = (positions * ratio).round().clamp(min=1)
        rank = torch.stack([torch.randperm(positions, generator=g) for g in rows.generators("mask")])
        mask = to_device((rank < count[:, None]).view(latents.shape), latents.device)
        inputs = torch.where(mask, self.mask_token_id, latents)
        level = to_device(ratio, latents.device)
        return Draw(inputs, level * 1000, latents, mask, level)

    def targets(self, latents: torch.Tensor, rows: RowGenerators) -> dict[str, torch.Tensor]:
        """Return nothing: every such network predicts the tokens."""
        return {}

    def error(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """
        Mean over the masked positions of the negative log-probability of the true code: (B,) float32.

        The prediction is logits (B, K, h, w) over K codes, of any dtype; the mean is computed in float32.
        """
        if draw.mask is None:
            raise ValueError("The draw has no mask: make it with `MaskedTokenLikelihood.draw`.")
        surprise = torch.nn.functional.cross_entropy(prediction.float(), draw.target, reduction="none")
        mask = draw.mask.flatten(1)
        return torch.where(mask, surprise.flatten(1), 0.0).sum(1) / mask.sum(1)

    def change(self, prediction: torch.Tensor, reference: torch.Tensor, draw: Draw) -> torch.Tensor:
        """KL(reference, policy) of the codes, mean over the masked positions: (B,) in nats."""
        if draw.mask is None:
            raise ValueError("The draw has no mask: make it with `MaskedTokenLikelihood.draw`.")
        found = []
        for new, old, mask in zip(prediction, reference, draw.mask, strict=True):  # logits of a row are large already
            policy, base = new.float().log_softmax(0), old.float().log_softmax(0)
            divergence = torch.nn.functional.kl_div(policy, base, reduction="none", log_target=True).sum(0)
            found.append(torch.where(mask, divergence, 0.0).sum() / mask.sum())
        return torch.stack(found)

    def denoised(self, prediction: torch.Tensor, draw: Draw) -> torch.Tensor:
        """Refuse: tokens have no noise."""
        raise ValueError("A model of masked tokens has no noised latents.")
