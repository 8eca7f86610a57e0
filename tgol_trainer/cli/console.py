"""How a command speaks: our log on standard error, and errors with a remedy as one message."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path


def set_up_logging() -> None:
    """Print our log from INFO on standard error, beside other libraries' warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    root = logging.getLogger("tgol_trainer")
    root.handlers = [handler]
    # What every process would say alike is said once; a warning may concern the rows of one process alone.
    root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    root.propagate = False
    warnings.filterwarnings("ignore", message=r".*'pin_memory' argument is set as true but no accelerator.*")


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn an error that names its cause and remedy into that message alone and exit code 1."""
    from tgol_trainer.data import DataError
    from tgol_trainer.thresholds import ThresholdError

    try:
        yield
    except (DataError, ThresholdError) as error:
        raise _plain(error) from error
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
        # Our own refusals say what to change; the same types from other libraries need their traceback.
        if not _raised_here(error):
            raise
        raise _plain(error) from error


def _plain(error: Exception) -> SystemExit:
    print(f"error: {error}", file=sys.stderr)
    return SystemExit(1)


def _raised_here(error: Exception) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parents[1])
