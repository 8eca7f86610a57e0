"""What happens beside training: the start of an epoch, pictures by step, and the facts that a card states."""

from .epoch import EpochStart
from .facts import dataset_facts, harvest_facts
from .samples import SAMPLE_METRICS, RewardFuncs, SampleCallback

__all__ = ["SAMPLE_METRICS", "EpochStart", "RewardFuncs", "SampleCallback", "dataset_facts", "harvest_facts"]
