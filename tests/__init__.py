"""Tests, laid out as the package; `ROOT` is the checkout."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
