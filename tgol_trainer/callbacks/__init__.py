"""What happens beside training: the start of an epoch, and the facts that a card states."""

from .epoch import EpochStart
from .facts import dataset_facts, harvest_facts

__all__ = ["EpochStart", "dataset_facts", "harvest_facts"]
