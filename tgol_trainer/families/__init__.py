"""Likelihood families: how a denoiser's output becomes an error and a log-likelihood."""

from .base import Draw, Family, RowGenerators, log_likelihood, mean_over_features
from .diffusion import DiffusionFamily

__all__ = ["DiffusionFamily", "Draw", "Family", "RowGenerators", "log_likelihood", "mean_over_features"]
