"""The model card: facts of a run to README.md, with data escaped and a person's edits kept. Imports no torch."""

from .facts import CardFacts, DatasetFacts, EvaluationRow, Hyperparameter, Picture
from .rendering import SECTIONS
from .writing import render_card, write_card

__all__ = [
    "SECTIONS",
    "CardFacts",
    "DatasetFacts",
    "EvaluationRow",
    "Hyperparameter",
    "Picture",
    "render_card",
    "write_card",
]
