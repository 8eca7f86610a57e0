"""Likelihoods: how a denoiser's output becomes an error and a log-likelihood."""

from .base import Draw, Likelihood, RowGenerators, log_likelihood, to_device
from .calibration import ErrorProfile, calibrated_log_ratio, relative_log_ratio
from .diffusion import DiffusionLikelihood
from .flow import FlowLikelihood, Levels
from .masked import MaskedTokenLikelihood

__all__ = [
    "DiffusionLikelihood",
    "Draw",
    "ErrorProfile",
    "FlowLikelihood",
    "Levels",
    "Likelihood",
    "MaskedTokenLikelihood",
    "RowGenerators",
    "calibrated_log_ratio",
    "log_likelihood",
    "relative_log_ratio",
    "to_device",
]
