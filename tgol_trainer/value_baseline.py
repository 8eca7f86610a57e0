"""
Fit what noised latents tell of the score, so that advantages are counted from it.

The loss 'tgol_anchored' learns the covariance of the advantage a and the target, given the noised latents x_t. Where
the reference predicts the mean target, any function V(x_t) may be taken from a: the noise of the gradient falls by
what V explains of a. Its mean stays, but for what |e|, by which the loss divides, varies at an x_t.

V is a kernel ridge regression of the advantage on pooled clean latents. A row's value comes from the regression that
did not see it. In training it is applied to the reference's estimate of the clean latents, and multiplied by a slope
that depends on the noise level: the estimate tells less as noise grows.
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
FOLDS = 5
MAX_ROWS, MAX_LANDMARKS, MAX_DRAWS = 10_000, 2048, 512
WIDTH = 0.3
"""γ of the kernel exp(-γ·d²), with d² the mean over features of squared differences in standard deviations."""
MAX_SLOPE = 2.0
NOISES = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Variances of the part of the advantage that latents do not tell, in units of the part that they tell: all tried."""


def pooled(latents: torch.Tensor) -> torch.Tensor:
    """
    Return the features of latents: means over the fields of an 8 by 8 grid, coarser for more than 32 channels.

    What is not finite counts as 0 here; the loss of such a row is not finite either, and training says so.

    Args:
        latents (`torch.Tensor`): (B, C, h, w), or (B, C, f, h, w), whose frames are averaged.

    Returns:
        `torch.Tensor`: (B, C·g·g) float32, on the device of the latents.
    """
    latents = latents.float().nan_to_num(0.0, 0.0, 0.0)
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
        scale (`torch.Tensor`): (F,) float32 standard deviation of the features.
        landmarks (`torch.Tensor`): (M, F) float32 standardised features of rows.
        weights (`torch.Tensor`): (5, M) float32; the first were fitted to the rows of all folds but the first.
        explained (`float`): Share of the advantages' variance that clean latents explain in rows that were not seen.
        slopes (`torch.Tensor`): (3,) float32 coefficients of a polynomial of the noise level, see [`calibrate`].
    """

    mean: torch.Tensor
    scale: torch.Tensor
    landmarks: torch.Tensor
    weights: torch.Tensor
    explained: float
    slopes: torch.Tensor = dataclasses.field(default_factory=lambda: torch.tensor([1.0, 0.0, 0.0]))

    @classmethod
    def fit(cls, features: torch.Tensor, advantage: torch.Tensor, row_ids: torch.Tensor) -> ValueRegression:
        """
        Fit five kernel ridge regressions, each without a fifth of the rows; of six noises the one that predicts best.

        Up to 2,048 rows they are exact. Of more rows every second, third or so is a landmark (Nyström's method).

        Args:
            features (`torch.Tensor`): (N, F) of clean latents, see [`pooled`].
            advantage (`torch.Tensor`): (N,) a = (s - τ)/sd. Its mean is left to the loss.
            row_ids (`torch.Tensor`): (N,) int64.
        """
        folds, mean = folds_of(row_ids), features.double().mean(0)
        target = advantage.double() - advantage.double().mean()
        scale = features.double().std(0, unbiased=False)
        scale = scale.clamp(min=max(0.01 * scale.mean().item(), 1e-12))
        inputs = (features.double() - mean) / scale
        landmarks = inputs[:: math.ceil(len(inputs) / MAX_LANDMARKS)]
        # The kernel's feature map on the landmarks: K(x, landmarks)·map has the inner products of the kernel.
        values, vectors = torch.linalg.eigh(_kernel(landmarks, landmarks))
        kept = values > 1e-10 * values[-1]
        mapping = vectors[:, kept] / values[kept].sqrt()
        mapped = _kernel(inputs, landmarks) @ mapping
        weights = torch.zeros(len(NOISES), FOLDS, len(landmarks), dtype=torch.float64)
        predicted = torch.zeros(len(NOISES), len(target), dtype=torch.float64)
        for fold in range(FOLDS):
            seen, unseen = folds != fold, folds == fold
            found = _ridges(mapped[seen], target[seen])
            weights[:, fold] = found @ mapping.T
            predicted[:, unseen] = found @ mapped[unseen].T
        missed = ((predicted - target) ** 2).mean(1)
        best = int(missed.argmin())
        explained = 1 - (missed[best] / target.var(unbiased=False).clamp(min=1e-300)).item()
        return cls(mean.float(), scale.float(), landmarks.float(), weights[best].float(), explained)

    def predict(self, latents: torch.Tensor, row_ids: torch.Tensor) -> torch.Tensor:
        """
        Return (B,) float32 values of latents, by the regression that did not see the row.

        Args:
            latents (`torch.Tensor`): (B, C, ...) on the device of the baseline.
            row_ids (`torch.Tensor`): (B,) int64, on the CPU.
        """
        weights = self.weights[to_device(folds_of(row_ids), self.weights.device)]
        inputs = (pooled(latents) - self.mean) / self.scale
        return (_kernel(inputs, self.landmarks) * weights).sum(1)

    def calibrate(self, predicted: torch.Tensor, advantage: torch.Tensor, noise_level: torch.Tensor) -> float:
        """
        Fit the slope, a polynomial of second degree of the noise level, by least squares; it acts from 0 to 2.

        Args:
            predicted (`torch.Tensor`): (N,) values of the reference's estimates of clean latents.
            advantage (`torch.Tensor`): (N,) a of the same rows.
            noise_level (`torch.Tensor`): (N,) from 0 to 1.

        Returns:
            `float`: the share of the advantages' variance that is explained.
        """
        target = advantage.double() - advantage.double().mean()
        columns = predicted.double()[:, None] * _powers(noise_level.double())
        slopes = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
        self.slopes = slopes.float()
        missed = target - self._slope(noise_level).double() * predicted.double()
        return 1 - ((missed**2).mean() / (target**2).mean().clamp(min=1e-300)).item()

    def _slope(self, noise_level: torch.Tensor) -> torch.Tensor:
        return (_powers(noise_level) @ self.slopes).clamp(0.0, MAX_SLOPE)

    def __call__(self, denoised: torch.Tensor, row_ids: torch.Tensor, draw: Draw) -> torch.Tensor:
        """
        Return the values of a batch, (B,) float32.

        Args:
            denoised (`torch.Tensor`): (B, C, ...) the reference's estimate of the clean latents on a draw.
            row_ids (`torch.Tensor`): (B,) int64, on the CPU.
            draw ([`Draw`]): The draw.
        """
        return self._slope(_levels_of(draw)) * self.predict(denoised, row_ids)

    def to(self, device: torch.device) -> ValueRegression:
        """Return a copy whose tensors are on a device."""
        tensors = {
            name: getattr(self, name).to(device) for name in ("mean", "scale", "landmarks", "weights", "slopes")
        }
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
                "`value_baseline` reads noised latents, and this model has masked tokens: set it to False, beside the "
                "recipe 'anchored' too."
            )
        self.draws, self.predict = draws, predict
        self.regression: ValueRegression | None = None

    def fit(self, rows: ScoredDataset, score_std: float) -> None:
        """
        Fit the regressions to labelled rows, at most 10,000, and their slope on draws of at most 512 of them.

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
        share = regression.calibrate(torch.cat(predicted), torch.cat(margins) / score_std, torch.cat(levels))
        self.regression = regression.to(self.draws.family.device)
        if self.draws.args.should_log:
            logger.info(
                "The value baseline explains %.0f%% of the advantages from clean latents, %.0f%% from noised ones.",
                *(100 * max(regression.explained, 0.0), 100 * max(share, 0.0)),
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


def _kernel(inputs: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return (B, M) kernel values of standardised features (B, F) and (M, F), computed without cancellation."""
    exact = "donot_use_mm_for_euclid_dist" if inputs.dtype == torch.float32 else "use_mm_for_euclid_dist"
    return torch.exp(-WIDTH / inputs.shape[1] * torch.cdist(inputs, others, compute_mode=exact) ** 2)


def _ridges(inputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return (R, F) weights, one row for each entry of `NOISES`, of inputs (N, F) and a target (N,)."""
    values, vectors = torch.linalg.eigh(inputs.T @ inputs)
    moments = vectors.T @ (inputs.T @ target)
    noises = torch.tensor(NOISES, dtype=values.dtype)[:, None]
    return (moments / (values.clamp(min=0.0) + noises)) @ vectors.T


def _powers(noise_level: torch.Tensor) -> torch.Tensor:
    """Return (B, 3): 1, the noise level and its square."""
    return torch.stack([torch.ones_like(noise_level), noise_level, noise_level**2], 1)


def _levels_of(draw: Draw) -> torch.Tensor:
    if draw.noise_level is None:
        raise ValueError("The draw has no `noise_level`: make it with the likelihood's `draw`.")
    return draw.noise_level
