"""`TGOLConfig`: one dataclass on `transformers.TrainingArguments`; the method's fields have a file of their own."""

from .arguments import CHANGED_DEFAULTS, FULL_LEARNING_RATE, LORA_LEARNING_RATE, TGOLConfig
from .method import CONFIDENT_LOSSES, MethodArguments

__all__ = [
    "CHANGED_DEFAULTS",
    "CONFIDENT_LOSSES",
    "FULL_LEARNING_RATE",
    "LORA_LEARNING_RATE",
    "MethodArguments",
    "TGOLConfig",
]
