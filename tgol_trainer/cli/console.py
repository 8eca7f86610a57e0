"""What a command prints: our own messages, and no upstream noise that a user can do nothing about."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator

# Start of a message, and why it says nothing to the user of a command.
_NOISE = (
    "Failed to load CPU gemm_4bit_forward",  # bitsandbytes without the optional package `kernels`
    "No LoRA keys associated to CLIPTextModel",  # adapters here are of the denoiser alone
)


class _NoNoise(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        torchvision = "ImageProcessor` requires torchvision" in message  # the fallback to PIL is what we want
        return not torchvision and not message.startswith(_NOISE)


def set_up_logging() -> None:
    """Print our log from INFO and other libraries' from WARNING, on standard error, without noise."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_NoNoise())
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("tgol_trainer")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
    # A filter on a logger sees only its own records, so it goes onto every logger that makes noise.
    for name in (
        "bitsandbytes.backends.cpu.ops",
        "bitsandbytes.cextension",
        "diffusers.loaders.lora_base",
        "diffusers.loaders.peft",
        "transformers.image_processing_utils_fast",
        "transformers.utils.import_utils",
    ):
        logging.getLogger(name).addFilter(_NoNoise())
    warnings.filterwarnings("ignore", message=r".*'pin_memory' argument is set as true but no accelerator.*")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn an error that names its cause and remedy into that message alone and exit code 1."""
    from tgol_trainer.data import DataError
    from tgol_trainer.thresholds import ThresholdError
    from tgol_trainer.trainer import TrainingDivergedError

    try:
        yield
    except (DataError, ThresholdError, TrainingDivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
