"""Likelihoods: how a denoiser's output becomes an error and a log-likelihood."""

from .base import Draw, Likelihood, RowGenerators, log_likelihood, to_device
from .diffusion import DiffusionLikelihood
from .flow import FlowLikelihood, Levels
from .masked import MaskedTokenLikelihood

__all__ = [
    "DiffusionLikelihood",
    "Draw",
    "FlowLikelihood",
    "Levels",
    "Likelihood",
    "MaskedTokenLikelihood",
    "RowGenerators",
    "log_likelihood",
    "to_device",
]
