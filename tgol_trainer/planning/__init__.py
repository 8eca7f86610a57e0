"""Predict, from configs alone, how much memory a run takes, and find settings that fit a card."""

from .cards import CARDS, Card, found_card
from .fitting import Fit, fit
from .memory import Encoding, Phase, Prediction, Step, optimizer_bytes, predict, predict_family
from .networks import Setup
from .quantized import Quantization

__all__ = [
    "CARDS",
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
    "optimizer_bytes",
    "predict",
    "predict_family",
]
