"""Likelihood families: how a denoiser's output becomes an error and a log-likelihood."""

from .base import Draw, Family, RowGenerators, log_likelihood, mean_over_features
from .diffusion import DiffusionFamily
from .flow import FlowFamily
from .masked import MaskedTokenFamily

__all__ = [
    "DiffusionFamily",
    "Draw",
    "Family",
    "FlowFamily",
    "MaskedTokenFamily",
    "RowGenerators",
    "log_likelihood",
    "mean_over_features",
]
