"""Export trained weights: write them, read them back into a fresh model, and compare it with the trained one."""

from .checks import ExportError
from .run import FORMATS, export

__all__ = ["FORMATS", "ExportError", "export"]
