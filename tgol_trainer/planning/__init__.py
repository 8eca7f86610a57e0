"""Predict, from configs alone, how much memory a run takes, and find settings that fit a card."""

from .cards import CARDS, Card, found_card
from .fitting import Fit, fit, refusal
from .memory import KNOWN_OPTIMIZERS, Encoding, Phase, Prediction, Step, predict
from .networks import Setup
from .quantized import Quantization

__all__ = [
    "CARDS",
    "KNOWN_OPTIMIZERS",
    "Card",
    "Encoding",
    "Fit",
    "Phase",
    "Prediction",
    "Quantization",
    "Setup",
    "Step",
    "fit",
    "found_card",
    "predict",
    "refusal",
]
