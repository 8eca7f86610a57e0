"""
Fit what noised latents tell of the score, so that advantages are counted from it.

The loss 'tgol_anchored' learns the covariance of the advantage a and the target, given the noised latents x_t. Where
the reference predicts the mean target, any function V(x_t) may be taken from a: the mean of the gradient stays, and
its noise falls by what V explains of a. V is a ridge regression of the advantage on pooled clean latents. A row's
value comes from the regression that did not see it. In training it is applied to the reference's estimate of the clean
latents, and multiplied by a slope for each tenth of the noise levels, since that estimate tells less as noise grows.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .data import ScoredDataset
from .draws import EVALUATION_STEP, BatchDraws
from .families import Conditioning
from .likelihoods import Draw, to_device

logger = logging.getLogger(__name__)

GRID, MAX_FEATURES = 8, 2048
FOLDS, BINS = 5, 10
MAX_ROWS, MAX_DRAWS = 20_000, 512
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties that are tried, in units of the mean eigenvalue of the features' correlations."""


def pooled(latents: torch.Tensor) -> torch.Tensor:
    """
    Return the features of latents: means over the fields of an 8 by 8 grid, coarser for more than 32 channels.

    Args:
        latents (`torch.Tensor`): (B, C, h, w), or (B, C, f, h, w), whose frames are averaged.

    Returns:
        `torch.Tensor`: (B, C·g·g) float32, on the device of the latents.
    """
    latents = latents.float()
    if latents.dim() == 5:
        latents = latents.mean(2)
    side = max(min(GRID, math.isqrt(MAX_FEATURES // latents.shape[1])), 1)
    return F.adaptive_avg_pool2d(latents, side).flatten(1)


def folds_of(row_ids: torch.Tensor) -> torch.Tensor:
    """Return the fold of each row, (B,) int64 from 0 to 4, from its (B,) int64 id alone and mixed well."""
    return (((row_ids * 2_654_435_761) & 0xFFFFFFFF) >> 16) % FOLDS


@dataclasses.dataclass
class ValueRegression:
    """
    What noised latents tell of the advantage. Made by [`ValueRegression.fit`].

    Args:
        mean (`torch.Tensor`): (F,) float32 mean of the features.
        weights (`torch.Tensor`): (5, F) float32; the first was fitted to the rows of all folds but the first.
        limit (`float`): No prediction is larger than this: noise that the reference leaves may not count for more.
        explained (`float`): Share of the advantages' variance that clean latents explain in rows that were not seen.
        slopes (`torch.Tensor`): (10,) float32 factors for the tenths of the noise levels, see [`calibrate`].
    """

    mean: torch.Tensor
    weights: torch.Tensor
    limit: float
    explained: float
    slopes: torch.Tensor = dataclasses.field(default_factory=lambda: torch.ones(BINS))

    @classmethod
    def fit(cls, features: torch.Tensor, advantage: torch.Tensor, row_ids: torch.Tensor) -> ValueRegression:
        """
        Fit five ridge regressions, each without a fifth of the rows; of six penalties the one that predicts it best.

        Args:
            features (`torch.Tensor`): (N, F) of clean latents, see [`pooled`].
            advantage (`torch.Tensor`): (N,) a = (s - τ)/sd. Its mean is left to the loss.
            row_ids (`torch.Tensor`): (N,) int64.
        """
        folds, mean = folds_of(row_ids), features.double().mean(0)
        inputs, target = features.double() - mean, advantage.double() - advantage.double().mean()
        scale = inputs.std(0, unbiased=False).clamp(min=1e-12)
        weights = torch.zeros(len(RIDGES), FOLDS, features.shape[1], dtype=torch.float64)
        predicted = torch.zeros(len(RIDGES), len(target), dtype=torch.float64)
        for fold in range(FOLDS):
            seen, unseen = folds != fold, folds == fold
            weights[:, fold] = _ridges(inputs[seen] / scale, target[seen]) / scale
            predicted[:, unseen] = weights[:, fold] @ inputs[unseen].T
        missed = ((predicted - target) ** 2).mean(1)
        best = int(missed.argmin())
        explained = 1 - (missed[best] / target.var(unbiased=False).clamp(min=1e-300)).item()
        return cls(mean.float(), weights[best].float(), predicted[best].abs().max().item(), explained)

    def predict(self, latents: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
        """
        Return (B,) float32 values of latents, by the regression that did not see the row.

        Args:
            latents (`torch.Tensor`): (B, C, ...) on the device of the baseline.
            row_ids (`torch.Tensor`): (B,) int64, on the CPU.
        """
        weights = self.weights[to_device(folds_of(row_ids), self.weights.device)]
        values = ((pooled(latents) - self.mean) * weights).sum(1)
        return values.clamp(-self.limit, self.limit)

    def calibrate(self, predicted: torch.Tensor, advantage: torch.Tensor, noise_level: torch.Tensor) -> None:
        """
        Set the slope of each tenth of the noise levels: least squares, pulled to 0 by its own variance, at least 0.

        Args:
            predicted (`torch.Tensor`): (N,) values of the reference's estimates of clean latents.
            advantage (`torch.Tensor`): (N,) a of the same rows.
            noise_level (`torch.Tensor`): (N,) from 0 to 1.
        """
        places, predicted = _bins(noise_level), predicted.double()
        target = advantage.double() - advantage.double().mean()
        self.slopes = torch.zeros(BINS)
        for number in range(BINS):
            x, y = predicted[places == number], target[places == number]
            power = (x * x).sum().item()
            if len(x) < 3 or power == 0:
                continue
            slope = (x * y).sum().item() / power
            variance = ((y - slope * x) ** 2).sum().item() / (len(x) - 1) / power
            self.slopes[number] = max(slope - variance / slope, 0.0) if slope > 0 else 0.0

    def __call__(self, denoised: torch.Tensor, row_ids: torch.Tensor, draw: Draw) -> torch.Tensor:
        """
        Return the values of a batch, (B,) float32.

        Args:
            denoised (`torch.Tensor`): (B, C, ...) the reference's estimate of the clean latents on a draw.
            row_ids (`torch.Tensor`): (B,) int64, on the CPU.
            draw ([`Draw`]): The draw.
        """
        return self.slopes[_bins(_levels_of(draw))] * self.predict(denoised, row_ids)

    def to(self, device: torch.device) -> ValueRegression:
        """Return a copy whose tensors are on a device."""
        tensors = {name: getattr(self, name).to(device) for name in ("mean", "weights", "slopes")}
        return dataclasses.replace(self, **tensors)


class ValueBaseline:
    """
    The baseline of a run: fitted to its training rows, applied to the reference's predictions.

    Args:
        draws ([`BatchDraws`]): Makes latents and draws of batches.
        predict (`Callable[[Draw, dict], torch.Tensor]`): Returns the reference's prediction (B, ...) on a draw.

    Raises:
        ValueError: for a model of masked tokens.
    """

    def __init__(self, draws: BatchDraws, predict: Callable[[Draw, Conditioning], torch.Tensor]) -> None:
        if not draws.family.likelihood.temperature_applies:
            raise ValueError(
                "`value_baseline` reads noised latents, and this model has masked tokens: leave it at False."
            )
        self.draws, self.predict = draws, predict
        self.regression: ValueRegression | None = None

    def fit(self, rows: ScoredDataset, score_std: float) -> None:
        """
        Fit the regressions to labelled rows, at most 20,000, and their slopes on draws of at most 512 of them.

        Every process fits the same ones.

        Args:
            rows ([`ScoredDataset`]): The rows, with labels.
            score_std (`float`): Standard deviation of the normalised scores.
        """
        order = np.random.default_rng(self.draws.args.seed).permutation(len(rows))
        features, found = list[torch.Tensor](), list[dict[str, torch.Tensor]]()
        for batch in self._batches(rows, order[:MAX_ROWS], "Reading latents"):
            features.append(pooled(self.draws.clean_latents(batch)).cpu())
            found.append({name: batch[name] for name in ("margin", "row_id")})
        advantage = torch.cat([each["margin"] for each in found]) / score_std
        row_ids = torch.cat([each["row_id"] for each in found])
        regression = ValueRegression.fit(torch.cat(features), advantage, row_ids).to(self.draws.family.device)
        predicted, levels, margins = list[torch.Tensor](), list[torch.Tensor](), list[torch.Tensor]()
        for batch in self._batches(rows, order[:MAX_DRAWS], "Calibrating the value baseline"):
            draw, conditioning = self.draws(batch, EVALUATION_STEP)
            denoised = self.draws.family.likelihood.denoised(self.predict(draw, conditioning), draw)
            predicted.append(regression.predict(denoised, batch["row_id"]).cpu())
            levels.append(_levels_of(draw).cpu())
            margins.append(batch["margin"])
        regression.calibrate(torch.cat(predicted), torch.cat(margins) / score_std, torch.cat(levels))
        self.regression = regression.to(self.draws.family.device)
        if self.draws.args.should_log:
            logger.info(
                "Clean latents explain %.0f%% of the advantages. Slopes from the lowest tenth of noise levels to the "
                "highest: %s.",
                *(100 * max(regression.explained, 0.0), [round(slope, 2) for slope in regression.slopes.tolist()]),
            )

    def __call__(self, prediction: torch.Tensor, draw: Draw, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """
        Return what the noised latents of a batch tell of the advantages, (B,) float32.

        Args:
            prediction (`torch.Tensor`): (B, C, ...) of the reference on the draw.
            draw ([`Draw`]): The draw.
            inputs (`dict[str, torch.Tensor]`): The batch of [`data.Collator`].

        Raises:
            RuntimeError: before [`fit`].
        """
        if self.regression is None:
            raise RuntimeError("The value baseline is fitted when training starts: call `train()`, or `fit`.")
        return self.regression(self.draws.family.likelihood.denoised(prediction, draw), inputs["row_id"], draw)

    def _batches(self, rows: ScoredDataset, chosen: np.ndarray, title: str) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches of rows, each of images of one size."""
        args, parts = self.draws.args, [chosen]
        if rows.resolutions is not None:
            _, size = np.unique(rows.resolutions[chosen], axis=0, return_inverse=True)
            parts = [chosen[size.reshape(-1) == number] for number in range(int(size.max()) + 1)]
        hidden = args.disable_tqdm or not args.should_log
        with tqdm(total=len(chosen), desc=title, unit="row", disable=hidden) as bar:
            for part in parts:
                for start in range(0, len(part), args.per_device_train_batch_size):
                    wanted = part[start : start + args.per_device_train_batch_size]
                    yield self.draws.collator([rows[int(index)] for index in wanted])
                    bar.update(len(wanted))


def _ridges(inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (R, F) weights, one row for each penalty in `RIDGES`, of standardised inputs (N, F) and a target (N,)."""
    count = max(len(inputs), 1)
    values, vectors = torch.linalg.eigh(inputs.T @ inputs / count)
    moments = vectors.T @ (inputs.T @ target / count)
    penalties = torch.tensor(RIDGES, dtype=values.dtype)[:, None]
    return (moments / (values.clamp(min=0.0) + penalties)) @ vectors.T


def _bins(noise_level: torch.Tensor) -> torch.Tensor:
    return (noise_level * BINS).long().clamp(0, BINS - 1)


def _levels_of(draw: Draw) -> torch.Tensor:
    if draw.noise_level is None:
        raise ValueError("The draw has no `noise_level`: make it with the likelihood's `draw`.")
    return draw.noise_level
