"""How a command speaks: our log on standard error, and errors with a remedy as one message."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator


def set_up_logging() -> None:
    """Print our log from INFO on standard error, beside other libraries' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("tgol_trainer")
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    root.propagate = False
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
