"""Exports that prove themselves: written, read back into a fresh model, compared with what was trained."""

from .checks import ExportError
from .run import FORMATS, export

__all__ = ["FORMATS", "ExportError", "export"]
