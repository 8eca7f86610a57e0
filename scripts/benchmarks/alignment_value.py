"""The value baseline of the alignment benchmark: as `TGOLTrainer` fits it, from the images of a run."""

from __future__ import annotations

from typing import Any

import torch


def baseline_values(training: Any) -> torch.Tensor:
    """
    Fit a baseline and apply it to every step of a run.

    Args:
        training (`Training`): A run with one draw an image.

    Returns:
        `torch.Tensor`: (updates, B) float32.
    """
    from tgol_trainer import adapters
    from tgol_trainer.likelihoods import RowGenerators
    from tgol_trainer.value_baseline import MAX_DRAWS, ValueRegression, pooled

    family, latents, batch = training.family, training.rows.latents, training.order.shape[1]
    likelihood, ids = family.likelihood, torch.arange(len(latents))
    advantage = torch.from_numpy(training.labels.margin) / training.labeler.score_std
    regression = ValueRegression.fit(pooled(latents), advantage, ids)
    predicted, levels = [], []
    chosen = torch.randperm(len(latents), generator=torch.Generator().manual_seed(training.run.seed))[:MAX_DRAWS]
    for rows in chosen.split(batch):
        draw = likelihood.draw(latents[rows], RowGenerators(training.run.seed, -1, rows.tolist()))
        texts = [training.rows.prompts[row] for row in rows]
        with torch.no_grad(), adapters.reference_policy(family.denoiser):
            prediction = family.predict(family.denoiser, draw, training.conditioning(texts))
        predicted.append(regression.predict(likelihood.denoised(prediction, draw), rows))
        levels.append(draw.noise_level)
    regression.calibrate(torch.cat(predicted), advantage[chosen], torch.cat(levels))
    found = []
    for step, prediction in enumerate(training.references):
        draw = training.draw(step)
        found.append(regression(likelihood.denoised(prediction, draw), torch.from_numpy(training.order[step]), draw))
    return torch.stack(found)
