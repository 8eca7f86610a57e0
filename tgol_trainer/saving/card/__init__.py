"""Write model and dataset cards from facts. Values are escaped and a person's edits are kept. Imports no torch."""

from .dataset import DatasetCardFacts, ScoreFacts, write_dataset_card
from .facts import CardFacts, CardImage, DatasetFacts, EvaluationRow, ExportRow, Hyperparameter, SharedFile
from .rendering import SECTIONS
from .writing import FACTS_NAME, read_facts, render_card, update_card, write_card

__all__ = [
    "FACTS_NAME",
    "SECTIONS",
    "CardFacts",
    "CardImage",
    "DatasetCardFacts",
    "DatasetFacts",
    "EvaluationRow",
    "ExportRow",
    "Hyperparameter",
    "ScoreFacts",
    "SharedFile",
    "read_facts",
    "render_card",
    "update_card",
    "write_card",
    "write_dataset_card",
]
