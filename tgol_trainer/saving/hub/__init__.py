"""Push to the Hub: choose the files, upload them, check that they arrived, explain failures. Imports no torch."""

from .background import RunPushes
from .errors import PushError
from .push import Gate, Repository, Strategy, open_repository, push_files, push_run, resume_command
from .selection import checkpoints, point_card_at, run_files

__all__ = [
    "Gate",
    "PushError",
    "Repository",
    "RunPushes",
    "Strategy",
    "checkpoints",
    "open_repository",
    "point_card_at",
    "push_files",
    "push_run",
    "resume_command",
    "run_files",
]
