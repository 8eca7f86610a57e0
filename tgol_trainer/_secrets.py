"""Recognise secrets by their form and by the name of their setting."""

from __future__ import annotations

import re
from typing import Any

TOKEN = re.compile(r"(?:hf_(?:oauth_)?|api_org_)[A-Za-z0-9]{17,}")
"""What a token of the Hugging Face Hub looks like."""

_SECRET_NAME = re.compile(r"((^|_)token|password|passwd|secret|api_key)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret: `token`, `*_token`, `*password`, `*secret`, `*api_key`."""
    return _SECRET_NAME.search(name) is not None


def without_secrets(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings without those whose name says that they hold a secret, in nested dictionaries too."""
    return {
        name: without_secrets(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if not is_secret(name)
    }
